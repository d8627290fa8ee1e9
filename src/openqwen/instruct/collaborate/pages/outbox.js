/**
 * Keeps what a person did in this browser until the server has it.
 *
 * Drafts and answers lie in localStorage, whose writes are over before the page can be closed. An
 * answer carries a key that the server counts once, so it may be sent again after any failure.
 */

const LONGEST_WAIT = 30_000; // milliseconds between two tries
const LATER = [0, 401, 408, 429]; // status codes after which the same request may succeed

export class Outbox {
  /**
   * owner: whose answers these are. send(entry): a promise; its error has a `status`.
   * onchange(): the state has changed. onrefused(entry, error): the server refused an answer.
   */
  constructor(owner, { send, onchange, onrefused }) {
    this.prefix = `openqwen.annotate.${owner}.`;
    Object.assign(this, { send, onchange, onrefused, wait: 1000, timer: 0, running: null });
    this.online = true;
    this.wake = () => this.flush();
    addEventListener("online", this.wake);
  }

  close() {
    removeEventListener("online", this.wake);
    clearTimeout(this.timer);
    this.closed = true;
  }

  read(kind) {
    const start = `${this.prefix}${kind}.`;
    const names = Object.keys(localStorage).filter((name) => name.startsWith(start));
    return names.map((name) => JSON.parse(localStorage.getItem(name)));
  }

  /** Answers that the server has not acknowledged, oldest first. */
  waiting = () => this.read("out").sort((a, b) => a.made - b.made);

  /** Answers that the server refused, until the person has seen them. */
  refused = () => this.read("refused");

  dropRefused = ({ key }) => localStorage.removeItem(`${this.prefix}refused.${key}`);

  draft = (task) => JSON.parse(localStorage.getItem(`${this.prefix}draft.${task}`));

  keepDraft = (task, draft) =>
    localStorage.setItem(`${this.prefix}draft.${task}`, JSON.stringify(draft));

  dropDraft = (task) => localStorage.removeItem(`${this.prefix}draft.${task}`);

  /** Keep an entry `{key, task, …}` and send it. Resolves to whether the server has it now. */
  async add(entry) {
    const name = `${this.prefix}out.${entry.key}`;
    localStorage.setItem(name, JSON.stringify({ ...entry, made: Date.now() }));
    this.dropDraft(entry.task);
    await this.flush();
    return localStorage.getItem(name) === null;
  }

  /** Send what waits, one after the other. */
  async flush() {
    clearTimeout(this.timer);
    while (this.running) await this.running;
    if (this.closed) return;
    this.running = this.sendAll();
    try {
      await this.running;
    } finally {
      this.running = null;
    }
    this.onchange();
  }

  async sendAll() {
    for (const entry of this.waiting()) {
      const name = `${this.prefix}out.${entry.key}`;
      try {
        await this.send(entry);
      } catch (error) {
        this.online = error.status !== 0;
        if (LATER.includes(error.status) || error.status >= 500) return this.tryLater();
        localStorage.setItem(`${this.prefix}refused.${entry.key}`, JSON.stringify(entry));
        this.onrefused(entry, error);
      }
      localStorage.removeItem(name);
      this.wait = 1000;
      this.online = true;
    }
  }

  tryLater() {
    this.timer = setTimeout(this.wake, this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }
}
