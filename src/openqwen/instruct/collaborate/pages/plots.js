/** Plots of plain elements: bars that are a list, tables, and tables of shaded numbers. */

import { h } from "./dom.js";

/** Bars beside their names. rows: {name, value, said, mark?}; mark: a line at a value. */
export function bars(label, rows, mark = null) {
  const most = Math.max(...rows.map(({ value }) => value ?? 0), mark ?? 0) || 1;
  const wide = (node, value) => {
    node.style.setProperty("--share", `${(100 * value) / most}%`);
    return node;
  };
  const row = ({ name, value, said, odd }) =>
    h(
      "li",
      { class: odd && "odd" },
      h("span", { class: "name" }, name),
      h(
        "span",
        { class: "track", "aria-hidden": "true" },
        wide(h("span", { class: "bar" }), value ?? 0),
        mark !== null && wide(h("span", { class: "mark" }), mark),
      ),
      h("span", { class: "said" }, said),
    );
  return h("ul", { class: "bars", "aria-label": label }, rows.map(row));
}

/** A table. columns: [{name, hint?, number?}]; rows: lists of cells (text or nodes). */
export function table(caption, columns, rows) {
  const head = columns.map(({ name, hint, number }) =>
    h("th", { scope: "col", title: hint, class: number && "number" }, name),
  );
  const cell = (value, n) => {
    const tag = n === 0 ? "th" : "td";
    return h(tag, { scope: n === 0 && "row", class: columns[n].number && "number" }, value);
  };
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "offscreen" }, caption),
      h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map(cell)))),
    ),
  );
}

/** A square of numbers between -1 and 1. find(a, b): {value, said} or null. */
export function square(caption, names, find) {
  const columns = [{ name: "" }, ...names.map((name) => ({ name, number: true }))];
  const rows = names.map((a) => [
    a,
    ...names.map((b) => {
      const found = a === b ? null : find(a, b);
      if (!found) return h("span", { class: "hint" }, "–");
      const node = h("span", { class: "shade", title: found.said }, found.text);
      node.style.setProperty("--depth", `${Math.round(45 * Math.max(found.value, 0))}%`);
      return node;
    }),
  ]);
  return table(caption, columns, rows);
}
