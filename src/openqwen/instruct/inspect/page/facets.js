/** The side panel: search, filters, and the statistics of what they let through. */

import { histogram } from "./charts.js";
import { h, number } from "./dom.js";

const TITLES = {
  form: "Form",
  method: "Method",
  model: "Model",
  kind: "Kind",
  source: "Source",
  language: "Language",
  grader: "Grader",
  reason: "Reason",
  tag: "Tag",
};
const DUPLICATES = {
  text: "Text occurs again",
  prompt: "Prompt occurs again",
  later: "Copies of an earlier text",
  unique: "Text occurs once",
};

/** The panel's nodes. params: the filters (URLSearchParams). change: sets some of them. */
export function facets(statistics, params, change) {
  const counts = Object.entries(TITLES)
    .filter(([name]) => statistics.counts[name])
    .map(([name, title]) => facet(name, title, statistics, params, change));
  return [
    ...counts,
    duplicates(statistics, params, change),
    range("characters", "Characters", statistics.characters, params, change),
    range("grade", "Grade", statistics.grade, params, change),
    turns(statistics),
  ].filter(Boolean);
}

function facet(name, title, statistics, params, change) {
  const { values, distinct } = statistics.counts[name];
  const rows = values.map(([value, count]) => {
    const said = value || `(no ${title.toLowerCase()})`;
    return row(name, value, said, count, statistics.total, params, change);
  });
  const more = distinct - values.length;
  const others = more > 0 && h("p", { class: "hint" }, `and ${number.format(more)} more`);
  return section(title, rows, others);
}

function duplicates(statistics, params, change) {
  const rows = Object.entries(DUPLICATES)
    .filter(([name]) => statistics.duplicates[name])
    .map(([name, said]) =>
      row("duplicates", name, said, statistics.duplicates[name], statistics.total, params, change),
    );
  return rows.length > 0 && section("Duplicates", rows);
}

/** One value with its count, a button that sets or clears the filter. */
function row(name, value, said, count, total, params, change) {
  const chosen = params.get(name) === value;
  const bar = h("span", { class: "share", "aria-hidden": "true" });
  bar.style.width = `${Math.max((100 * count) / Math.max(total, 1), 0.5)}%`;
  return h(
    "button",
    {
      type: "button",
      class: "value",
      "aria-pressed": String(chosen),
      title: said,
      onclick: () => change({ [name]: chosen ? null : value }),
    },
    bar,
    h("span", { class: "said" }, said),
    h("span", { class: "count" }, number.format(count)),
  );
}

function range(name, title, shape, params, change) {
  const names = [`${name}_from`, `${name}_to`];
  if (!shape && !names.some((key) => params.has(key))) return null;
  const whole = name === "characters";
  const pick = (from, to, last) => {
    const most = whole ? (last ? to : Math.ceil(to) - 1) : to;
    change({ [names[0]]: String(whole ? Math.ceil(from) : from), [names[1]]: String(most) });
  };
  const drawn = shape && histogram(shape, title, pick);
  const field = (key, said) =>
    h("input", {
      type: "number",
      step: "any",
      "aria-label": `${title}, ${said}`,
      placeholder: said,
      value: params.get(key) ?? "",
      onchange: (event) => change({ [key]: event.target.value || null }),
    });
  return section(
    title,
    drawn && drawn.chart,
    drawn && h("p", { class: "hint" }, drawn.summary),
    h("div", { class: "range" }, field(names[0], "at least"), field(names[1], "at most")),
  );
}

function turns({ turns: found }) {
  if (!found.length) return null;
  const said = found.map(([count, records]) => `${count}: ${number.format(records)}`).join(" · ");
  return section("Messages", h("p", { class: "hint" }, said));
}

function section(title, ...children) {
  return h("section", {}, h("h2", { class: "eyebrow" }, title), ...children);
}
