/** Plots and tables of plain elements. */

import { h } from "./dom.js";
import { known, t } from "./texts.js";

/** A part of a page with its title and, where there is a text `…Hint`, an explanation. */
export function section(key, content) {
  const hint = known(`${key}Hint`) && h("p", { class: "hint" }, t(`${key}Hint`));
  return h("section", {}, h("h2", {}, t(key)), hint, content);
}

/** Set a CSS variable; a style attribute would break the page's policy. */
function styled(node, name, value) {
  node.style.setProperty(name, value);
  return node;
}

/** Bars beside their names. rows: {name, value, said}. mark: a line at a value. */
export function bars(label, rows, mark = null) {
  const most = Math.max(...rows.map(({ value }) => value ?? 0), mark ?? 0) || 1;
  const part = (kind, value) =>
    styled(h("span", { class: kind }), "--share", `${(100 * (value ?? 0)) / most}%`);
  const row = ({ name, value, said }) =>
    h(
      "li",
      {},
      h("span", { class: "name" }, name),
      h("span", { class: "track" }, part("bar", value), mark !== null && part("mark", mark)),
      h("span", { class: "said" }, said),
    );
  return h("ul", { class: "bars", "aria-label": label }, rows.map(row));
}

/** A table. columns: {name, number}; rows: lists of cells, texts or nodes. */
export function table(caption, columns, rows) {
  const kind = (n) => (columns[n].number ? "number" : null);
  const head = columns.map(({ name }, n) => h("th", { scope: "col", class: kind(n) }, name));
  const cell = (value, n) =>
    n ? h("td", { class: kind(n) }, value) : h("th", { scope: "row" }, value);
  const body = rows.map((cells) => h("tr", {}, cells.map(cell)));
  const title = h("caption", { class: "offscreen" }, caption);
  const whole = h("table", {}, title, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole);
}

/** A square of numbers up to 1, shaded. find(a, b) of two names: {value, text, said}. */
export function square(caption, names, find) {
  const cell = (a, b) => {
    const found = a === b ? null : find(a, b);
    if (!found) return "–";
    const node = h("span", { class: "shade", title: found.said }, found.text);
    return styled(node, "--depth", `${Math.round(45 * Math.max(found.value ?? 0, 0))}%`);
  };
  const columns = [{ name: caption }, ...names.map((name) => ({ name, number: true }))];
  const rows = names.map((a) => [a, ...names.map((b) => cell(a, b))]);
  return table(caption, columns, rows);
}
