/**
 * Keeps what a person did in this browser until the server has it.
 *
 * Drafts and answers lie in localStorage, whose writes are over before the page can be closed. An
 * answer carries a key that the server counts once, so it may be sent again after any failure.
 * Where the browser has no storage, or it is full, this page alone keeps them.
 */

const LONGEST_WAIT = 30_000; // milliseconds between two tries
const LATER = [0, 401, 403, 408, 429]; // status codes after which the same request may succeed

/** A random name that nothing else has; also where the page is not in a secure context. */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Outbox {
  /**
   * owner: whose work this is. send(entry): a promise; its error has a `status`.
   * onchange(): the state has changed. onrefused(entry, error): the server refused an answer.
   */
  constructor(owner, { send, onchange, onrefused }) {
    this.prefix = `openqwen.${owner}.`;
    this.memory = new Map();
    Object.assign(this, { send, onchange, onrefused, wait: 1000, timer: 0, running: null });
    this.wake = () => this.flush();
    addEventListener("online", this.wake);
  }

  close() {
    removeEventListener("online", this.wake);
    clearTimeout(this.timer);
    this.closed = true;
  }

  name = (kind, id) => `${this.prefix}${kind}.${id}`;
  read = (name) => JSON.parse(this.memory.get(name) ?? localStorage.getItem(name));
  get = (kind, id) => this.read(this.name(kind, id));

  put(kind, id, value) {
    const name = this.name(kind, id);
    this.memory.delete(name);
    try {
      localStorage.setItem(name, JSON.stringify(value));
    } catch {
      localStorage.removeItem(name);
      this.memory.set(name, JSON.stringify(value));
    }
  }

  drop(kind, id) {
    this.memory.delete(this.name(kind, id));
    localStorage.removeItem(this.name(kind, id));
  }

  list(kind) {
    const names = new Set([...Object.keys(localStorage), ...this.memory.keys()]);
    const wanted = [...names].filter((name) => name.startsWith(this.name(kind, "")));
    return wanted.map((name) => this.read(name));
  }

  /** Answers that the server has not acknowledged, oldest first. */
  waiting = () => this.list("out").sort((a, b) => a.made - b.made);

  /** Keep an entry `{key, …}` and send it. Resolves to what the server said, or null. */
  async add(entry) {
    const after = Math.max(0, ...this.waiting().map(({ made }) => made)) + 1;
    this.put("out", entry.key, { ...entry, made: Math.max(Date.now(), after) });
    if (entry.task) this.drop("draft", entry.task);
    const said = await this.flush();
    return said.get(entry.key) ?? null;
  }

  /** Send what waits, one after the other. Resolves to the server's answers by their keys. */
  async flush() {
    clearTimeout(this.timer);
    while (this.running) await this.running;
    if (this.closed) return new Map();
    this.running = this.sendAll().finally(() => (this.running = null));
    const said = await this.running;
    this.onchange();
    return said;
  }

  async sendAll() {
    const said = new Map();
    for (const entry of this.waiting()) {
      try {
        said.set(entry.key, await this.send(entry));
      } catch (error) {
        if (LATER.includes(error.status) || !(error.status < 500)) {
          this.tryLater(error);
          return said;
        }
        this.put("refused", entry.key, entry);
        this.onrefused(entry, error);
      }
      this.drop("out", entry.key);
      this.wait = 1000;
    }
    return said;
  }

  tryLater({ status }) {
    this.ended = status === 401; // the session has ended
    this.timer = setTimeout(this.wake, this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }
}
