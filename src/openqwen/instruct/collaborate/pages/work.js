/** A person's work on one task: the answer so far, undo and redo, the draft, and the time taken. */

import { finished } from "./order.js";

const IDLE = 60_000; // milliseconds without a key or a movement that do not count as work
const PARTS = ["places", "scores", "flags", "comment", "demonstration"];
const EMPTY = { places: {}, scores: {}, flags: {}, comment: "", demonstration: null };

export class Work {
  /** slots: of the responses as shown. drafts: the server's and this browser's, or null. */
  constructor(slots, ...drafts) {
    const newest = drafts.filter(Boolean).sort((a, b) => (b.revision ?? 0) - (a.revision ?? 0))[0];
    Object.assign(this, structuredClone(EMPTY), { slots, current: slots[0], revision: 0 });
    Object.assign(this, structuredClone(newest ?? {}));
    this.places = this.known(this.places);
    this.past = [];
    this.future = [];
    this.last = null;
    this.clock = new Clock();
  }

  /** Entries of the slots of this task. */
  known(entries) {
    return Object.fromEntries(Object.entries(entries).filter(([slot]) => this.slots.includes(slot)));
  }

  state = () => Object.fromEntries(PARTS.map((name) => [name, this[name]]));

  draft = () => ({ ...this.state(), revision: this.revision });

  /** Change parts of the answer. field: a text field, whose letters are one step of undo. */
  change(parts, field = null) {
    if (!field || field !== this.last) {
      this.past.push(this.state());
      this.future = [];
    }
    this.last = field;
    this.revision += 1;
    Object.assign(this, parts);
  }

  undo = () => this.swap(this.past, this.future);
  redo = () => this.swap(this.future, this.past);

  swap(from, to) {
    if (!from.length) return false;
    to.push(this.state());
    Object.assign(this, from.pop(), { last: null, revision: this.revision + 1 });
    return true;
  }

  /** The answer in the form that the server takes. */
  answer() {
    const { places, slots, scores, flags, comment, demonstration } = this;
    return { ranks: finished(places, slots), scores, flags, comment, demonstration };
  }
}

/** Seconds in which the page was looked at and used. */
class Clock {
  constructor() {
    Object.assign(this, { total: 0, from: performance.now(), seen: performance.now() });
    this.touch = () => this.tick();
    for (const name of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"])
      addEventListener(name, this.touch, { passive: true });
    document.addEventListener("visibilitychange", this.touch);
  }

  tick() {
    const now = performance.now();
    this.total += Math.min(now - this.seen, this.hidden ? 0 : IDLE);
    this.seen = now;
    this.hidden = document.hidden;
  }

  seconds() {
    this.tick();
    return Math.round(this.total / 100) / 10;
  }

  stop() {
    for (const name of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"])
      removeEventListener(name, this.touch);
    document.removeEventListener("visibilitychange", this.touch);
  }
}
