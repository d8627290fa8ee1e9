/** The order so far as a list of places, whose entries are dragged or moved by arrow keys. */

import { at, h } from "./dom.js";
import { draggable } from "./drag.js";
import { t } from "./texts.js";

/** slots: [{slot, letter}]. act: {drop(slot, element), step(slot, ±1), go(slot)}. */
export class Ladder {
  constructor(slots, rows, act) {
    Object.assign(this, { slots, rows, act });
    this.element = h("ol", { class: "ladder", "aria-label": t("order.title") });
  }

  paint(places) {
    const focused = document.activeElement?.id;
    const rows = Array.from({ length: this.rows }, (_, n) => n + 1);
    const inside = (place) => this.slots.filter(({ slot }) => (places[slot] ?? 0) === place);
    const nodes = rows.flatMap((place) => [
      this.gap(place),
      this.row(place, t("order.place", { place }), inside(place)),
    ]);
    const free = inside(0);
    nodes.push(this.gap(this.rows + 1), this.row("", t("order.none"), free));
    this.element.replaceChildren(...nodes);
    if (focused?.startsWith("chip-")) at(focused)?.focus();
  }

  gap(before) {
    return h("li", { class: "gap", "data-before": String(before), "aria-hidden": "true" });
  }

  row(place, name, inside) {
    const chips = inside.map((one) => this.chip(one, name));
    const label = h("span", { class: "label" }, place === "" ? name : String(place));
    return h(
      "li",
      { class: place === "" ? "free" : "place", "data-place": String(place) },
      label,
      h("span", { class: "chips" }, chips),
      chips.length > 1 && place !== "" && h("span", { class: "hint" }, t("order.tie")),
    );
  }

  chip({ slot, letter }, name) {
    const move = (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step || event.shiftKey) return;
      event.preventDefault();
      this.act.step(slot, step);
    };
    const props = {
      type: "button",
      class: "chip letter",
      id: `chip-${slot}`,
      "aria-label": t("order.chip", { letter, place: name }),
      title: t("order.drag"),
      onclick: () => this.act.go(slot),
      onkeydown: move,
    };
    const node = h("button", props, letter);
    draggable(node, (target) => this.act.drop(slot, target));
    return node;
  }
}
