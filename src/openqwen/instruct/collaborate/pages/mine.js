/** A person's own last answers, to look at and to open again. */

import * as api from "./api.js";
import { at, h } from "./dom.js";
import { duration, moment, t } from "./texts.js";

export class MineView {
  constructor(site) {
    this.site = site;
  }

  close() {}

  async open() {
    const { answers } = await api.mine();
    const entry = ({ task, preview, kind, time, seconds }) =>
      h(
        "li",
        {},
        h("span", { class: "preview" }, preview),
        h("span", { class: "hint" }, [t(`mine.${kind}`), moment(time), duration(seconds)].join(" · ")),
        h(
          "button",
          { type: "button", class: "button small", onclick: () => this.site.reopen(task) },
          t("mine.open"),
          h("span", { class: "offscreen" }, `: ${preview}`),
        ),
      );
    at("main").replaceChildren(
      h(
        "div",
        { class: "page" },
        h("h1", {}, t("nav.mine")),
        h("p", { class: "hint" }, t(answers.length ? "mine.hint" : "mine.none")),
        h("ol", { class: "entries" }, answers.map(entry)),
      ),
    );
    at("main").focus();
  }
}
