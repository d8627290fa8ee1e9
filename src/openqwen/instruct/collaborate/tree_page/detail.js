/** What is known of a tag: where it stands, how models wrote it, explanations, instructions. */

import { button, h } from "./dom.js";
import { number, t } from "./texts.js";

const LONG = 300; // characters of an instruction; the rest unfolds

/** Nodes of a tag. above: names, the highest first; open(name); more(): the next instructions. */
export function detailNodes(tag, above, open, more) {
  const list = h("ul", { class: "examples" }, tag.instructions.map(example));
  const next = button(t("detail.more"), async () => {
    const { instructions } = await more(list.childElementCount);
    list.append(...instructions.map(example));
    next.hidden = list.childElementCount >= tag.count;
  });
  next.hidden = tag.instructions.length >= tag.count;
  const crumbs = above.map((name) => button(name, () => open(name), "small"));
  const forms = tag.forms.map(([form, n]) =>
    h("li", {}, form, h("span", { class: "count" }, number.format(n))),
  );
  return [
    crumbs.length > 0 && h("p", { class: "row crumbs" }, h("span", {}, t("detail.below")), crumbs),
    h("p", { class: "hint" }, t("instructions", { n: tag.count })),
    section(t("detail.explanations"), tag.explanations.map((one) => h("li", {}, one))),
    section(t("detail.forms"), forms, "forms"),
    h("section", {}, h("h3", {}, t("detail.instructions")), list, next),
  ].filter(Boolean);
}

const section = (title, items, kind = "") =>
  items.length > 0 && h("section", {}, h("h3", {}, title), h("ul", { class: kind }, items));

function example({ text, characters }) {
  if (text.length <= LONG) return h("li", { class: "plain" }, text);
  const left = characters - text.length;
  const cut = left > 0 && h("p", { class: "note" }, t("detail.cut", { n: left }));
  const rest = h("div", { class: "plain" }, text.slice(LONG));
  return h("li", {}, h("details", {}, h("summary", {}, `${text.slice(0, LONG)} …`), rest, cut));
}
