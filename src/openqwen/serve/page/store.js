/** Conversations, kept in IndexedDB; in localStorage for the moment before the page is closed. */

import { merge, newId } from "./tree.js";

const JOURNAL = "openqwen.journal.";
const OURS = JOURNAL + newId();
const channel = "BroadcastChannel" in window ? new BroadcastChannel("openqwen") : null;

/** Keeps all conversations in memory and on disk. `onchange(id)`: another tab changed one. */
export class Store {
  constructor(onchange) {
    this.conversations = new Map();
    this.durable = true;
    this.unsaved = new Map(); // conversation id -> ids of turns not yet on disk
    this.writing = new Map(); // the same, on their way
    this.timer = 0;
    this.tail = Promise.resolve();
    this.onchange = onchange;
    const opened = new Promise((resolve) => (this.opened = resolve));
    channel?.addEventListener("message", async ({ data }) => {
      await opened; // another tab may write before this one has read
      await this.reload(data.id);
      onchange(data.id);
    });
    addEventListener("pagehide", () => this.writeJournal());
    addEventListener("visibilitychange", () => document.hidden && this.writeJournal());
  }

  async open() {
    try {
      this.database = await new Promise((resolve, reject) => {
        const request = indexedDB.open("openqwen", 1);
        request.onupgradeneeded = () =>
          request.result.createObjectStore("conversations", { keyPath: "id" });
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
      });
      for (const one of await this.transact("readonly", (store) => store.getAll()))
        this.conversations.set(one.id, one);
    } catch {
      this.durable = false;
    }
    this.readJournal();
    this.opened();
  }

  transact(mode, act) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction("conversations", mode);
      const request = act(transaction.objectStore("conversations"));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }

  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /** Remember a changed conversation; what is on disk follows within a second, or at once. */
  changed(conversation, node = null, soon = false) {
    this.conversations.set(conversation.id, conversation);
    if (!this.unsaved.has(conversation.id)) this.unsaved.set(conversation.id, new Set());
    if (node) this.unsaved.get(conversation.id).add(node.id);
    if (soon) {
      this.timer ||= setTimeout(() => this.flush(), 700);
      return null;
    }
    return this.flush();
  }

  /** Write all that is unsaved, after what is being written. */
  flush() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.tail = this.tail.then(() => this.writeAll());
    return this.tail;
  }

  async writeAll() {
    for (const [id, turns] of [...this.unsaved]) {
      this.unsaved.delete(id);
      this.writing.set(id, turns);
      await this.write(id);
      this.writing.delete(id);
    }
    if (!this.unsaved.size && !this.writing.size) localStorage.removeItem(OURS);
  }

  async write(id) {
    const ours = this.conversations.get(id);
    if (!ours || !this.durable) return;
    let more = false;
    try {
      // Read and write in one transaction: turns that another tab has added meanwhile stay.
      await this.transact("readwrite", (store) => {
        const request = store.get(id);
        request.onsuccess = () => {
          const union = request.result ? merge(ours, request.result) : ours;
          more = Object.keys(union.nodes).length > Object.keys(ours.nodes).length;
          ours.nodes = { ...union.nodes, ...ours.nodes };
          store.put(structuredClone(union));
        };
        return request;
      });
      channel?.postMessage({ id });
      if (more) this.onchange(id);
    } catch (error) {
      if (error?.name === "QuotaExceededError") this.onfull?.();
      else this.durable = false;
    }
  }

  async reload(id) {
    if (!this.database) return;
    const theirs = await this.transact("readonly", (store) => store.get(id));
    const ours = this.conversations.get(id);
    if (!theirs) this.conversations.delete(id);
    else if (ours)
      Object.assign(ours, merge(ours, theirs), { nodes: keepLive(ours.nodes, theirs.nodes) });
    else this.conversations.set(id, theirs);
  }

  async remove(id) {
    this.conversations.delete(id);
    this.unsaved.delete(id);
    localStorage.removeItem(OURS);
    if (!this.durable) return;
    await this.transact("readwrite", (store) => store.delete(id));
    channel?.postMessage({ id });
  }

  /** What IndexedDB has not yet, written in the one way that is over before the page is. */
  writeJournal() {
    const known = [...this.writing, ...this.unsaved].filter(([id]) => this.conversations.has(id));
    const entries = known.map(([id, turns]) => {
      const { nodes, ...head } = this.conversations.get(id);
      return { ...head, nodes: Object.fromEntries([...turns].map((turn) => [turn, nodes[turn]])) };
    });
    if (entries.length) localStorage.setItem(OURS, JSON.stringify(entries));
  }

  readJournal() {
    for (const key of Object.keys(localStorage).filter((name) => name.startsWith(JOURNAL))) {
      for (const entry of JSON.parse(localStorage.getItem(key))) {
        const stored = this.conversations.get(entry.id);
        this.changed(stored ? merge(entry, stored) : entry);
      }
      localStorage.removeItem(key);
    }
  }
}

/** Objects that views and streams hold stay the same objects. */
function keepLive(ours, theirs) {
  const nodes = { ...theirs };
  for (const [id, node] of Object.entries(ours)) {
    nodes[id] = theirs[id]?.updated > node.updated ? Object.assign(node, theirs[id]) : node;
  }
  return nodes;
}
