/** The page on which a person ranks the responses to one instruction. */

import * as api from "./api.js";
import { Card } from "./card.js";
import { show } from "./dialog.js";
import { announce, at, button, h, iconButton, toast } from "./dom.js";
import { keyNodes, keyOf } from "./keys.js";
import { Ladder } from "./ladder.js";
import { inserted, missing, placed, stepped, tiers } from "./order.js";
import { letterOf, markdown, message, promptNodes } from "./parts.js";
import { t } from "./texts.js";
import { Work } from "./work.js";

const SAVE = 800; // milliseconds after the last change until the draft goes to the server
const LOOK_AGAIN = 15; // seconds until an empty queue is asked again

export class RankView {
  /** site: {project, outbox, draw(), reopen(task), saved(text)}. */
  constructor(site) {
    Object.assign(this, { site, project: site.project, task: null, timer: 0, closed: false });
    const current = (act) => () => act(this.work.current);
    this.actions = {
      next: () => this.step(1),
      previous: () => this.step(-1),
      up: current((slot) => this.move(slot, -1)),
      down: current((slot) => this.move(slot, 1)),
      clear: current((slot) => this.place(slot, null)),
      place: (n) => this.placeByKey(n),
      scores: () => this.focus(".scores input"),
      flags: () => this.focus(".flags input"),
      write: current((slot) => this.write(slot)),
      none: () => this.change({ none_good: !this.work.none_good }),
      comment: () => at("comment").focus(),
      guidelines: () => this.guidelines(),
      undo: () => this.back("undo"),
      redo: () => this.back("redo"),
      skip: () => this.skip(),
      submit: () => this.submit(),
    };
  }

  keys = () => (this.task ? this.actions : {});

  /** Send what waits, then show the next task. */
  async open() {
    this.leave();
    await this.site.outbox.flush();
    if (this.closed) return;
    if (this.site.outbox.waiting().length)
      return this.site.outbox.ended ? this.site.leave() : this.wait();
    const found = await api.next();
    if (this.closed) return;
    if (found.task) this.start(found.task, found);
    else this.empty(found);
  }

  close() {
    this.closed = true;
    this.leave();
  }

  leave() {
    clearTimeout(this.timer);
    if (!this.task) return;
    if (this.saving) this.save();
    this.work.clock.stop();
    this.task = null;
  }

  /** The outbox has tried to send. */
  settled() {
    if (this.waiting && !this.site.outbox.waiting().length) this.site.draw();
  }

  /** Show a task. done, left: how many this person has answered, and how many are left. */
  start(task, { done, left } = {}) {
    this.leave();
    Object.assign(this, { task, waiting: false });
    const slots = task.responses.map(({ slot }) => slot);
    const rows = Math.min(this.project.best ?? slots.length, slots.length);
    this.work = new Work(slots, this.site.outbox.get("draft", task.id), task.draft);
    this.letters = Object.fromEntries(slots.map((slot, n) => [slot, letterOf(n)]));
    this.cards = task.responses.map((one) => new Card(one, rows, this));
    this.ladder = new Ladder(slots, rows, this);
    const head = h("div", { class: "row between" }, h("h1", {}, t("rank.title")));
    const progress = done === undefined ? "" : t("rank.progress", { done, left });
    head.append(h("span", { class: "hint" }, progress));
    const columns = h("div", { class: "rank" }, this.main(head, !done), this.side());
    at("main").replaceChildren(columns, this.foot());
    this.paint();
    scrollTo(0, 0);
    at("main").focus({ preventScroll: true });
    announce(t("rank.new", { n: slots.length }));
  }

  main(head, first) {
    const { prompt, comment } = this.task;
    const steps = ["place", "tie", "keys"].map((name) => h("li", {}, t(`intro.${name}`)));
    const part = (kind, key, inside) => h("section", { class: kind, "aria-label": t(key) }, inside);
    return h(
      "div",
      { class: "work" },
      head,
      comment && h("p", { class: "returned" }, t("rank.returned", { comment })),
      first && part("intro", "intro.title", h("ol", {}, steps)),
      part("prompt", "rank.instruction", promptNodes(prompt)),
      h("div", { class: "cards" }, this.cards.map(({ element }) => element)),
    );
  }

  side() {
    const { best, ties, guidelines } = this.project;
    const few = best && best < this.work.slots.length;
    const rule = [t("order.hint"), few ? t("order.best", { best }) : ""];
    rule.push(t(ties ? "order.tiesAllowed" : "order.noTies"));
    const oninput = (event) => this.change({ comment: event.target.value }, "comment");
    const mark = () => this.change({ none_good: this.none.checked });
    this.none = h("input", { type: "checkbox", id: "none-good", onchange: mark });
    this.comment = h("textarea", { id: "comment", rows: "3", oninput });
    return h(
      "aside",
      { class: "side", "aria-label": t("order.title") },
      h("h2", {}, t("order.title")),
      h("p", { class: "hint" }, rule.join(" ")),
      this.ladder.element,
      h("label", { class: "check" }, this.none, t("rank.noneGood")),
      h("div", { class: "field" }, h("label", { for: "comment" }, t("rank.comment")), this.comment),
      guidelines &&
        h(
          "details",
          { class: "guidelines", open: innerWidth > 900 },
          h("summary", {}, t("guidelines")),
          markdown(guidelines),
        ),
    );
  }

  foot() {
    const act = (name, kind = "") => {
      const key = h("span", { class: "key", "aria-hidden": "true" }, keyNodes(keyOf(name)));
      const node = button(t(`rank.${name}`), this.actions[name], kind, { id: name });
      node.append(key);
      return node;
    };
    this.state = h("p", { class: "hint state", id: "state" });
    return h(
      "div",
      { class: "foot", role: "region", "aria-label": t("rank.actions") },
      act("undo"),
      iconButton("prompt", t("guidelines"), this.actions.guidelines, { id: "show-guidelines" }),
      this.state,
      act("skip"),
      act("submit", "primary"),
    );
  }

  paint() {
    const { work } = this;
    for (const card of this.cards) card.paint(work);
    this.ladder.paint(work.places);
    if (this.comment.value !== work.comment) this.comment.value = work.comment;
    this.none.checked = work.none_good;
    at("undo").disabled = !work.past.length;
    const reason = this.hindrance();
    this.state.textContent = reason ?? t("rank.ready");
    at("submit").setAttribute("aria-disabled", String(reason !== null));
  }

  /** What keeps the answer from being sent, in words, or null. */
  hindrance() {
    const { best, ties, demonstrations } = this.project;
    const { places, slots, demonstration } = this.work;
    const reason = missing(places, slots, best, ties);
    if (reason === "tied") return t("rank.tied");
    if (reason) return t("rank.unplaced", { n: this.ladder.rows - Object.keys(places).length });
    if (demonstrations === "required" && !demonstration) return t("rank.noDemonstration");
    return null;
  }

  /** Change the answer, and keep it: in this browser at once, at the server soon. */
  change(parts, field = null) {
    this.work.change(parts, field);
    this.keep();
  }

  keep() {
    this.site.outbox.put("draft", this.task.id, { ...this.work.state(), saved: false });
    this.saving ||= setTimeout(() => this.save(), SAVE);
    this.paint();
  }

  async save() {
    clearTimeout(this.saving);
    this.saving = 0;
    const { task, work, site } = this;
    const state = work.state();
    try {
      const { lease } = await api.saveDraft(task, work.answer(), work.clock.seconds());
      task.lease = lease;
      if (work.same(state) && site.outbox.get("draft", task.id))
        site.outbox.put("draft", task.id, { ...state, saved: true });
      site.saved(t("saved"));
    } catch (error) {
      site.saved(t("kept"));
      if (error.code === "already_answered" && this.task === task)
        toast(error.message, t("rank.another"), () => site.draw());
    }
  }

  place(slot, place) {
    this.change({ places: placed(this.work.places, slot, place) });
    this.say(slot);
  }

  /** Give the current response a place, and go to the next one without a place. */
  placeByKey(place) {
    const { slots, current } = this.work;
    if (place > this.ladder.rows) return;
    this.place(current, place);
    const n = slots.indexOf(current);
    const order = [...slots.slice(n + 1), ...slots.slice(0, n)];
    const free = order.find((slot) => !(slot in this.work.places));
    if (free) this.go(free);
  }

  drop(slot, { dataset: { place, before } }) {
    const { places, slots } = this.work;
    if (place !== undefined) return this.place(slot, place ? Number(place) : null);
    this.change({ places: inserted(places, slots, slot, Number(before)) });
    this.say(slot);
  }

  move(slot, step) {
    const { places, slots } = this.work;
    this.change({ places: stepped(places, slots, slot, step, this.project.ties) });
    this.say(slot);
  }

  /** Tell a screen reader where a response is now. */
  say(slot) {
    const { places, slots } = this.work;
    const [place, letter] = [places[slot], this.letters[slot]];
    if (!place) return announce(t("say.none", { letter }));
    const tied = tiers(places, slots).find((tier) => tier.includes(slot));
    const names = tied.filter((other) => other !== slot).map((other) => this.letters[other]);
    announce(t(names.length ? "say.tie" : "say.place", { letter, place, names: names.join(", ") }));
  }

  score(slot, id, n) {
    const { [id]: _, ...others } = this.work.scores[slot] ?? {};
    const mine = n === null ? others : { ...others, [id]: n };
    this.change({ scores: { ...this.work.scores, [slot]: mine } });
  }

  flag(slot, id, on) {
    const others = (this.work.flags[slot] ?? []).filter((flag) => flag !== id);
    this.change({ flags: { ...this.work.flags, [slot]: on ? [...others, id] : others } });
  }

  /** Begin a demonstration from a response; null ends it. */
  write(slot) {
    if (this.project.demonstrations === "off") return;
    if (!slot) return this.change({ demonstration: null });
    const { text } = this.task.responses.find((one) => one.slot === slot);
    if (this.work.demonstration?.from !== slot) this.edit(slot, text);
    at(`edit-${slot}`).focus();
  }

  edit = (from, text) => this.change({ demonstration: { from, text } }, `edit-${from}`);

  choose(slot) {
    if (this.work.current === slot) return;
    this.work.current = slot;
    for (const card of this.cards) card.paint(this.work);
  }

  go(slot) {
    const card = at(`card-${slot}`);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }

  step(by) {
    const { slots, current } = this.work;
    const next = slots[slots.indexOf(current) + by];
    if (next) this.go(next);
  }

  focus(selector) {
    at(`card-${this.work.current}`).querySelector(selector)?.focus();
  }

  guidelines() {
    show(t("guidelines"), "", markdown(this.project.guidelines || t("guidelines.none")));
  }

  back(way) {
    if (!this.work[way]()) return;
    this.keep();
    announce(t(`say.${way}`));
  }

  submit() {
    const reason = this.hindrance();
    return reason ? toast(reason) : this.send("answer", { answer: this.work.answer() });
  }

  skip() {
    const reason = h("input", { id: "skip-reason", autocomplete: "off" });
    const onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      this.send("skip", { reason: reason.value.trim() });
    };
    const label = h("label", { for: "skip-reason" }, t("skip.reason"));
    const go = h("p", {}, h("button", { class: "button primary" }, t("skip.do")));
    const form = h("form", { class: "field", onsubmit }, label, reason, go);
    const dialog = show(t("skip.title"), "narrow", h("p", {}, t("skip.hint")), form);
  }

  async send(kind, body) {
    if (this.sending) return;
    clearTimeout(this.saving);
    Object.assign(this, { sending: true, saving: 0 });
    const { task, work, site } = this;
    const entry = api.entry(kind, task, { ...body, seconds: work.clock.seconds() });
    const sent = await site.outbox.add(entry).finally(() => (this.sending = false));
    if (sent) toast(this.said(kind, sent), t("rank.undo"), () => site.reopen(task.id));
    if (!this.closed) await site.draw();
  }

  /** The server has an answer; the project may show which model each response was from. */
  said(kind, { models }) {
    const name = ([slot, model]) => `${this.letters[slot]}: ${model}`;
    return [t(`sent.${kind}`), ...Object.entries(models ?? {}).map(name)].join(" ");
  }

  /** Answers wait in this browser for the server. */
  wait() {
    this.waiting = true;
    const text = t("wait.text", { n: this.site.outbox.waiting().length });
    const again = button(t("wait.again"), this.site.outbox.wake, "primary");
    message(t("wait.title"), h("p", {}, text), again);
  }

  empty({ done = 0, reason, wait }) {
    const text = t(reason === "none_left" ? "empty.done" : "empty.busy", { done });
    const again = button(t("empty.again"), () => this.site.draw(), "primary");
    message(t("empty.title"), h("p", {}, text), again);
    this.timer = setTimeout(() => this.site.draw(), 1000 * (wait ?? LOOK_AGAIN));
  }
}
