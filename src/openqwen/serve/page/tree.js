/** A conversation is a tree: to edit or regenerate a turn adds a sibling; one child is selected. */

export const ROOT = "root";
const ROLES = ["user", "assistant", "tool"];

/** How answers are made; an empty field leaves the choice to the model's own defaults. */
export const DEFAULTS = {
  model: "",
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  repetition_penalty: "",
  presence_penalty: "",
  frequency_penalty: "",
  max_tokens: "2048",
  seed: "",
  stop: "",
  tools: "",
  logprobs: false,
  compare: false,
  second: "",
  base: "",
};

let latest = 0;

/** Milliseconds, never the same twice: the order in which turns were made. */
export function stamp() {
  latest = Math.max(Date.now(), latest + 1);
  return latest;
}

/** Random, without needing a secure context as crypto.randomUUID does. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

export function newConversation(settings = DEFAULTS) {
  const now = stamp();
  return {
    id: newId(),
    title: "",
    created: now,
    updated: now,
    settings: { ...DEFAULTS, ...settings },
    nodes: {},
    selected: {},
  };
}

/** Add a turn under `parent` and select it. */
export function add(conversation, parent, fields) {
  const now = stamp();
  const node = {
    id: newId(),
    parent,
    role: "user",
    content: "",
    created: now,
    updated: now,
    ...fields,
  };
  conversation.nodes[node.id] = node;
  conversation.selected[parent] = node.id;
  conversation.updated = now;
  return node;
}

function childrenOf(conversation) {
  const children = new Map();
  for (const node of Object.values(conversation.nodes)) {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(node);
  }
  for (const list of children.values()) list.sort((a, b) => a.created - b.created);
  return children;
}

/** The selected turns from the first to the last. */
export function path(conversation) {
  const children = childrenOf(conversation);
  const turns = [];
  for (let at = ROOT; children.has(at); at = turns.at(-1).id) {
    const list = children.get(at);
    turns.push(list.find((node) => node.id === conversation.selected[at]) ?? list.at(-1));
  }
  return turns;
}

/** The turns above `node`, first to last. */
export function before(conversation, node) {
  const turns = [];
  for (let at = conversation.nodes[node.parent]; at; at = conversation.nodes[at.parent])
    turns.unshift(at);
  return turns;
}

/** A turn's versions, each a list: answers that were made side by side are one version. */
export function versions(conversation, node) {
  const groups = [];
  for (const sibling of childrenOf(conversation).get(node.parent)) {
    const last = groups.at(-1);
    if (sibling.pair && last?.[0].pair === sibling.pair) last.push(sibling);
    else groups.push([sibling]);
  }
  return groups;
}

export function select(conversation, node) {
  conversation.selected[node.parent] = node.id;
  conversation.updated = stamp();
}

/** Turns as the server takes them. */
export function messages(settings, turns) {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return [
    ...system,
    ...turns.map((node) => {
      const message = { role: node.role, content: node.content };
      if (node.role === "tool") message.tool_call_id = node.callId;
      if (node.calls?.length) {
        message.tool_calls = node.calls.map(({ id, name, text }) => ({
          id,
          type: "function",
          function: { name, arguments: text || "{}" },
        }));
      }
      return message;
    }),
  ];
}

/** The title until somebody gives one: how the first question begins. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation)[0]?.content.trim().split("\n")[0] ?? "";
  return first.length > 60 ? `${first.slice(0, 58).trimEnd()}…` : first || "New conversation";
}

/** Merge two states of a conversation: all turns are kept, and the newer state of a turn wins. */
export function merge(ours, theirs) {
  const nodes = { ...theirs.nodes };
  for (const [id, node] of Object.entries(ours.nodes))
    if (!(nodes[id]?.updated > node.updated)) nodes[id] = node;
  const [older, newer] = ours.updated >= theirs.updated ? [theirs, ours] : [ours, theirs];
  return { ...newer, nodes, selected: { ...older.selected, ...newer.selected } };
}

/** The conversations of a file: our own export, or OpenAI's `messages`. Throws what is wrong. */
export function fromFile(text) {
  let records;
  try {
    const value = JSON.parse(text);
    records = value?.conversations ?? (Array.isArray(value) ? value : [value]);
  } catch {
    try {
      records = text
        .trim()
        .split("\n")
        .map((line) => JSON.parse(line));
    } catch {
      throw new Error("This file is neither JSON nor JSON lines.");
    }
  }
  if (!Array.isArray(records) || !records.length)
    throw new Error("This file holds no conversations.");
  return records.map((record, number) => {
    if (Array.isArray(record?.messages)) return fromMessages(record);
    if (record?.nodes && typeof record.nodes === "object") return checked(record, number);
    throw new Error(`Record ${number + 1} has neither "nodes" nor "messages".`);
  });
}

function fromMessages({ messages: list, tools }) {
  const conversation = newConversation(
    tools ? { ...DEFAULTS, tools: JSON.stringify(tools, null, 2) } : DEFAULTS,
  );
  let parent = ROOT;
  for (const { role, content, tool_calls: calls, tool_call_id: callId } of list) {
    if (role === "system") conversation.settings.system = String(content ?? "");
    if (!ROLES.includes(role)) continue;
    const fields = { role, content: String(content ?? "") };
    if (callId) fields.callId = String(callId);
    if (Array.isArray(calls)) fields.calls = calls.map(imported);
    parent = add(conversation, parent, fields).id;
  }
  return conversation;
}

function imported(call, number) {
  const { name, arguments: given } = call?.function ?? {};
  return {
    id: String(call?.id ?? `call-${number}`),
    name: String(name ?? ""),
    text: typeof given === "string" ? given : JSON.stringify(given ?? {}),
  };
}

/** Only what we know of, and of the right kind: the file may come from anywhere. */
function checked(record, number) {
  const conversation = newConversation();
  const wrong = (what) => new Error(`Conversation ${number + 1}: ${what}.`);
  if (typeof record.id === "string" && /^[0-9a-f]{24}$/.test(record.id))
    conversation.id = record.id;
  conversation.title = typeof record.title === "string" ? record.title : "";
  for (const time of ["created", "updated"])
    if (Number.isFinite(record[time])) conversation[time] = record[time];
  for (const [name, initial] of Object.entries(DEFAULTS)) {
    if (typeof record.settings?.[name] === typeof initial)
      conversation.settings[name] = record.settings[name];
  }
  for (const [id, node] of Object.entries(record.nodes)) {
    if (!ROLES.includes(node?.role) || typeof node.content !== "string")
      throw wrong(`turn ${id} has no role or text`);
    if (node.parent !== ROOT && !Object.hasOwn(record.nodes, node.parent))
      throw wrong(`turn ${id} hangs on none`);
    const kept = {
      id,
      parent: node.parent,
      role: node.role,
      content: node.content,
      created: Number(node.created) || 0,
      updated: Number(node.updated) || 0,
    };
    for (const name of ["model", "finish", "pair", "callId", "name"])
      if (typeof node[name] === "string") kept[name] = node[name];
    if (Array.isArray(node.calls))
      kept.calls = node.calls.map(({ id: call, name, text }) => ({
        id: String(call),
        name: String(name),
        text: String(text),
      }));
    if (node.stats && typeof node.stats === "object") {
      kept.stats = Object.fromEntries(
        Object.entries(node.stats).filter(([, value]) => Number.isFinite(value)),
      );
    }
    conversation.nodes[id] = kept;
  }
  for (const node of Object.values(conversation.nodes)) {
    const seen = new Set();
    for (let at = node; at.parent !== ROOT; at = conversation.nodes[at.parent]) {
      if (seen.has(at.id)) throw wrong("its turns go round in a ring");
      seen.add(at.id);
    }
  }
  for (const [parent, child] of Object.entries(record.selected ?? {})) {
    if (conversation.nodes[child]?.parent === parent) conversation.selected[parent] = child;
  }
  return conversation;
}
