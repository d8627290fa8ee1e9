/** Asks other tabs of this browser which answers they are receiving. */

const PATIENCE = 1500; // milliseconds in which a tab that writes an answer says so
const channel = "BroadcastChannel" in window ? new BroadcastChannel("openqwen.answers") : null;
const known = new Map(); // turn id -> {updated, timer, gone}
let changed = () => {};

/** Answer the other tabs. ours: turn id -> AbortController. onchange: after a tab fell silent. */
export function join(ours, onchange) {
  changed = onchange;
  channel?.addEventListener("message", ({ data: { ask, here, end } }) => {
    if (ours.has(ask)) channel.postMessage({ here: ask });
    else if (known.has(here)) heard(here);
    else ours.get(end)?.abort();
  });
}

/** Whether another tab writes this turn; true also while that is being asked. */
export function elsewhere(node) {
  if (node.done !== false || !channel) {
    clearTimeout(known.get(node.id)?.timer);
    known.delete(node.id);
    return false;
  }
  const entry = known.get(node.id);
  if (!entry || (entry.gone && entry.updated !== node.updated)) ask(node.id, node.updated);
  return !known.get(node.id).gone;
}

export function endElsewhere(node) {
  if (known.has(node.id)) channel.postMessage({ end: node.id });
}

function ask(id, updated) {
  const entry = { updated, gone: false };
  entry.timer = setTimeout(() => {
    entry.gone = true;
    changed();
  }, PATIENCE);
  known.set(id, entry);
  channel.postMessage({ ask: id });
}

function heard(id) {
  const { timer, updated } = known.get(id);
  clearTimeout(timer);
  known.get(id).timer = setTimeout(() => ask(id, updated), PATIENCE);
}
