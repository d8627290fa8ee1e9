/** The project's numbers: progress, agreement, people, position, time; they stay up to date. */

import * as api from "./api.js";
import { at, h } from "./dom.js";
import { Management } from "./manage.js";
import { bars, section, square, table } from "./plots.js";
import { duration, few, known, moment, number, percent, t } from "./texts.js";

const AGAIN = 5000; // milliseconds between two looks
const UNLIKELY = 0.01; // a bias of position below this chance is marked

export class QualityView {
  constructor(site) {
    Object.assign(this, { site, timer: 0, closed: false });
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }

  async open() {
    const numbers = h("div", { class: "numbers" });
    const title = h("h1", {}, this.site.project.title);
    if (this.site.me.role === "owner") this.management = new Management();
    const page = h("div", { class: "page wide" }, title, numbers, this.management?.sections());
    at("main").replaceChildren(page);
    at("main").focus();
    await this.look(numbers);
  }

  /** Draw the numbers where they have changed, and look again after some seconds. */
  async look(place) {
    try {
      const found = await api.quality();
      const text = JSON.stringify(found);
      const read = place.contains(document.activeElement);
      if (!this.closed && text !== this.shown && !read) place.replaceChildren(...sections(found));
      if (!read) this.shown = text;
      // Accounts are listed again when there is another person.
      const people = found.people.map(({ name }) => name).join("\n");
      if (people !== this.people) await this.management?.list();
      this.people = people;
    } catch (error) {
      if (!this.shown) throw error;
      this.site.saved(error.message);
    }
    if (!this.closed) this.timer = setTimeout(() => this.look(place), AGAIN);
  }
}

function sections(found) {
  const { progress, people, position, seconds, tasks, models } = found;
  const parts = [
    h("dl", { class: "tiles" }, tiles(found)),
    section("quality.progress", days(progress)),
    section("quality.people", peopleTable(people)),
    section("quality.kappa", kappaSquare(found)),
    section("quality.position", positions(position)),
    section("quality.seconds", times(seconds)),
    section("quality.tasks", tasks.length ? disputed(tasks) : nothing()),
  ];
  if (models?.length) parts.push(section("quality.models", modelTable(models)));
  return parts;
}

const nothing = () => h("p", { class: "note" }, t("quality.none"));

function tiles({ progress, alpha, alpha_ranks: ranks, ac1, people }) {
  const right = people.reduce((sum, { gold }) => sum + gold.right, 0);
  const of = people.reduce((sum, { gold }) => sum + gold.of, 0);
  const tile = (key, value, hint = "") =>
    h(
      "div",
      { class: "tile" },
      h("dt", {}, t(key)),
      h("dd", {}, value),
      h("dd", { class: "hint" }, hint || ""),
    );
  const golden = of && t("quality.goldHint", { right, of });
  const agreed = (key, one) => tile(key, few(one.value), `${interval(one)} ${t(`${key}Hint`)}`);
  return [
    tile("quality.answers", number.format(progress.answers), t("quality.wanted", progress)),
    agreed("quality.alpha", alpha),
    ranks && agreed("quality.alphaRanks", ranks),
    agreed("quality.ac1", ac1),
    tile("quality.gold", percent(of ? right / of : null), golden),
    tile("quality.skipped", number.format(progress.skipped)),
  ];
}

/** The interval of a number, or why there is none. */
function interval({ value, low, high, why, why_code: code }) {
  if (value === null) return known(`why.${code}`) ? t(`why.${code}`) : (why ?? "");
  return low === null ? "" : t("quality.interval", { low: few(low), high: few(high) });
}

function days({ answers, wanted, days: all = [] }) {
  const share = wanted ? answers / wanted : 0;
  const name = t("quality.progress");
  const meter = h("progress", { max: "1", value: String(share), "aria-label": name });
  const row = ({ day, answers: n }) => ({ name: day, value: n, said: number.format(n) });
  const plot = all.length > 1 && bars(t("quality.days"), all.map(row));
  return [meter, h("p", { class: "note" }, percent(share)), plot];
}

const COLUMNS = "answers skipped goldRight agreement median outliers bias last".split(" ");

function peopleTable(people) {
  const columns = [{ name: t("column.name") }, { name: t("column.role") }];
  columns.push(...COLUMNS.map((name) => ({ name: t(`column.${name}`), number: true })));
  const rows = people.map(({ name, role, kind, gold, seconds, ...one }) => [
    name,
    t(kind === "human" ? `role.${role}` : `kind.${kind}`),
    number.format(one.answers),
    number.format(one.skipped),
    gold.of ? `${number.format(gold.right)} / ${number.format(gold.of)}` : "–",
    few(one.agreement),
    duration(seconds.median),
    number.format(seconds.outliers),
    bias(one.position),
    moment(one.last),
  ]);
  return table(t("quality.people"), columns, rows);
}

function bias(position) {
  if (typeof position?.p !== "number") return "–";
  const text = `p = ${few(position.p, 3)}`;
  return position.p < UNLIKELY ? h("strong", { class: "wrong" }, text) : text;
}

function kappaSquare({ kappa, people }) {
  if (!kappa.length) return h("p", { class: "note" }, t("quality.noPairs"));
  const found = new Map();
  for (const { a, b, value, tasks } of kappa) {
    const entry = { value, text: few(value), said: t("quality.shared", { n: tasks }) };
    found.set(`${a}\n${b}`, entry).set(`${b}\n${a}`, entry);
  }
  const names = people.map(({ name }) => name);
  const paired = names.filter((name) => kappa.some(({ a, b }) => a === name || b === name));
  return square(t("quality.kappa"), paired, (a, b) => found.get(`${a}\n${b}`));
}

function positions({ shares, expected, p }) {
  if (!shares?.length) return nothing();
  const row = (value, n) => {
    const name = t("quality.shown", { place: n + 1 });
    return { name, value, said: percent(value) };
  };
  const plot = bars(t("quality.position"), shares.map(row), expected);
  return [plot, h("p", { class: "note" }, bias({ p }))];
}

function times({ edges, counts }) {
  if (!counts?.length) return nothing();
  const row = (value, n) => {
    const name = `${duration(edges[n])} – ${duration(edges[n + 1])}`;
    return { name, value, said: number.format(value) };
  };
  return bars(t("quality.seconds"), counts.map(row));
}

function disputed(tasks) {
  const column = (name, n) => ({ name: t(`column.${name}`), number: n > 0 });
  const rows = tasks.map(({ id, preview, answers, agreement }) => [
    h("a", { href: `#/review/${encodeURIComponent(id)}` }, preview ?? id),
    number.format(answers),
    percent(agreement),
  ]);
  return table(t("quality.tasks"), ["task", "answers", "agreement"].map(column), rows);
}

function modelTable(models) {
  const names = ["model", "score", "interval", "wins", "losses", "ties"];
  const columns = names.map((name, n) => ({ name: t(`column.${name}`), number: n > 0 }));
  const rows = models.map(({ model, score, low, high, wins, losses, ties }) => [
    model,
    few(score),
    low === null ? "–" : `${few(low)} … ${few(high)}`,
    ...[wins, losses, ties].map((n) => number.format(n)),
  ]);
  return table(t("quality.models"), columns, rows);
}
