/** One response: its text, its place, its scores and flags, and the demonstration made of it. */

import { button, h } from "./dom.js";
import { draggable } from "./drag.js";
import { markdown } from "./parts.js";
import { t } from "./texts.js";

/** Numbers to choose from, as radio buttons. A click on the chosen one takes the choice back. */
function choice(name, legend, said, [low, high], onchoose, props = {}) {
  const one = (value) => {
    const given = { type: "radio", name, value, "aria-label": said(value) };
    const onclick = () => onchoose(chosen === value ? null : value);
    const face = h("span", { "aria-hidden": "true" }, String(value));
    return h("label", { class: "pill" }, h("input", { ...given, onclick }), face);
  };
  let chosen = null;
  const values = Array.from({ length: high - low + 1 }, (_, n) => low + n);
  const label = h("legend", {}, legend);
  const element = h("fieldset", { class: "choice", ...props }, label, values.map(one));
  const paint = (value) => {
    chosen = value ?? null;
    for (const input of element.querySelectorAll("input"))
      input.checked = input.value === String(chosen);
  };
  return { element, paint };
}

export class Card {
  /**
   * response: {slot, text}. rows: how many places there are.
   * act: {project, letters, place, score, flag, write, edit, drop, choose}, the view.
   */
  constructor({ slot, text }, rows, act) {
    Object.assign(this, { slot, act, letter: act.letters[slot] });
    const { letter } = this;
    const said = (place) => t("order.place", { place });
    const name = { "aria-label": t("card.placeOf", { letter }) };
    const choose = (n) => act.place(slot, n);
    this.place = choice(`place-${slot}`, t("card.place"), said, [1, rows], choose, name);
    const props = { class: "letter", title: t("order.drag"), "aria-hidden": "true" };
    const handle = h("span", props, letter);
    draggable(handle, (target) => act.drop(slot, target));
    this.element = h(
      "article",
      {
        class: "card",
        id: `card-${slot}`,
        tabindex: "-1",
        "aria-label": t("card.name", { letter }),
        onfocusin: () => act.choose(slot),
        onpointerdown: () => act.choose(slot),
      },
      h("header", {}, handle, this.place.element),
      markdown(text),
      this.foot(act.project),
    );
  }

  foot({ criteria, flags, demonstrations }) {
    const { slot, letter, act } = this;
    this.scores = criteria.map(({ id, name, description, low, high }) => {
      const shown = name || id;
      const props = { "aria-label": `${letter}: ${shown}`, title: description };
      const choose = (n) => act.score(slot, id, n);
      const said = (n) => `${shown}: ${n}`;
      return { id, ...choice(`${id}-${slot}`, shown, said, [low, high], choose, props) };
    });
    this.flags = flags.map(({ id, name }) => {
      const onchange = () => act.flag(slot, id, input.checked);
      const input = h("input", { type: "checkbox", onchange });
      return { id, input, element: h("label", { class: "check" }, input, name || id) };
    });
    this.writer = button(t("card.write"), () => act.write(slot), "small");
    this.editor = h("div", { class: "editor" });
    const all = (rows) => rows.map(({ element }) => element);
    return h(
      "footer",
      {},
      criteria.length > 0 && h("div", { class: "scores" }, all(this.scores)),
      h("div", { class: "row flags" }, all(this.flags), demonstrations !== "off" && this.writer),
      this.editor,
    );
  }

  /** Show a state. work: {places, scores, flags, demonstration, current}. */
  paint(work) {
    const { slot } = this;
    this.element.classList.toggle("current", work.current === slot);
    this.place.paint(work.places[slot]);
    for (const { id, paint } of this.scores) paint(work.scores[slot]?.[id]);
    for (const { id, input } of this.flags) input.checked = (work.flags[slot] ?? []).includes(id);
    const mine = work.demonstration?.from === slot;
    this.writer.hidden = mine;
    this.editor.hidden = !mine;
    if (mine) this.paintEditor(work.demonstration.text);
    else this.editor.replaceChildren();
  }

  paintEditor(text) {
    const { slot, letter, act } = this;
    if (!this.editor.childElementCount) {
      const oninput = () => act.edit(slot, this.area.value);
      this.area = h("textarea", { id: `edit-${slot}`, rows: "10", oninput });
      this.editor.replaceChildren(
        h("label", { for: `edit-${slot}` }, t("card.demonstration", { letter })),
        h("p", { class: "hint" }, t("card.demonstrationHint")),
        this.area,
        button(t("card.drop"), () => act.write(null), "small"),
      );
    }
    if (this.area.value !== text) this.area.value = text;
  }
}
