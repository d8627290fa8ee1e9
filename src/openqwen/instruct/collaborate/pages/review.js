/** What reviewers see: tasks, most disputed first, and the answers that people gave to one. */

import * as api from "./api.js";
import { at, h, toast } from "./dom.js";
import { letterOf, markdown, promptNodes } from "./rank.js";
import { duration, few, moment, number, percent, t } from "./texts.js";

const PAGE = 50;
const ORDERS = ["disagreement", "flags", "number"];

export class ReviewView {
  constructor(site) {
    Object.assign(this, { site, order: ORDERS[0], offset: 0 });
  }

  close() {}

  async open(item = null) {
    at("main").replaceChildren(...(item ? await this.task(item) : await this.list()));
    at("main").focus();
  }

  async list() {
    const { order, offset } = this;
    const { tasks, total } = await api.tasks({ order, offset, limit: PAGE });
    const go = (changes) => (Object.assign(this, changes), this.open());
    const option = (value) =>
      h("option", { value, selected: value === order }, t(`review.${value}`));
    const onchange = (event) => go({ order: event.target.value, offset: 0 });
    const step = (name, to, possible) => {
      const props = { type: "button", class: "button small", disabled: !possible };
      return h("button", { ...props, onclick: () => go({ offset: to }) }, t(name));
    };
    const entry = ({ id, preview, answers, agreement, flags, gold }) => {
      const facts = [t("answers", { n: answers })];
      if (agreement !== null) facts.push(t("review.agreement", { value: few(agreement) }));
      if (flags) facts.push(t("review.flagged", { n: flags }));
      if (gold) facts.push(t("gold"));
      return h(
        "li",
        {},
        h("a", { class: "preview", href: `#/review/${encodeURIComponent(id)}` }, preview),
        h("span", { class: "hint" }, facts.join(" · ")),
      );
    };
    return [
      h(
        "div",
        { class: "page" },
        h(
          "div",
          { class: "row between" },
          h("h1", {}, t("nav.review")),
          h("select", { "aria-label": t("review.order"), class: "order", onchange }, ORDERS.map(option)),
        ),
        h("p", { class: "hint" }, t("review.count", { n: total })),
        h("ol", { class: "entries", start: offset + 1 }, tasks.map(entry)),
        h(
          "div",
          { class: "row" },
          step("previous", offset - PAGE, offset > 0),
          step("next", offset + PAGE, offset + tasks.length < total),
        ),
      ),
    ];
  }

  async task(id) {
    const task = await api.task(id);
    const letters = Object.fromEntries(task.responses.map(({ id }, n) => [id, letterOf(n)]));
    const response = ({ id, text, model, strength }) =>
      h(
        "article",
        { class: "card", "aria-label": t("card.name", { letter: letters[id] }) },
        h(
          "header",
          {},
          h("span", { class: "letter" }, letters[id]),
          h("span", {}, model),
          strength && h("span", { class: "hint" }, strengthText(strength)),
        ),
        markdown(text),
      );
    return [
      h(
        "div",
        { class: "page wide" },
        h("p", {}, h("a", { href: "#/review" }, t("review.back"))),
        h("h1", {}, t("review.task", { id: task.id })),
        h("section", { class: "prompt" }, promptNodes(task.prompt)),
        h("h2", {}, t("answers", { n: task.answers.length })),
        task.answers.map((answer) => this.answer(task, answer, letters)),
        h("h2", {}, t("review.responses")),
        h("div", { class: "cards" }, task.responses.map(response)),
      ),
    ];
  }

  answer(task, answer, letters) {
    const { ranks, scores, flags, comment, demonstration, verdict } = answer;
    const name = (all) => all.map((slot) => letters[slot]).join(" = ");
    const marks = Object.entries(flags).flatMap(([slot, all]) =>
      all.map((flag) => `${letters[slot]}: ${this.nameOf("flags", flag)}`),
    );
    const numbers = Object.entries(scores).flatMap(([slot, all]) =>
      Object.entries(all).map(
        ([id, n]) => `${letters[slot]}: ${this.nameOf("criteria", id)} ${number.format(n)}`,
      ),
    );
    const judge = (accepted) => this.judge(task.id, answer, accepted);
    const button = (key, accepted) => {
      const props = { type: "button", class: "button small", onclick: () => judge(accepted) };
      return h("button", { ...props, "aria-pressed": String(verdict === accepted) }, t(key));
    };
    return h(
      "section",
      { class: "answer", "aria-label": answer.person },
      h(
        "div",
        { class: "row between" },
        h("strong", {}, answer.person),
        h("span", { class: "hint" }, `${moment(answer.time)} · ${duration(answer.seconds)}`),
      ),
      h("p", { class: "ranks" }, ranks.map(name).join("  >  ")),
      numbers.length > 0 && h("p", { class: "note" }, numbers.join(" · ")),
      marks.length > 0 && h("p", { class: "wrong" }, marks.join(" · ")),
      comment && h("p", { class: "plain" }, comment),
      demonstration && [
        h("p", { class: "eyebrow" }, t("card.demonstration", { letter: letters[demonstration.from] })),
        h("div", { class: "prompt" }, markdown(demonstration.text)),
      ],
      h("div", { class: "row" }, button("review.accept", true), button("review.return", false)),
    );
  }

  nameOf(kind, id) {
    return this.site.project[kind].find((one) => one.id === id)?.name ?? id;
  }

  async judge(task, answer, accepted) {
    try {
      await api.judge(task, answer.id, accepted);
      await this.open(task);
    } catch (error) {
      toast(error.message);
    }
  }
}

const strengthText = ({ value, low, high }) =>
  t("review.strength", { value: few(value), low: few(low), high: few(high) });
