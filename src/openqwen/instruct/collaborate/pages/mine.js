/** A person's own last answers, to look at and to open again. */

import * as api from "./api.js";
import { at, button, h } from "./dom.js";
import { moment, t } from "./texts.js";

export class MineView {
  constructor(site) {
    this.site = site;
  }

  close() {
    this.closed = true;
  }

  async open() {
    const { answers } = await api.mine();
    if (this.closed) return;
    const list = h("ol", { class: "entries" }, answers.map((one) => this.entry(one)));
    const hint = h("p", { class: "hint" }, t(answers.length ? "mine.hint" : "mine.none"));
    const title = h("h1", {}, t("nav.mine"));
    at("main").replaceChildren(h("div", { class: "page" }, title, hint, list));
    at("main").focus();
  }

  entry({ task, preview, status, at: time, verdict }) {
    const again = button(t("mine.open"), () => this.site.reopen(task), "small");
    again.append(h("span", { class: "offscreen" }, `: ${preview}`));
    const facts = [t(`mine.${status}`), moment(time)];
    if (verdict) facts.push(t(verdict.accepted ? "review.accepted" : "review.returned"));
    return h(
      "li",
      {},
      h("span", { class: "preview" }, preview),
      h("span", { class: "hint" }, facts.join(" · ")),
      verdict?.comment && h("span", { class: "wrong" }, verdict.comment),
      again,
    );
  }
}
