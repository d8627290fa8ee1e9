/** A person's work on one task: the answer so far, undo and redo, the draft, and the time taken. */

import { placesOf, tiers } from "./order.js";

const IDLE = 60_000; // milliseconds without a key or a movement that do not count as work
const USED = ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"];
const EMPTY = {
  places: {},
  none_good: false,
  scores: {},
  flags: {},
  comment: "",
  demonstration: null,
};

export class Work {
  /** slots: of the responses as shown. kept: this browser's draft; draft: the server's; or null. */
  constructor(slots, kept, draft) {
    const given = draft && { ...draft.answer, places: placesOf(draft.answer.ranks ?? []) };
    // What the server has acknowledged may have been continued in another browser.
    const order = (one) => JSON.stringify(one && tiers(one.places, slots));
    const places = order(kept) === order(given) ? kept?.places : given?.places;
    const chosen = kept && (!kept.saved || !given) ? kept : { ...given, places };
    const parts = Object.keys(EMPTY).map((name) => [name, chosen[name] ?? EMPTY[name]]);
    Object.assign(this, structuredClone(Object.fromEntries(parts)));
    Object.assign(this, { slots, current: slots[0], past: [], future: [], last: null });
    this.clock = new Clock(draft?.seconds ?? 0);
  }

  state = () => Object.fromEntries(Object.keys(EMPTY).map((name) => [name, this[name]]));

  /** Whether nothing has changed since a state. */
  same = (state) => JSON.stringify(state) === JSON.stringify(this.state());

  /** Change parts of the answer. field: a text field, whose letters are one step of undo. */
  change(parts, field = null) {
    if (!field || field !== this.last) {
      this.past.push(this.state());
      this.future = [];
    }
    Object.assign(this, parts, { last: field });
  }

  undo = () => this.swap(this.past, this.future);
  redo = () => this.swap(this.future, this.past);

  swap(from, to) {
    if (!from.length) return false;
    to.push(this.state());
    Object.assign(this, from.pop(), { last: null });
    return true;
  }

  /** The answer in the form that the server takes; complete or not. */
  answer() {
    const { places, ...others } = this.state();
    return { ranks: tiers(places, this.slots), ...others };
  }
}

/** Seconds in which the page was looked at and used. */
class Clock {
  constructor(seconds) {
    this.total = 1000 * seconds;
    Object.assign(this, { seen: performance.now(), hidden: document.hidden });
    this.touch = () => this.tick();
    for (const name of USED) addEventListener(name, this.touch, { passive: true });
    document.addEventListener("visibilitychange", this.touch);
  }

  tick() {
    const now = performance.now();
    this.total += this.hidden ? 0 : Math.min(now - this.seen, IDLE);
    Object.assign(this, { seen: now, hidden: document.hidden });
  }

  seconds() {
    this.tick();
    return Math.round(this.total / 100) / 10;
  }

  stop() {
    for (const name of USED) removeEventListener(name, this.touch);
    document.removeEventListener("visibilitychange", this.touch);
  }
}
