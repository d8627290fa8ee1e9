/** The list of records: one page of it, its order, and the way to the next page. */

import { h, number } from "./dom.js";

const SORTS = {
  number: "In the file's order",
  longest: "Longest first",
  shortest: "Shortest first",
  best: "Best grade first",
  worst: "Worst grade first",
};

/** The list's nodes. filters: of the address. to: {address, go, change}. */
export function list(page, filters, to) {
  const { total, offset, records } = page;
  const end = offset + records.length;
  const said = total
    ? `${number.format(offset + 1)} to ${number.format(end)} of ${number.format(total)}`
    : "No record passes the filters.";
  const sort = h(
    "select",
    {
      id: "sort",
      "aria-label": "Order",
      onchange: (event) => {
        const chosen = event.target.value;
        to.change({ sort: chosen === "number" ? null : chosen });
      },
    },
    Object.entries(SORTS).map(([value, text]) =>
      h("option", { value, selected: (filters.get("sort") ?? "number") === value }, text),
    ),
  );
  const step = (text, from, possible) =>
    h(
      "button",
      {
        type: "button",
        class: "button small",
        disabled: !possible,
        onclick: () => to.go({ offset: from > 0 ? String(from) : null }),
      },
      text,
    );
  const limit = Number(filters.get("limit") ?? 50);
  const steps = () => [
    step("Previous", offset - limit, offset > 0),
    step("Next", offset + limit, end < total),
  ];
  return [
    h(
      "div",
      { class: "bar" },
      h("h1", { class: "found" }, said),
      h("span", { class: "gap" }),
      sort,
    ),
    h("ol", { class: "records" }, records.map((record) => h("li", {}, entry(record, to)))),
    total > limit && h("div", { class: "bar foot" }, steps()),
  ].filter(Boolean);
}

function entry(record, to) {
  const { number: at, form, fault, copies, grade } = record;
  const facts = [form, record.method, record.kind, record.model, record.source].filter(Boolean);
  if (grade !== null) facts.push(`grade ${Math.round(grade * 1000) / 1000}`);
  if (copies > 1) facts.push(`${number.format(copies)} copies`);
  const open = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    to.go({ record: String(at) });
  };
  return h(
    "a",
    {
      class: fault ? "entry faulty" : "entry",
      href: to.address({ record: String(at) }),
      onclick: open,
    },
    h("span", { class: "number" }, number.format(at)),
    h("span", { class: "preview" }, fault || record.preview || "(empty)"),
    h("span", { class: "facts" }, facts.join(" · ")),
    h("span", { class: "size" }, `${number.format(record.characters)} characters`),
  );
}
