/** What reviewers see: tasks, most disputed first, and the answers that people gave to one. */

import * as api from "./api.js";
import { show } from "./dialog.js";
import { at, button, h, toast } from "./dom.js";
import { letterOf, markdown, promptNodes } from "./parts.js";
import { duration, few, moment, percent, t } from "./texts.js";

const LIMIT = 50; // tasks on a page
const ORDERS = ["disagreement", "flags", "answers", "number"];

export class ReviewView {
  constructor(site) {
    Object.assign(this, { site, order: ORDERS[0], offset: 0, text: "" });
  }

  close() {
    this.closed = true;
  }

  async open(item = null) {
    const page = item ? await this.task(item) : await this.list();
    if (this.closed) return;
    at("main").replaceChildren(page);
    at("main").focus();
  }

  /** Change the list and show it. */
  go(changes) {
    Object.assign(this, changes);
    this.open().catch((error) => toast(error.message));
  }

  async list() {
    const { order, offset, text } = this;
    const { tasks, total } = await api.tasks({ order, offset, limit: LIMIT, text });
    const option = (value) =>
      h("option", { value, selected: value === order }, t(`order.by.${value}`));
    const onchange = (event) => this.go({ order: event.target.value, offset: 0 });
    const find = (event) => {
      event.preventDefault();
      this.go({ text: search.value.trim(), offset: 0 });
    };
    const search = h("input", { type: "search", value: text, "aria-label": t("review.search") });
    search.placeholder = t("review.search");
    const step = (name, to, possible) =>
      button(t(name), () => this.go({ offset: to }), "small", { disabled: !possible });
    return h(
      "div",
      { class: "page" },
      h("h1", {}, t("nav.review")),
      h(
        "div",
        { class: "row" },
        h("form", { role: "search", onsubmit: find }, search),
        h("select", { "aria-label": t("review.order"), onchange }, ORDERS.map(option)),
        h("span", { class: "hint" }, t("review.count", { n: total })),
      ),
      h("ol", { class: "entries" }, tasks.map((task) => this.entry(task))),
      h(
        "div",
        { class: "row" },
        step("previous", offset - LIMIT, offset > 0),
        step("next", offset + LIMIT, offset + tasks.length < total),
      ),
    );
  }

  entry({ id, preview, answers, wanted, agreement, flags, gold }) {
    const facts = [t("review.answers", { answers, wanted })];
    if (agreement !== null) facts.push(t("review.agreement", { value: percent(agreement) }));
    if (flags) facts.push(t("review.flagged", { n: flags }));
    if (gold) facts.push(t("gold"));
    return h(
      "li",
      {},
      h("a", { class: "preview", href: `#/review/${encodeURIComponent(id)}` }, preview),
      h("span", { class: "hint" }, facts.join(" · ")),
    );
  }

  async task(id) {
    const task = await api.task(id);
    const response = ({ index, text, model }) => {
      const letter = letterOf(index);
      const head = h("header", {}, h("span", { class: "letter" }, letter), model);
      const props = { class: "card", "aria-label": t("card.name", { letter }) };
      return h("article", props, head, markdown(text));
    };
    return h(
      "div",
      { class: "page wide" },
      h("p", {}, h("a", { href: "#/review" }, t("review.back"))),
      h("h1", {}, t("review.task", { id: task.id })),
      task.gold && h("p", { class: "hint" }, t("review.gold", { order: orderText(task.gold) })),
      h("section", { class: "prompt" }, promptNodes(task.prompt)),
      h("h2", {}, t("answers", { n: task.answers.length })),
      task.answers.map((answer) => this.answer(task, answer)),
      h("h2", {}, t("review.responses")),
      h("div", { class: "cards" }, task.responses.map(response)),
    );
  }

  answer(task, { id, name, ranks, verdict, seconds, at: time, ...answer }) {
    const { comment, demonstration } = answer;
    const judge = (accepted) => this.judge(task.id, id, accepted);
    const choose = (key, accepted) => {
      const pressed = { "aria-pressed": String(verdict?.accepted === accepted) };
      return button(t(key), () => judge(accepted), "small", pressed);
    };
    const right = ranks.map((tier) => tier.map(Number));
    const gold = () => this.act(task.id, api.settings(task.id, { gold: right }));
    return h(
      "section",
      { class: "answer", "aria-label": name },
      h(
        "div",
        { class: "row between" },
        h("strong", {}, name),
        h("span", { class: "hint" }, time && `${moment(time)} · `, duration(seconds)),
      ),
      h("p", { class: "ranks" }, orderText(ranks)),
      this.marks(answer).map((line) => h("p", { class: "note" }, line)),
      comment && h("p", { class: "plain" }, comment),
      demonstration && [
        h("p", { class: "eyebrow" }, t("review.demonstration")),
        h("div", { class: "prompt" }, markdown(demonstration.text)),
      ],
      verdict?.comment && h("p", { class: "wrong" }, verdict.comment),
      h(
        "div",
        { class: "row" },
        choose("review.accept", true),
        choose("review.return", false),
        this.site.me.role === "owner" && button(t("review.makeGold"), gold, "small"),
      ),
    );
  }

  /** Scores and flags in words. */
  marks({ scores, flags, none_good: none }) {
    const { criteria, flags: kinds } = this.site.project;
    const nameOf = (all, id) => all.find((one) => one.id === id)?.name || id;
    const lines = [none ? t("rank.noneGood") : null];
    for (const [slot, all] of Object.entries(scores ?? {})) {
      const said = Object.entries(all).map(([id, n]) => `${nameOf(criteria, id)} ${few(n, 0)}`);
      if (said.length) lines.push(`${letterOf(Number(slot))}: ${said.join(", ")}`);
    }
    for (const [slot, all] of Object.entries(flags ?? {}))
      if (all.length)
        lines.push(`${letterOf(Number(slot))}: ${all.map((id) => nameOf(kinds, id)).join(", ")}`);
    return lines.filter(Boolean);
  }

  judge(task, answer, accepted) {
    if (accepted) return this.act(task, api.judge(task, answer, true, ""));
    const why = h("textarea", { id: "why", rows: "4" });
    const onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      this.act(task, api.judge(task, answer, false, why.value.trim()), t("review.gone"));
    };
    const go = h("p", {}, h("button", { class: "button primary" }, t("review.return")));
    const label = h("label", { for: "why" }, t("review.why"));
    const form = h("form", { class: "field", onsubmit }, label, why, go);
    const dialog = show(t("review.return"), "narrow", form);
  }

  /** Show the task again when a change is done. */
  async act(task, done, said = "") {
    try {
      await done;
      if (said) toast(said);
      await this.open(task);
    } catch (error) {
      toast(error.message);
    }
  }
}

/** Tiers of response numbers as letters: A = C > B. */
const orderText = (ranks) =>
  ranks.map((tier) => tier.map((slot) => letterOf(Number(slot))).join(" = ")).join("  >  ");
