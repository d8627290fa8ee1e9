/** The owner's page: progress and quality, people and invitations, import and export. */

import * as api from "./api.js";
import { at, copyButton, h, toast } from "./dom.js";
import { bars, square, table } from "./plots.js";
import { duration, few, moment, number, percent, t } from "./texts.js";

const AGAIN = 5000; // milliseconds between two looks
const EXPORTS = ["events", "ranks", "pairs", "demonstrations"];
const DAYS = 7; // that an invitation can be used
const UNLIKELY = 0.01; // a bias of position below this chance is marked

export class QualityView {
  constructor(site) {
    Object.assign(this, { site, timer: 0, closed: false, link: null });
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }

  async open() {
    this.numbers = h("div", { class: "numbers" });
    this.invited = h("div", {});
    at("main").replaceChildren(
      h(
        "div",
        { class: "page wide" },
        h("h1", {}, this.site.project.name),
        this.numbers,
        this.invitations(),
        this.files(),
      ),
    );
    at("main").focus();
    await this.look();
    await this.listInvitations();
  }

  /** Draw the numbers, and again after some seconds. */
  async look() {
    try {
      const found = await api.quality();
      if (this.closed) return;
      const place = this.numbers.querySelector(".scroll:focus-within");
      if (!place) this.numbers.replaceChildren(...this.nodes(found));
    } catch (error) {
      if (!this.numbers.childElementCount || error.status === 401) throw error;
      this.site.saved(error.message);
    }
    if (!this.closed) this.timer = setTimeout(() => this.look().catch(() => {}), AGAIN);
  }

  nodes(found) {
    const { progress, alpha, ac1, people, position } = found;
    const gold = people.reduce((sum, { gold }) => sum + gold.right, 0);
    const golden = people.reduce((sum, { gold }) => sum + gold.of, 0);
    const tile = (name, value, hint) =>
      h("div", { class: "tile" }, h("dt", {}, t(name)), h("dd", {}, value), h("p", { class: "hint" }, hint));
    return [
      h(
        "dl",
        { class: "tiles" },
        tile("quality.answers", number.format(progress.answers), t("quality.wanted", progress)),
        tile("quality.alpha", few(alpha.value), this.alphaHint(alpha)),
        tile("quality.ac1", few(ac1.value), t("quality.ac1Hint")),
        tile("quality.gold", percent(golden ? gold / golden : null), t("quality.goldHint", { right: gold, of: golden })),
        tile("quality.skipped", number.format(progress.skipped), ""),
      ),
      this.section("quality.progress", this.progress(progress)),
      this.section("quality.people", this.people(people), t("quality.peopleHint")),
      this.section("quality.kappa", this.kappa(found), t("quality.kappaHint")),
      this.section("quality.position", this.position(position), t("quality.positionHint")),
      this.section("quality.seconds", this.seconds(found.seconds), t("quality.secondsHint")),
      this.section("quality.tasks", this.tasks(found.tasks), t("quality.tasksHint")),
    ];
  }

  section(key, content, hint = null) {
    return h(
      "section",
      { "aria-label": t(key) },
      h("h2", {}, t(key)),
      hint && h("p", { class: "hint" }, hint),
      content,
    );
  }

  alphaHint({ value, low, high, why }) {
    if (value === null || value === undefined) return why ?? t("quality.none");
    if (low === null || low === undefined) return t("quality.alphaHint");
    return `${t("quality.interval", { low: few(low), high: few(high) })} ${t("quality.alphaHint")}`;
  }

  progress({ answers, wanted, days = [] }) {
    const share = wanted ? answers / wanted : 0;
    const meter = h("progress", { max: "1", value: String(share), "aria-label": t("quality.progress") });
    const rows = days.map(({ day, answers: n }) => ({ name: day, value: n, said: number.format(n) }));
    return [meter, h("p", { class: "note" }, percent(share)), rows.length > 1 && bars(t("quality.days"), rows)];
  }

  people(people) {
    const names = ["name", "role", "answers", "skipped", "goldRight", "agreement", "median", "outliers", "bias"];
    const columns = names.map((name, n) => ({ name: t(`column.${name}`), number: n > 1 }));
    const rows = people.map((one) => [
      one.name,
      t(`role.${one.role}`),
      number.format(one.answers),
      number.format(one.skipped),
      one.gold.of ? `${number.format(one.gold.right)} / ${number.format(one.gold.of)}` : "–",
      few(one.agreement),
      duration(one.seconds.median),
      number.format(one.seconds.outliers),
      this.biasOf(one.position),
    ]);
    return table(t("quality.people"), columns, rows);
  }

  biasOf(position) {
    if (position?.p === null || position?.p === undefined) return "–";
    const text = `p = ${few(position.p, 3)}`;
    return position.p < UNLIKELY ? h("strong", { class: "wrong" }, text) : text;
  }

  kappa({ kappa, people }) {
    if (!kappa.length) return h("p", { class: "note" }, t("quality.noPairs"));
    const byId = new Map(people.map(({ id, name }) => [id, name]));
    const found = new Map();
    for (const { a, b, value, tasks } of kappa) {
      const said = t("quality.shared", { n: tasks });
      for (const pair of [[a, b], [b, a]])
        found.set(pair.map((id) => byId.get(id) ?? id).join("\n"), { value, said, text: few(value) });
    }
    const named = people.filter(({ id }) => kappa.some(({ a, b }) => a === id || b === id));
    return square(
      t("quality.kappa"),
      named.map(({ name }) => name),
      (a, b) => found.get(`${a}\n${b}`) ?? null,
    );
  }

  position({ shares, expected, p }) {
    if (!shares.length) return h("p", { class: "note" }, t("quality.none"));
    const rows = shares.map((value, n) => ({
      name: t("quality.shown", { place: n + 1 }),
      value,
      said: percent(value),
    }));
    return [bars(t("quality.position"), rows, expected), h("p", { class: "note" }, this.biasOf({ p }))];
  }

  seconds({ edges, counts, outliers }) {
    if (!counts.length) return h("p", { class: "note" }, t("quality.none"));
    const rows = counts.map((value, n) => ({
      name: `${duration(edges[n])} – ${duration(edges[n + 1])}`,
      value,
      said: number.format(value),
      odd: outliers && edges[n] >= outliers,
    }));
    return bars(t("quality.seconds"), rows);
  }

  tasks(tasks) {
    if (!tasks.length) return h("p", { class: "note" }, t("quality.none"));
    const columns = ["task", "answers", "agreement"].map((name, n) => ({
      name: t(`column.${name}`),
      number: n > 0,
    }));
    const rows = tasks.map(({ id, preview, answers, agreement }) => [
      h("a", { href: `#/review/${encodeURIComponent(id)}` }, preview ?? id),
      number.format(answers),
      few(agreement),
    ]);
    return table(t("quality.tasks"), columns, rows);
  }

  invitations() {
    const role = h(
      "select",
      { id: "invite-role" },
      ["annotator", "reviewer", "owner"].map((value) => h("option", { value }, t(`role.${value}`))),
    );
    const make = async (event) => {
      event.preventDefault();
      try {
        const { token } = await api.invite(role.value, DAYS);
        this.showLink(`${location.origin}${location.pathname}#/invitation/${encodeURIComponent(token)}`);
        await this.listInvitations();
      } catch (error) {
        toast(error.message);
      }
    };
    this.link = h("p", { class: "row link", hidden: true });
    const form = h(
      "form",
      { class: "row", onsubmit: make },
      h("label", { for: "invite-role" }, t("invite.role")),
      role,
      h("button", { class: "button primary" }, t("invite.do")),
    );
    return this.section("invite.title", [form, this.link, this.invited], t("invite.hint", { days: DAYS }));
  }

  showLink(link) {
    this.link.hidden = false;
    this.link.replaceChildren(
      h("code", { id: "invitation-link" }, link),
      copyButton(() => link, t("invite.copy")),
    );
  }

  async listInvitations() {
    const { invitations } = await api.invitations();
    const revoke = async (id) => {
      try {
        await api.revoke(id);
        await this.listInvitations();
      } catch (error) {
        toast(error.message);
      }
    };
    const rows = invitations.map(({ id, role, expires, used }) => [
      t(`role.${role}`),
      used ? t("invite.used", { name: used }) : t("invite.until", { time: moment(expires) }),
      used
        ? ""
        : h("button", { type: "button", class: "button small", onclick: () => revoke(id) }, t("invite.revoke")),
    ]);
    const columns = ["role", "state", "action"].map((name) => ({ name: t(`column.${name}`) }));
    this.invited.replaceChildren(...(rows.length ? [table(t("invite.list"), columns, rows)] : []));
  }

  files() {
    const input = h("input", { type: "file", id: "import-file" });
    const report = h("p", { class: "note", role: "status" });
    const send = async () => {
      if (!input.files.length) return;
      report.textContent = t("import.running");
      try {
        report.textContent = t("import.done", await api.upload(input.files[0]));
      } catch (error) {
        report.textContent = error.message;
      }
      input.value = "";
    };
    input.addEventListener("change", send);
    const link = (name) =>
      h("li", {}, h("a", { href: `api/export/${name}`, download: `${name}.jsonl` }, t(`export.${name}`)));
    return [
      this.section("export.title", h("ul", { class: "plain-list" }, EXPORTS.map(link)), t("export.hint")),
      this.section(
        "import.title",
        [h("label", { for: "import-file" }, t("import.file")), input, report],
        t("import.hint"),
      ),
    ];
  }
}
