/** The order so far as a list of places, whose entries are dragged or moved by arrow keys. */

import { at, h } from "./dom.js";
import { draggable } from "./drag.js";
import { t } from "./texts.js";

export class Ladder {
  /** rows: how many places there are. act: {letters, drop, move, go}, the view. */
  constructor(slots, rows, act) {
    Object.assign(this, { slots, rows, act });
    this.element = h("ol", { class: "ladder", "aria-label": t("order.title") });
  }

  paint(places) {
    const focused = document.activeElement?.id;
    const nodes = [];
    for (let place = 1; place <= this.rows; place += 1)
      nodes.push(gap(place), this.row(place, t("order.place", { place }), places));
    nodes.push(gap(this.rows + 1), this.row(null, t("order.none"), places));
    this.element.replaceChildren(...nodes);
    if (focused?.startsWith("chip-")) at(focused)?.focus();
  }

  row(place, name, places) {
    const inside = this.slots.filter((slot) => (places[slot] ?? null) === place);
    return h(
      "li",
      { class: place ? "place" : "free", "data-place": String(place ?? "") },
      h("span", { class: "label" }, String(place ?? name)),
      h("span", { class: "chips" }, inside.map((slot) => this.chip(slot, name))),
      place && inside.length > 1 && h("span", { class: "hint" }, t("order.tie")),
    );
  }

  chip(slot, place) {
    const { act } = this;
    const letter = act.letters[slot];
    const onkeydown = (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step || event.shiftKey) return;
      event.preventDefault();
      act.move(slot, step);
    };
    const said = { "aria-label": t("order.chip", { letter, place }), title: t("order.drag") };
    const props = { type: "button", class: "chip letter", id: `chip-${slot}`, ...said };
    const node = h("button", { ...props, onclick: () => act.go(slot), onkeydown }, letter);
    draggable(node, (target) => act.drop(slot, target));
    return node;
  }
}

const gap = (before) =>
  h("li", { class: "gap", "data-before": String(before), "aria-hidden": "true" });
