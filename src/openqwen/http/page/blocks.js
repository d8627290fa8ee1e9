/** Markdown's blocks as a tree of plain objects: CommonMark with GitHub's tables, without HTML. */

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MATH = /^ {0,3}(\$\$|\\\[)/;

/** Blocks, each with its kind and the lines that it was read from (`raw`). */
export function blocks(text) {
  return read(text.replace(/\r\n?/g, "\n").split("\n").map(untab));
}

function untab(line) {
  let indent = /^[ \t]*/.exec(line)[0];
  if (!indent.includes("\t")) return line;
  const rest = line.slice(indent.length);
  let width = 0;
  for (const char of indent) width += char === "\t" ? 4 - (width % 4) : 1;
  return " ".repeat(width) + rest;
}

const blank = (line) => /^\s*$/.test(line);
const indentOf = (line) => /^ */.exec(line)[0].length;

function read(lines, depth = 0) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = one(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    found.push(block);
    at = end;
  }
  return found;
}

/** The block that begins at a line, and the line after it. */
function one(lines, at, depth) {
  const line = lines[at];
  if (indentOf(line) >= 4) return indented(lines, at);
  if (FENCE.test(line)) return fenced(lines, at);
  const heading = HEADING.exec(line);
  if (heading)
    return [{ kind: "heading", level: heading[1].length, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < 12) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  const formula = math(lines, at);
  if (formula) return formula;
  if (tableAt(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

function indented(lines, at) {
  let end = at;
  while (end < lines.length && (indentOf(lines[end]) >= 4 || blank(lines[end]))) end += 1;
  while (blank(lines[end - 1])) end -= 1;
  return [
    {
      kind: "code",
      language: "",
      text: lines
        .slice(at, end)
        .map((line) => line.slice(4))
        .join("\n"),
    },
    end,
  ];
}

function fenced(lines, at) {
  const [, indent, fence, info] = FENCE.exec(lines[at]);
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const inside = lines
    .slice(at + 1, end)
    .map((line) => line.slice(Math.min(indent.length, indentOf(line))));
  return [
    { kind: "code", language: info.trim().split(/[\s{]/)[0], text: inside.join("\n") },
    Math.min(end + 1, lines.length),
  ];
}

/** A formula set apart, or null. */
function math(lines, at) {
  if (!MATH.test(lines[at])) return null;
  const close = lines[at].includes("$$") ? "$$" : "\\]";
  let text = lines[at].trim().slice(2),
    end = at + 1;
  while (!text.includes(close) && end < lines.length && !blank(lines[end]))
    text += `\n${lines[end++]}`;
  const stop = text.indexOf(close);
  if (stop < 0 || text.slice(stop + 2).trim()) return null;
  return [{ kind: "math", text: text.slice(0, stop).trim() }, end];
}

function quote(lines, at, depth) {
  const inside = [];
  let end = at;
  for (; end < lines.length; end++) {
    if (QUOTE.test(lines[end])) inside.push(lines[end].replace(QUOTE, ""));
    else if (blank(lines[end]) || starts(lines, end) || ITEM.test(lines[end]) || !lazy(inside))
      break;
    else inside.push(lines[end]);
  }
  return [{ kind: "quote", children: read(inside, depth + 1) }, end];
}

/** Whether a line without the container's mark may continue the container's last paragraph. */
function lazy(inside) {
  let at = inside.length - 1;
  // Indented lines, but not code.
  while (at > 0 && indentOf(inside[at]) >= 4 && !blank(inside[at - 1])) at -= 1;
  const last = inside[at] ?? "";
  const fences = inside.filter((line) => FENCE.test(line)).length;
  return (
    !blank(last) &&
    fences % 2 === 0 &&
    indentOf(last) < 4 &&
    !HEADING.test(last) &&
    !RULE.test(last)
  );
}

function list(lines, at, depth) {
  const kind = (marker) => marker.at(-1);
  const first = ITEM.exec(lines[at]);
  const items = [];
  let end = at,
    loose = false;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || RULE.test(lines[end]) || kind(found[2]) !== kind(first[2])) break;
    const [item, after] = listItem(lines, end, found);
    const children = read(item, depth + 1);
    items.push(children);
    const between = blank(lines[after - 1]);
    end = after;
    if (between && end < lines.length && ITEM.test(lines[end]) && !RULE.test(lines[end])) {
      loose ||= kind(ITEM.exec(lines[end])[2]) === kind(first[2]);
    }
    loose ||= apart(item, children);
  }
  while (end > at + 1 && blank(lines[end - 1])) end -= 1;
  const ordered = /\d/.test(first[2]);
  return [
    { kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, loose, items },
    end,
  ];
}

/** Lines of an item without their indentation, and the line after it. */
function listItem(lines, at, [, indent, marker, gap = " ", rest = ""]) {
  const space = gap.length > 4 || !rest ? 1 : gap.length;
  const offset = indent.length + marker.length + space;
  const inside = [rest ? " ".repeat(gap.length - space) + rest : ""];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (blank(line)) {
      if (inside.length === 1 && !inside[0]) break; // an item begins with one blank line at most
      inside.push("");
    } else if (indentOf(line) >= offset) inside.push(line.slice(offset));
    else if (inside.at(-1) === "" || starts(lines, end) || ITEM.test(line) || !lazy(inside)) break;
    else inside.push(line.trimStart());
  }
  return [inside, end];
}

/** Whether blank lines stand between an item's own blocks. */
function apart(inside, children) {
  if (children.length < 2) return false;
  let at = 0;
  for (const child of children.slice(0, -1)) {
    while (blank(inside[at])) at += 1;
    at += child.raw.split("\n").length;
    if (blank(inside[at] ?? "x")) return true;
  }
  return false;
}

/** Whether a line begins a block that may stand right after a paragraph's line. */
function starts(lines, at) {
  const line = lines[at];
  if (indentOf(line) >= 4) return false;
  const item = ITEM.exec(line);
  const interrupts = item && item[4] && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    interrupts ||
    tableAt(lines, at)
  );
}

function paragraph(lines, at) {
  let end = at + 1;
  for (; end < lines.length && !blank(lines[end]); end++) {
    const under = UNDERLINE.exec(lines[end]);
    if (under) {
      const text = lines
        .slice(at, end)
        .map((line) => line.trimStart())
        .join("\n")
        .trimEnd();
      return [{ kind: "heading", level: under[1][0] === "=" ? 1 : 2, text }, end + 1];
    }
    if (starts(lines, end) || math(lines, end)) break;
  }
  return [
    {
      kind: "paragraph",
      text: lines
        .slice(at, end)
        .map((line) => line.trimStart())
        .join("\n")
        .trimEnd(),
    },
    end,
  ];
}

/** A row's cells: a `|` in code or after a backslash divides none. */
export function cells(row) {
  const parts =
    row
      .trim()
      .replace(/^\|/, "")
      .match(/(?:\\.|[^|\\]|\\$)*(?:\||$)/g) ?? [];
  const all = parts.map((part) => part.replace(/\|$/, "").trim().replace(/\\\|/g, "|"));
  const last = parts.findIndex((part) => !part.endsWith("|"));
  const kept =
    last < 0 ? all : all.slice(0, parts[last] === "" || !parts[last].trim() ? last : last + 1);
  return kept;
}

function tableAt(lines, at) {
  const next = lines[at + 1];
  if (!lines[at].includes("|") || next === undefined || !DELIMITERS.test(next)) return false;
  return (
    (next.includes("|") || next.includes(":")) && cells(lines[at]).length === cells(next).length
  );
}

function table(lines, at) {
  const aligned = cells(lines[at + 1]).map((cell) =>
    /^:.*:$/.test(cell)
      ? "center"
      : cell.endsWith(":")
        ? "right"
        : cell.startsWith(":")
          ? "left"
          : "",
  );
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && !blank(lines[end]); end++) {
    const another = starts(lines, end) || ITEM.test(lines[end]) || indentOf(lines[end]) >= 4;
    if (another && !lines[end].trim().startsWith("|")) break;
    const row = cells(lines[end]).slice(0, aligned.length);
    rows.push([...row, ...Array(aligned.length - row.length).fill("")]);
  }
  return [{ kind: "table", aligned, head: cells(lines[at]), rows }, end];
}
