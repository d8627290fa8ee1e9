/** The page on which a person ranks the responses to one instruction. */

import * as api from "./api.js";
import { Card } from "./card.js";
import { show } from "./dialog.js";
import { announce, at, h, iconButton, toast } from "./dom.js";
import { Ladder } from "./ladder.js";
import { Markdown } from "./markdown.js";
import { inserted, missing, placed, stepped, tiers } from "./order.js";
import { keyNodes, keyOf, showKeys } from "./keys.js";
import { number, t } from "./texts.js";
import { Work } from "./work.js";

const SAVE = 800; // milliseconds after the last change until the draft goes to the server
const LOOK_AGAIN = 15_000; // milliseconds until an empty queue is asked again

export const letterOf = (n) => String.fromCharCode(65 + n);

/** A text as Markdown. */
export function markdown(text) {
  const shown = new Markdown();
  shown.update(text);
  return shown.element;
}

/** The messages of an instruction; roles are named where there are several. */
export function promptNodes(prompt) {
  return prompt.map(({ role, content }) =>
    h(
      "div",
      { class: `message ${role}` },
      prompt.length > 1 && h("p", { class: "eyebrow" }, t(`role.${role}`)),
      markdown(content),
    ),
  );
}

export class RankView {
  /** site: {project, outbox, me, draw(), saved(text)}. */
  constructor(site) {
    Object.assign(this, { site, task: null, timer: 0, closed: false });
    this.actions = {
      next: () => this.step(1),
      previous: () => this.step(-1),
      up: () => this.move(this.work.current, -1),
      down: () => this.move(this.work.current, 1),
      clear: () => this.place(this.work.current, null),
      place: (n) => this.placeByKey(n),
      scores: () => this.focus(".scores input"),
      flags: () => this.focus(".flags input"),
      write: () => this.write(this.work.current),
      comment: () => at("comment").focus(),
      guidelines: () => this.guidelines(),
      undo: () => this.back("undo"),
      redo: () => this.back("redo"),
      skip: () => this.skip(),
      submit: () => this.submit(),
    };
  }

  /** Show a task, or the next one. */
  async open(task = null) {
    clearTimeout(this.timer);
    this.leave();
    await this.site.outbox.flush();
    if (this.closed) return;
    if (this.site.outbox.waiting().length) return this.wait();
    const found = task ? { task } : await api.next();
    if (this.closed) return;
    if (!found.task) return this.empty(found);
    this.start(found);
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.leave();
  }

  leave() {
    if (!this.task) return;
    if (this.saving) this.save();
    this.work.clock.stop();
    this.task = null;
  }

  keys = () => (this.task ? this.actions : {});

  /** The last answers have been sent, or could not be. */
  settled() {
    if (this.waiting && !this.site.outbox.waiting().length) this.site.draw();
  }

  start({ task, done, left }) {
    this.waiting = false;
    this.task = task;
    const slots = task.responses.map(({ slot }) => slot);
    const { outbox, project } = this.site;
    this.work = new Work(slots, outbox.draft(task.id), task.draft);
    const letters = Object.fromEntries(slots.map((slot, n) => [slot, letterOf(n)]));
    const rows = Math.min(project.best ?? slots.length, slots.length);
    const act = {
      place: (slot, n) => this.place(slot, n),
      drop: (slot, target) => this.drop(slot, target),
      step: (slot, by) => this.move(slot, by),
      go: (slot) => this.go(slot),
      choose: (slot) => this.choose(slot),
      score: (slot, id, n) => this.score(slot, id, n),
      flag: (slot, id, on) => this.flag(slot, id, on),
      write: (slot) => this.write(slot),
      edit: (from, text) => this.change({ demonstration: { from, text } }, "demonstration"),
    };
    this.letters = letters;
    this.cards = task.responses.map(
      (response) => new Card(response, letters[response.slot], rows, project, act),
    );
    const named = slots.map((slot) => ({ slot, letter: letters[slot] }));
    this.ladder = new Ladder(named, rows, act);
    at("main").replaceChildren(...this.nodes(done, left));
    this.paint();
    at("main").scrollTop = 0;
    at("main").focus();
    announce(t("rank.new", { n: slots.length }));
  }

  nodes(done, left) {
    const { project } = this.site;
    const oninput = (event) => this.change({ comment: event.target.value }, "comment");
    this.comment = h("textarea", { id: "comment", rows: "3", oninput });
    const work = h(
      "div",
      { class: "rank" },
      h(
        "div",
        { class: "work" },
        h(
          "div",
          { class: "row between" },
          h("h1", {}, t("rank.title")),
          done !== undefined && h("span", { class: "hint" }, t("rank.progress", { done, left })),
        ),
        !done && this.intro(),
        h("section", { class: "prompt", "aria-label": t("rank.instruction") }, promptNodes(this.task.prompt)),
        h("div", { class: "cards" }, this.cards.map(({ element }) => element)),
      ),
      h(
        "aside",
        { class: "side", "aria-label": t("order.title") },
        h("h2", {}, t("order.title")),
        h("p", { class: "hint" }, this.rule()),
        this.ladder.element,
        h("div", { class: "field" }, h("label", { for: "comment" }, t("rank.comment")), this.comment),
        project.guidelines &&
          h(
            "details",
            { class: "guidelines", id: "guidelines", open: innerWidth > 900 },
            h("summary", {}, t("guidelines")),
            markdown(project.guidelines),
          ),
      ),
    );
    return [work, this.bar()];
  }

  intro() {
    const rows = ["place", "tie", "keys"].map((name) => h("li", {}, t(`intro.${name}`)));
    return h("section", { class: "intro", "aria-label": t("intro.title") }, h("ol", {}, rows));
  }

  rule() {
    const { best, ties } = this.site.project;
    const parts = [t("order.hint")];
    if (best && best < this.work.slots.length) parts.push(t("order.best", { best }));
    parts.push(t(ties ? "order.tiesAllowed" : "order.noTies"));
    return parts.join(" ");
  }

  bar() {
    const act = (name, kind, title) =>
      h(
        "button",
        { type: "button", class: kind, id: name, onclick: this.actions[name], title },
        t(`rank.${name}`),
        h("span", { class: "key", "aria-hidden": "true" }, keyNodes(keyOf(name))),
      );
    this.state = h("p", { class: "hint state", id: "state" });
    return h(
      "div",
      { class: "foot", role: "region", "aria-label": t("rank.actions") },
      act("undo", "button"),
      iconButton("prompt", t("guidelines"), this.actions.guidelines, { id: "show-guidelines" }),
      iconButton("keys", t("keys.title"), showKeys),
      this.state,
      act("skip", "button"),
      act("submit", "button primary"),
    );
  }

  paint() {
    const { work } = this;
    for (const card of this.cards) card.paint(work);
    this.ladder.paint(work.places);
    if (this.comment.value !== work.comment) this.comment.value = work.comment;
    at("undo").disabled = !work.past.length;
    this.state.textContent = this.hindrance() ?? t("rank.ready");
    at("submit").setAttribute("aria-disabled", String(this.hindrance() !== null));
  }

  /** What keeps the answer from being sent, in words, or null. */
  hindrance() {
    const { best, ties, demonstrations } = this.site.project;
    const { places, slots, demonstration } = this.work;
    const reason = missing(places, slots, best, ties);
    if (reason === "tied") return t("rank.tied");
    if (reason === "unplaced") {
      const wanted = Math.min(best ?? slots.length, slots.length);
      return t("rank.unplaced", { n: wanted - Object.keys(places).length });
    }
    if (demonstrations === "required" && !demonstration) return t("rank.noDemonstration");
    return null;
  }

  change(parts, field = null) {
    this.work.change(parts, field);
    this.keep();
    this.paint();
  }

  /** Keep the draft: in this browser at once, at the server soon. */
  keep() {
    this.site.outbox.keepDraft(this.task.id, this.work.draft());
    this.saving ||= setTimeout(() => this.save(), SAVE);
  }

  async save() {
    clearTimeout(this.saving);
    this.saving = 0;
    const { task, work } = this;
    try {
      await api.saveDraft(task, work.draft(), work.clock.seconds());
      this.site.saved(t("saved"));
    } catch (error) {
      this.site.saved(t("kept"));
      if (error.status === 409 && this.task === task) this.lost(error);
    }
  }

  /** Somebody else has the task now. */
  lost(error) {
    toast(error.message, t("rank.other"), () => this.open());
  }

  place(slot, place) {
    this.change({ places: placed(this.work.places, slot, place) });
    this.say(slot);
  }

  placeByKey(place) {
    const { work } = this;
    const slot = work.current;
    if (place > this.ladder.rows) return;
    this.place(slot, place);
    const at = work.slots.indexOf(slot);
    const order = [...work.slots.slice(at + 1), ...work.slots.slice(0, at)];
    const free = order.find((other) => !(other in work.places));
    if (free) this.choose(free, true);
  }

  drop(slot, target) {
    const { place, before } = target.dataset;
    const { places, slots } = this.work;
    if (place === undefined)
      this.change({ places: inserted(places, slots, slot, Number(before)) });
    else this.change({ places: placed(places, slot, place ? Number(place) : null) });
    this.say(slot);
  }

  move(slot, by) {
    const { places, slots } = this.work;
    this.change({ places: stepped(places, slots, slot, by, this.site.project.ties) });
    this.say(slot);
  }

  /** Tell a screen reader where a response is now. */
  say(slot) {
    const place = this.work.places[slot];
    const letter = this.letters[slot];
    if (!place) return announce(t("say.none", { letter }));
    const all = tiers(this.work.places, this.work.slots);
    const others = all.find((tier) => tier.includes(slot)).filter((other) => other !== slot);
    const names = others.map((other) => this.letters[other]).join(", ");
    announce(t(names ? "say.tie" : "say.place", { letter, place, names }));
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
    if (this.site.project.demonstrations === "off") return;
    if (slot && this.work.demonstration?.from !== slot) {
      const { text } = this.task.responses.find((one) => one.slot === slot);
      this.change({ demonstration: { from: slot, text } });
    } else if (!slot) this.change({ demonstration: null });
    if (slot) at(`edit-${slot}`).focus();
  }

  choose(slot, go = false) {
    if (this.work.current !== slot) {
      this.work.current = slot;
      for (const card of this.cards) card.paint(this.work);
    }
    if (go) this.go(slot);
  }

  go(slot) {
    const card = at(`card-${slot}`);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }

  step(by) {
    const { slots, current } = this.work;
    const next = slots[slots.indexOf(current) + by];
    if (next) this.choose(next, true);
  }

  focus(selector) {
    document.querySelector(`#card-${CSS.escape(this.work.current)} ${selector}`)?.focus();
  }

  guidelines() {
    const { guidelines } = this.site.project;
    show(t("guidelines"), "", guidelines ? markdown(guidelines) : h("p", {}, t("guidelines.none")));
  }

  back(way) {
    if (!this.work[way]()) return;
    this.keep();
    this.paint();
    announce(t(`say.${way}`));
  }

  async submit() {
    const reason = this.hindrance();
    if (reason) return toast(reason);
    await this.send("answer", { answer: this.work.answer() });
  }

  skip() {
    const reason = h("input", { id: "skip-reason", autocomplete: "off" });
    const send = (event) => {
      event.preventDefault();
      window.close();
      this.send("skip", { reason: reason.value.trim() });
    };
    const label = h("label", { for: "skip-reason" }, t("skip.reason"));
    const button = h("button", { class: "button primary" }, t("skip.do"));
    const form = h("form", { class: "field", onsubmit: send }, label, reason, h("p", {}, button));
    const window = show(t("skip.title"), "narrow", h("p", {}, t("skip.hint")), form);
  }

  async send(kind, body) {
    if (this.sending) return;
    this.sending = true;
    clearTimeout(this.saving);
    this.saving = 0;
    const { task, work } = this;
    const entry = api.entry(kind, task, { ...body, seconds: work.clock.seconds() });
    try {
      if (await this.site.outbox.add(entry)) {
        this.site.saved(t("sent"));
        toast(t(`sent.${kind}`), t("rank.undo"), () => this.site.reopen(task.id));
      }
    } finally {
      this.sending = false;
    }
    if (!this.closed) await this.open();
  }

  /** Answers wait in this browser for the server. */
  wait() {
    this.waiting = true;
    const n = this.site.outbox.waiting().length;
    const again = () => this.site.outbox.flush();
    this.message(t("wait.title"), t("wait.text", { n }), t("wait.again"), again);
  }

  empty({ done, reason }) {
    const key = reason === "none_left" ? "empty.done" : "empty.busy";
    this.message(t("empty.title"), t(key, { done: number.format(done ?? 0) }), t("empty.again"), () =>
      this.site.draw(),
    );
    this.timer = setTimeout(() => this.site.draw(), LOOK_AGAIN);
  }

  message(title, text, action, onaction) {
    const button = h("button", { type: "button", class: "button primary", onclick: onaction }, action);
    at("main").replaceChildren(
      h("section", { class: "message-box" }, h("h1", {}, title), h("p", {}, text), button),
    );
    announce(title);
  }
}
