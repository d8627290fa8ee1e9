/** One response: its text, its place, its scores and flags, and the demonstration made of it. */

import { h } from "./dom.js";
import { draggable } from "./drag.js";
import { Markdown } from "./markdown.js";
import { t } from "./texts.js";

/** Radio buttons in a row, as one control. A click on the chosen one takes the choice back. */
export function choice(name, legend, options, onchoose, props = {}) {
  const inputs = options.map(({ value, label, said }) => {
    const input = h("input", { type: "radio", name, value: String(value), "aria-label": said });
    input.addEventListener("click", () => onchoose(input.dataset.was === "true" ? null : value));
    return h("label", { class: "pill" }, input, h("span", { "aria-hidden": "true" }, label));
  });
  const element = h("fieldset", { class: "choice", ...props }, h("legend", {}, legend), inputs);
  const paint = (chosen) => {
    for (const input of element.querySelectorAll("input")) {
      input.checked = input.value === String(chosen);
      input.dataset.was = String(input.checked);
    }
  };
  return { element, paint };
}

const range = (low, high) => Array.from({ length: high - low + 1 }, (_, n) => low + n);

export class Card {
  /**
   * response: {slot, text}. letter: its name on the page. rows: how many places there are.
   * act: {place, score, flag, write, edit, drop, choose}, each called with the slot.
   */
  constructor({ slot, text }, letter, rows, project, act) {
    Object.assign(this, { slot, letter, project, act });
    const markdown = new Markdown();
    markdown.update(text);
    const handle = h("span", { class: "letter", title: t("order.drag"), "aria-hidden": "true" }, letter);
    draggable(handle, (target) => act.drop(slot, target));
    this.place = choice(
      `place-${slot}`,
      t("card.place"),
      range(1, rows).map((n) => ({ value: n, label: n, said: t("order.place", { place: n }) })),
      (place) => act.place(slot, place),
      { class: "choice places", "aria-label": t("card.placeOf", { letter }) },
    );
    this.element = h(
      "article",
      { class: "card", id: `card-${slot}`, tabindex: "-1", "aria-label": t("card.name", { letter }) },
      h("header", {}, handle, this.place.element),
      markdown.element,
      this.foot(),
    );
    this.element.addEventListener("focusin", () => act.choose(slot));
    this.element.addEventListener("pointerdown", () => act.choose(slot));
  }

  foot() {
    const { slot, letter, project, act } = this;
    this.scores = project.criteria.map(({ id, name, description, low, high }) => {
      const options = range(low, high).map((n) => ({ value: n, label: n, said: `${name}: ${n}` }));
      const props = { "aria-label": `${letter}: ${name}`, title: description };
      const row = choice(`${id}-${slot}`, name, options, (n) => act.score(slot, id, n), props);
      return { id, ...row };
    });
    this.flags = project.flags.map(({ id, name }) => {
      const onchange = () => act.flag(slot, id, input.checked);
      const input = h("input", { type: "checkbox", onchange });
      return { id, input, element: h("label", { class: "check" }, input, name) };
    });
    const write = { type: "button", class: "button small", onclick: () => act.write(slot) };
    this.button = project.demonstrations !== "off" && h("button", write, t("card.write"));
    this.editor = h("div", { class: "editor", hidden: true });
    return h(
      "footer",
      {},
      this.scores.length > 0 && h("div", { class: "scores" }, this.scores.map((one) => one.element)),
      h("div", { class: "row flags" }, this.flags.map((one) => one.element), this.button),
      this.editor,
    );
  }

  /** Show a state. work: {places, scores, flags, demonstration, current}. */
  paint(work) {
    const { slot } = this;
    this.element.classList.toggle("current", work.current === slot);
    this.place.paint(work.places[slot] ?? null);
    for (const { id, paint } of this.scores) paint(work.scores[slot]?.[id] ?? null);
    for (const { id, input } of this.flags) input.checked = (work.flags[slot] ?? []).includes(id);
    const mine = work.demonstration?.from === slot;
    if (this.button) this.button.hidden = mine;
    this.editor.hidden = !mine;
    if (!mine) this.editor.replaceChildren();
    else this.paintEditor(work.demonstration.text);
  }

  paintEditor(text) {
    const { slot, letter, act } = this;
    let area = this.editor.querySelector("textarea");
    if (!area) {
      const oninput = () => act.edit(slot, area.value);
      area = h("textarea", { id: `edit-${slot}`, rows: "10", oninput, spellcheck: "true" });
      const drop = { type: "button", class: "button small", onclick: () => act.write(null) };
      this.editor.replaceChildren(
        h("label", { for: `edit-${slot}` }, t("card.demonstration", { letter })),
        h("p", { class: "hint" }, t("card.demonstrationHint")),
        area,
        h("button", drop, t("card.drop")),
      );
    }
    if (area.value !== text) area.value = text;
  }
}
