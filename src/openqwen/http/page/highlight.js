/** Colours for code: comments, strings, numbers and keywords, by one rule for most languages. */

import { h } from "./dom.js";

const HASH = new RegExp(
  "^(py|python|sh|bash|shell|zsh|ruby|rb|r|yaml|yml|toml|perl|make|makefile|dockerfile" +
    "|julia|elixir)$",
);
const DASHES = /^(sql|lua|haskell|hs|ada)$/;
const PLAIN = /^(|text|txt|plain|plaintext|output|console|markdown|md|latex|tex)$/;
const KEYWORDS = new Set(
  `
    abstract and as assert async await bool boolean break case catch char class const
    constexpr continue def default del delete do double elif else enum except export extends
    false False final finally float fn for foreach from func function global go goto if impl
    implements import in instanceof int interface is lambda let long match mod module mut
    namespace new nil None nonlocal not null nullptr of operator or override package pass
    private protected pub public raise return self short signed sizeof static struct super
    switch template then this throw throws trait true True try type typedef typeof undefined
    union unsigned use using var virtual void volatile where while with yield
  `.match(/\w+/g),
);
const SQL = new Set(
  `
    select from where and or not insert into values update set delete create table drop alter
    join left right inner outer on as group by order having limit distinct union all null is
    in like between case when then else end primary key foreign references index view
  `.match(/\w+/g),
);
const STRINGS = [
  '"""[\\s\\S]*?(?:"""|$)',
  "'''[\\s\\S]*?(?:'''|$)",
  '"(?:[^"\\\\\\n]|\\\\.)*"?',
  "'(?:[^'\\\\\\n]|\\\\.)*'?",
  "`(?:[^`\\\\]|\\\\.)*`?",
].join("|");

/** Nodes of a code's text. */
export function highlight(text, language) {
  const name = language.toLowerCase();
  const nodes = document.createDocumentFragment();
  if (PLAIN.test(name) || text.length > 50_000) {
    nodes.append(text);
    return nodes;
  }
  const comment = HASH.test(name)
    ? "#[^\\n]*"
    : DASHES.test(name)
      ? "--[^\\n]*"
      : /^(html|xml|svg)$/.test(name)
        ? "<!--[\\s\\S]*?-->"
        : "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)";
  const token = new RegExp(
    `(?<comment>${comment})|(?<string>${STRINGS})` +
      "|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_$][\\w$]*)",
    "g",
  );
  let at = 0;
  for (const found of text.matchAll(token)) {
    const { comment: remark, string, number, word } = found.groups;
    const keyword = word && (name === "sql" ? SQL.has(word.toLowerCase()) : KEYWORDS.has(word));
    const kind = remark
      ? "comment"
      : string
        ? "string"
        : number
          ? "number"
          : keyword
            ? "keyword"
            : null;
    if (!kind) continue;
    nodes.append(text.slice(at, found.index), h("span", { class: `code-${kind}` }, found[0]));
    at = found.index + found[0].length;
  }
  nodes.append(text.slice(at));
  return nodes;
}
