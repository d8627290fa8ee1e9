/** Markdown inside a line: emphasis, code, links. Makes nodes, never HTML. */

import { h } from "./dom.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPACE = /^\s?$/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WIDE = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;
// Chinese continues without a space.
const BARE = /^(https?:\/\/|www\.)[^\s<>\p{Script=Han}\u3000-\u303f\uff00-\uffef]+/iu;
const ENTITY = new RegExp(
  "^&(?:#(\\d{1,7})|#x([0-9a-f]{1,6})" +
    "|(amp|lt|gt|quot|apos|nbsp|copy|hellip|mdash|ndash|times|rarr|larr));",
  "i",
);
// A link's target: an address, bare or in angle brackets, and a title.
const TARGET = new RegExp(
  String.raw`^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))` +
    String.raw`(?:\s+(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'))?\s*\)`,
);
const NAMED = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  hellip: "…",
  mdash: "—",
  ndash: "–",
  times: "×",
  rarr: "→",
  larr: "←",
};

/** An address that a click may open, or null: no scripts, no data, no files. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(address, children, title = null) {
  const href = safeAddress(address);
  if (!href) return h("span", {}, children);
  return h("a", { href, title, rel: "noopener noreferrer nofollow", target: "_blank" }, children);
}

/** Nodes of one block's text. live: its end is being written, so open marks count as closed. */
export function inline(text, live = false, links = true) {
  return new Line(text, live, links).read();
}

class Line {
  constructor(text, live, links) {
    Object.assign(this, { text, live, links, at: 0, plain: "" });
    this.root = document.createDocumentFragment();
    this.marks = []; // runs of * _ ~ that may open or close
    this.unclosed = new Set(); // lengths of backtick runs known to have no closing one
    this.partner = links ? brackets(text) : new Map();
  }

  read() {
    while (this.at < this.text.length)
      if (!this.step(this.text[this.at])) this.plain += this.text[this.at++];
    this.flush();
    this.emphasise();
    this.root.normalize();
    return this.root;
  }

  flush() {
    if (this.plain) this.root.append(this.plain);
    this.plain = "";
  }

  put(node, end) {
    this.flush();
    this.root.append(node);
    this.at = end;
    return true;
  }

  step(char) {
    switch (char) {
      case "\\":
        return this.escape();
      case "`":
        return this.code();
      case "*":
      case "_":
      case "~":
        return this.mark(char);
      case "[":
        return this.link(this.at);
      case "!":
        return this.text[this.at + 1] === "[" && this.link(this.at + 1);
      case "<":
        return this.pointed();
      case "&":
        return this.entity();
      case "\n":
        return this.newline();
      case "$":
        return this.math("$$", "$$");
      case "h":
      case "H":
      case "w":
      case "W":
        return this.bare();
      default:
        return false;
    }
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "(") if (this.math("\\(", "\\)")) return true;
    if (next === "\n") return this.put(h("br"), this.at + 2);
    if (!ESCAPABLE.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  math(open, close) {
    if (!this.text.startsWith(open, this.at)) return false;
    const start = this.at + open.length;
    const end = this.text.indexOf(close, start);
    if (end <= start) return false;
    return this.put(
      h("span", { class: "math" }, this.text.slice(start, end).trim()),
      end + close.length,
    );
  }

  code() {
    const run = /^`+/.exec(this.text.slice(this.at))[0];
    const start = this.at + run.length;
    let end = this.unclosed.has(run.length) ? -1 : closing(this.text, start, run.length);
    if (end < 0) {
      this.unclosed.add(run.length);
      if (this.live && start < this.text.length) end = this.text.length;
    }
    if (end < 0) {
      this.plain += run;
      this.at = start;
      return true;
    }
    let inside = this.text.slice(start, end).replace(/\n/g, " ");
    if (/^ .*[^ ].* $|^ [^ ] $/.test(inside)) inside = inside.slice(1, -1);
    return this.put(h("code", {}, inside), end + run.length);
  }

  mark(char) {
    const count = /^(.)\1*/.exec(this.text.slice(this.at))[0].length;
    const end = this.at + count;
    if (char === "~" && count !== 2) return false;
    const previous = this.at ? before(this.text, this.at) : "";
    const next = String.fromCodePoint(this.text.codePointAt(end) ?? 32);
    // East Asian text has no spaces between words, so its letters count as boundaries.
    const edge = (c) => SPACE.test(c) || PUNCTUATION.test(c) || WIDE.test(c);
    const left = !SPACE.test(next) && (!PUNCTUATION.test(next) || edge(previous));
    const right = !SPACE.test(previous) && (!PUNCTUATION.test(previous) || edge(next));
    const opens = char === "_" ? left && (!right || PUNCTUATION.test(previous)) : left;
    const closes = char === "_" ? right && (!left || PUNCTUATION.test(next)) : right;
    if (this.live && end === this.text.length && !closes && count > 1) {
      this.at = end; // the beginning of something bold whose text has not come
      return true;
    }
    const node = document.createTextNode(char.repeat(count));
    this.put(node, end);
    this.marks.push({ char, count, length: count, opens, closes, node });
    return true;
  }

  link(start) {
    if (!this.links) return false;
    const close = this.partner.get(start);
    if (close === undefined) return false;
    const label = this.text.slice(start + 1, close);
    if (this.text[close + 1] !== "(") return false;
    const target = TARGET.exec(this.text.slice(close + 1, close + 4000));
    if (!target)
      return (
        this.live &&
        !this.text.slice(close).includes(")") &&
        this.put(h("span", {}, inline(label, true, false)), this.text.length)
      );
    const address = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
    if (!safeAddress(address)) return false; // shown as it was written
    return this.put(
      link(address, [inline(label, false, false)], target[3] ?? target[4]),
      close + 1 + target[0].length,
    );
  }

  pointed() {
    const found = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(
      this.text.slice(this.at, this.at + 2000),
    );
    if (found) return this.put(link(found[1], [found[1]]), this.at + found[0].length);
    const breaks = /^<br ?\/?>/i.exec(this.text.slice(this.at, this.at + 6));
    return breaks ? this.put(h("br"), this.at + breaks[0].length) : false;
  }

  bare() {
    if (!this.links || /[\p{L}\p{N}]$/u.test(before(this.text, this.at))) return false;
    const found = BARE.exec(this.text.slice(this.at, this.at + 2000));
    if (!found) return false;
    let address = found[0].replace(/[?!.,:;*_~'"]+$/, "");
    while (address.endsWith(")") && address.split(")").length > address.split("(").length)
      address = address.slice(0, -1);
    return this.put(
      link(/^www/i.test(address) ? `http://${address}` : address, [address]),
      this.at + address.length,
    );
  }

  entity() {
    const found = ENTITY.exec(this.text.slice(this.at, this.at + 12));
    if (!found) return false;
    const code = found[1] ? Number(found[1]) : found[2] ? parseInt(found[2], 16) : 0;
    const valid = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code < 0xe000);
    this.plain += found[3]
      ? NAMED[found[3].toLowerCase()]
      : valid
        ? String.fromCodePoint(code)
        : "\ufffd";
    this.at += found[0].length;
    return true;
  }

  newline() {
    const hard = /( {2,})$/.test(this.plain);
    this.plain = this.plain.replace(/ +$/, "");
    let end = this.at + 1;
    while (this.text[end] === " ") end += 1;
    if (hard) return this.put(h("br"), end);
    this.plain += "\n";
    this.at = end;
    return true;
  }

  /** CommonMark's process for emphasis: each closing run looks back for its nearest opening one. */
  emphasise() {
    const floor = new Map();
    for (let c = 0; c < this.marks.length; c++) {
      const closer = this.marks[c];
      if (!closer.closes) continue;
      while (closer.count) {
        const kind = `${closer.char}${closer.opens}${closer.length % 3}`;
        let o = c - 1;
        while (o >= (floor.get(kind) ?? 0) && !matches(this.marks[o], closer)) o -= 1;
        if (o < (floor.get(kind) ?? 0)) {
          floor.set(kind, c);
          break;
        }
        for (let between = o + 1; between < c; between++) this.marks[between].count = 0;
        wrap(this.marks[o], closer);
      }
    }
    if (!this.live) return;
    for (const mark of this.marks.reverse())
      if (mark.count > 1 && mark.opens && mark.node.nextSibling) wrap(mark, null);
  }
}

function matches(opener, closer) {
  if (!opener.count || !opener.opens || opener.char !== closer.char) return false;
  const both = opener.closes || closer.opens;
  return !(
    both &&
    (opener.length + closer.length) % 3 === 0 &&
    (opener.length % 3 || closer.length % 3)
  );
}

/** Put all between two marks into an element; without a closing mark, all to the end. */
function wrap(opener, closer) {
  const used = opener.count > 1 && (!closer || closer.count > 1) ? 2 : 1;
  const element = h(opener.char === "~" ? "del" : used > 1 ? "strong" : "em");
  for (
    let node = opener.node.nextSibling;
    node && node !== closer?.node;
    node = opener.node.nextSibling
  )
    element.append(node);
  opener.node.after(element);
  for (const mark of [opener, closer]) {
    if (!mark) continue;
    mark.count -= used;
    mark.node.data = mark.char.repeat(mark.count);
  }
}

function before(text, at) {
  const low = text.charCodeAt(at - 1);
  return low >= 0xdc00 && low < 0xe000 ? text.slice(at - 2, at) : text.slice(at - 1, at);
}

/** Where the next run of exactly `length` backticks begins, or -1. */
function closing(text, from, length) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text))
    if (run[0].length === length) return run.index;
  return -1;
}

/** For each `[` that has one, its `]`; code and escapes are skipped. */
function brackets(text) {
  const partner = new Map(),
    open = [],
    missing = new Set();
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "`") {
      const run = /^`+/.exec(text.slice(i))[0].length;
      const end = missing.has(run) ? -1 : closing(text, i + run, run);
      if (end < 0) missing.add(run);
      i = (end < 0 ? i : end) + run - 1;
    } else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) partner.set(open.pop(), i);
  }
  return partner;
}
