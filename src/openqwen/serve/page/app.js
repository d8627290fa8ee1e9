/** The page: which conversation is open, and what each button and key does. */

import { answer, anyRunning, isRunning, parseTools, request, running, stop } from "./answer.js";
import * as api from "./api.js";
import { showKeys, showPrompt } from "./dialogs.js";
import { announce, h, icon, iconButton, number, toast } from "./dom.js";
import { fillPanel } from "./panel.js";
import { fillFoot, fillSidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { join } from "./tabs.js";
import { add, before, merge, newConversation, newId, path, ROOT, select, titleOf, versions } from "./tree.js";
import { keyForm, pair, reconcile, Turn, welcome } from "./view.js";

const at = (id) => document.getElementById(id);
const TRIES = 10; // times that a busy server is asked again by itself
const LOCKED = "A key is needed";

const store = new Store((id) => {
  if (id === current?.id && !store.conversations.has(id)) open(fresh());
  else draw();
  drawSidebar(false);
});
let current = null;
let catalog = [];
let canRender = false;
let link = "Connecting"; // to the server: "" where it told its models, else how it stands
const gate = keyForm(connect);
let follow = true; // the view stays at the end while text comes
let frame = 0;
const views = new Map(); // turn id -> Turn
const waits = new Map(); // turn id -> {seconds, timer}
const tries = new Map(); // turn id -> how often it was asked again

// ---- What is on the screen

function viewOf(node) {
  if (!views.has(node.id)) views.set(node.id, new Turn(node, act));
  const view = views.get(node.id);
  view.node = node;
  return view;
}

/** Draw everything that may have changed; at most once a frame. */
function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    drawNow();
  });
}

function drawNow() {
  const turns = path(current);
  const elements = turns.map((node, n) => {
    const last = n === turns.length - 1;
    const group = node.pair ? versions(current, node).find((all) => all.includes(node)) : [node];
    const shown = group.map((one) => {
      const view = viewOf(one);
      const results = last && one === node && one.calls?.length && !isRunning(one) && !one.error && one.done !== false;
      view.update({ conversation: current, last, chosen: one === node, results, waiting: waits.get(one.id)?.seconds, canRender });
      view.element.classList.toggle("last", last);
      return view.element;
    });
    if (group.length === 1) return shown[0];
    const view = viewOf(node);
    const frameOfPair = (views.get(node.pair) ?? { element: pair([]) });
    views.set(node.pair, frameOfPair);
    view.element.classList.add("chosen");
    for (const other of shown) if (other !== view.element) other.classList.remove("chosen");
    reconcile(frameOfPair.element, shown);
    return frameOfPair.element;
  });
  const shown = elements.length ? elements : [welcome(link || current.settings.model, store.durable)];
  reconcile(at("turns"), link === LOCKED ? [...shown, gate.element] : shown);
  const busy = liveTurns().length > 0;
  at("turns").setAttribute("aria-busy", String(busy));
  drawTop();
  drawFoot(turns, busy);
  if (follow) at("scroller").scrollTop = at("scroller").scrollHeight;
  drawJump();
}

function drawJump() {
  const { scrollHeight, scrollTop, clientHeight } = at("scroller");
  at("to-end").hidden = scrollHeight - scrollTop - clientHeight < 160;
}

function drawTop() {
  const title = titleOf(current);
  at("title").textContent = path(current).length ? title : "";
  document.title = path(current).length ? `${title} · OpenQwen` : "OpenQwen";
  at("show-prompt").hidden = !canRender;
}

function drawFoot(turns, busy) {
  const { settings } = current;
  const used = turns.findLast((node) => node.stats?.prompt)?.stats;
  const limit = catalog.find((model) => model.id === settings.model)?.context;
  const all = used ? number.format(used.prompt + used.tokens) : "";
  at("usage").textContent = used ? (limit ? `${all} of ${number.format(limit)} tokens` : `${all} tokens`) : "";
  at("model").textContent = settings.compare ? `${settings.model} and ${settings.second || "no second model yet"}` : settings.model || "no model";
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("send").disabled = !at("composer-text").value.trim();
}

/** asked: by the person; otherwise a menu or a title being changed is left alone. */
function drawSidebar(asked = true) {
  if (!asked && at("conversations").querySelector(".menu[open], li input")) return;
  const busy = (conversation) => Object.values(conversation.nodes).some(isRunning);
  fillSidebar(at("conversations"), store.list(), current, busy, act);
}

function liveTurns() {
  return Object.values(current.nodes).filter((node) => isRunning(node) || waits.has(node.id));
}

function open(conversation) {
  current = conversation;
  follow = true;
  sessionStorage.setItem("openqwen.open", current.id);
  at("composer-text").value = localStorage.getItem(`openqwen.draft.${current.id}`) ?? "";
  grow();
  settleModel();
  drawNow();
  drawSidebar();
  if (!at("panel").hidden) showPanel(true);
}

/** A conversation not yet begun, with the settings of the one before. */
function fresh() {
  return newConversation(current?.settings ?? store.list()[0]?.settings);
}

/** A model that the server no longer has gives way to the first that it has. */
function settleModel() {
  const ids = catalog.map((model) => model.id);
  const { settings } = current;
  if (ids.length && !ids.includes(settings.model)) settings.model = ids[0];
  if (ids.length && !settings.base && !ids.includes(settings.second)) settings.second = ids.find((id) => id !== settings.model) ?? ids[0];
}

// ---- What can be done

/** Ask for what follows a turn; with a second model, both. */
async function generate(conversation, parent) {
  const { settings } = conversation;
  const asked = [{ model: settings.model }];
  if (settings.compare && settings.second) asked.push({ model: settings.second, base: settings.base });
  const together = asked.length > 1 ? newId() : undefined;
  const nodes = asked.map((fields) => add(conversation, parent, { role: "assistant", content: "", done: false, ...fields, ...(together && { pair: together }) }));
  select(conversation, nodes[0]);
  follow = true;
  announce("The model answers");
  await Promise.all(nodes.map((node) => run(conversation, node)));
}

async function run(conversation, node) {
  const kept = () => store.conversations.has(conversation.id); // not deleted meanwhile
  const changed = () => {
    if (kept()) store.changed(conversation, node, true);
    if (conversation === current) draw();
  };
  const over = answer(conversation, node, changed);
  drawNow();
  drawSidebar(false);
  await over;
  if (node.error?.retry && (tries.get(node.id) ?? 0) < TRIES) wait(conversation, node, Math.ceil(node.error.retry));
  else if (node.error?.status === 401) lock();
  else if (!node.error) announce(`Answer finished, ${node.stats?.tokens ?? 0} tokens`); // an error is an alert by itself
  if (kept()) await store.changed(conversation, node);
  drawSidebar(false);
}

/** A busy server is asked again when it said. */
function wait(conversation, node, seconds) {
  const tick = () => {
    const entry = waits.get(node.id);
    entry.seconds -= 1;
    if (entry.seconds <= 0) again(conversation, node);
    else draw();
  };
  waits.set(node.id, { seconds, timer: setInterval(tick, 1000) });
  tries.set(node.id, (tries.get(node.id) ?? 0) + 1);
  draw();
}

function endWait(node) {
  clearInterval(waits.get(node.id)?.timer);
  waits.delete(node.id);
  draw();
}

function again(conversation, node) {
  endWait(node);
  node.model ||= conversation.settings.model; // not known when it was first asked
  run(conversation, node);
}

function refuse(error) {
  toast(error.message);
  showPanel(true);
}

function send(text) {
  if (!text.trim() || liveTurns().length) return;
  try {
    parseTools(current.settings.tools);
  } catch (error) {
    refuse(error);
    return;
  }
  const user = add(current, path(current).at(-1)?.id ?? ROOT, { role: "user", content: text.trim() });
  store.changed(current, user);
  at("composer-text").value = "";
  keepDraft();
  grow();
  generate(current, user.id);
}

const act = {
  open(conversation) {
    open(conversation);
    showSidebar(false);
    focusField();
  },
  fresh: () => act.open(path(current).length ? fresh() : current),
  rename(conversation, title) {
    Object.assign(conversation, { title, updated: Math.max(conversation.updated, Date.now()) });
    if (Object.keys(conversation.nodes).length) store.changed(conversation);
    drawSidebar();
    draw();
  },
  remove(conversation) {
    store.remove(conversation.id);
    localStorage.removeItem(`openqwen.draft.${conversation.id}`);
    Object.values(conversation.nodes).forEach((node) => (stop(node), endWait(node)));
    if (conversation === current) open(store.list()[0] ?? fresh());
    drawSidebar();
    toast(`“${titleOf(conversation)}” is deleted.`, "Undo", () => (store.changed(conversation), open(conversation)));
  },
  bring(conversations) {
    for (const one of conversations) {
      const ours = store.conversations.get(one.id);
      store.changed(ours ? Object.assign(ours, merge(ours, one)) : one);
    }
    open(store.conversations.get(conversations[0].id));
    toast(conversations.length === 1 ? "One conversation is imported." : `${conversations.length} conversations are imported.`);
  },
  shorten(node) {
    const asked = before(current, node).findLast((turn) => turn.role === "user");
    views.get(asked.id).edit();
  },
  afresh(node) {
    const asked = before(current, node).findLast((turn) => turn.role === "user");
    act.open(fresh());
    at("composer-text").value = asked.content;
    at("composer-text").dispatchEvent(new Event("input"));
  },
  keys: showKeys,
  again: (node) => again(current, node),
  cancelWait: (node) => endWait(node),
  regenerate(node) {
    if (!liveTurns().length) generate(current, node.parent);
  },
  edit(node, text) {
    const { role, model } = node;
    const edited = add(current, node.parent, role === "user" ? { role, content: text } : { role, model, content: text, finish: "edited" });
    store.changed(current, edited);
    if (role === "user") generate(current, edited.id);
    draw();
  },
  pick(node) {
    select(current, node);
    store.changed(current);
    draw();
  },
  go(node, step) {
    const groups = versions(current, node);
    const group = groups[groups.findIndex((all) => all.includes(node)) + step];
    if (group) act.pick(group[0]);
  },
  giveResults(node, texts) {
    let parent = node.id;
    node.calls.forEach((call, n) => {
      const result = add(current, parent, { role: "tool", callId: call.id, name: call.name, content: texts[n] });
      store.changed(current, result);
      parent = result.id;
    });
    generate(current, parent);
  },
  async showPrompt(node) {
    const turns = node ? before(current, node) : path(current);
    const draft = at("composer-text").value.trim();
    if (!node && draft) turns.push({ role: "user", content: draft });
    try {
      const { model, messages, tools } = request(current.settings, turns, node?.model ?? current.settings.model);
      if (!messages.length) toast("There is no prompt yet: write a message first.");
      else showPrompt(await api.render(api.base(node?.base ?? ""), { model, messages, ...(tools && { tools }) }));
    } catch (error) {
      toast(`${error.message} ${error.advice ?? ""}`);
    }
  },
};

function stopAll() {
  for (const node of liveTurns()) (stop(node), endWait(node));
}

// ---- Fields, keys, side panels

function grow() {
  const area = at("composer-text");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
}

/** Not where it would bring up a keyboard on the glass. */
function focusField() {
  if (!matchMedia("(pointer: coarse)").matches) at("composer-text").focus();
}

function keepDraft() {
  const name = `openqwen.draft.${current.id}`;
  const text = at("composer-text").value;
  if (text) localStorage.setItem(name, text);
  else localStorage.removeItem(name);
}

function showPanel(shown) {
  at("panel").hidden = !shown;
  at("open-panel").setAttribute("aria-expanded", String(shown));
  document.body.classList.toggle("with-panel", shown);
  if (!shown) return at("composer-text").focus();
  fillPanel(at("panel"), current, catalog, {
    changed() {
      if (Object.keys(current.nodes).length) store.changed(current, null, true);
      draw();
    },
    close: () => showPanel(false),
  });
}

function showSidebar(shown) {
  document.body.classList.toggle("with-sidebar", shown);
  at("shade").hidden = !shown;
  if (shown) at("sidebar").querySelector("button").focus();
}

function onkey(event) {
  const field = at("composer-text");
  const typing = event.target.matches?.("input, textarea, select");
  const control = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (liveTurns().length) stopAll();
    else if (document.body.classList.contains("with-sidebar")) showSidebar(false);
    else if (!at("panel").hidden && at("panel").contains(document.activeElement)) showPanel(false);
  } else if (control && event.key === "/") showKeys();
  else if (control && event.key === ",") showPanel(at("panel").hidden);
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") act.fresh();
  else if (control && event.shiftKey && event.key === "Enter") {
    const last = path(current).at(-1);
    if (last?.role === "assistant") act.regenerate(last);
  } else if (event.key === "/" && !typing) field.focus();
  else if (event.key === "ArrowUp" && event.target === field && !field.value) {
    const last = path(current).findLast((node) => node.role === "user");
    if (!last || liveTurns().length) return;
    views.get(last.id).edit();
  } else if (event.key === "Enter" && event.target === field && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
    send(field.value);
  } else return;
  event.preventDefault();
}

function build() {
  at("top").append(
    iconButton("menu", "Conversations", () => showSidebar(true), { id: "open-sidebar" }),
    h("h1", { id: "title" }),
    iconButton("prompt", "Prompt as the model reads it", () => act.showPrompt(null), { id: "show-prompt", hidden: true }),
    iconButton("plus", "New conversation", act.fresh, { id: "new" }),
    iconButton("sliders", "Settings", () => showPanel(at("panel").hidden), { id: "open-panel", "aria-expanded": "false", "aria-controls": "panel" }));
  at("composer-foot").append(
    h("button", { type: "button", id: "model", class: "quiet text", title: "Choose the model", onclick: () => showPanel(true) }),
    h("span", { id: "usage", class: "hint" }),
    h("button", { id: "send", class: "round", "aria-label": "Send", title: "Send" }, icon("send")),
    h("button", { type: "button", id: "stop", class: "round", "aria-label": "Stop", title: "Stop (Esc)", hidden: true, onclick: stopAll }, icon("stop")));
  at("to-end").append(icon("down"));
  at("to-end").onclick = () => {
    follow = true;
    at("scroller").scrollTop = at("scroller").scrollHeight;
  };
  at("scroller").onscroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = at("scroller");
    follow = scrollHeight - scrollTop - clientHeight < 60;
    drawJump();
  };
  at("composer").onsubmit = (event) => (event.preventDefault(), send(at("composer-text").value));
  at("composer-text").oninput = () => (grow(), keepDraft(), draw());
  at("shade").onclick = () => showSidebar(false);
  document.addEventListener("keydown", onkey);
  addEventListener("beforeunload", (event) => anyRunning() && store.durable === false && event.preventDefault());
  store.onfull = () => toast("The browser's storage is full: export conversations and delete some, or the newest will be lost.");
  fillFoot(at("sidebar-foot"), () => store.list(), act);
}

/** Ask for the key, and say so where one was given. */
function lock() {
  link = LOCKED;
  gate.say(api.key.get() ? "The server does not accept this key." : "");
  draw();
}

/** Learn which models there are, and whether prompts can be rendered; ask again what stopped for want of a key. */
async function connect() {
  try {
    catalog = await api.models();
    link = "";
    settleModel();
    const body = { model: current.settings.model, messages: [{ role: "user", content: "?" }] };
    canRender = await api.render(api.HOME, body).then(() => true, () => false);
    const last = path(current).at(-1);
    const refused = Object.values(current.nodes).filter((node) => node.error?.status === 401);
    for (const node of refused) if (node === last || (node.pair && node.pair === last.pair)) again(current, node);
  } catch (error) {
    link = "No connection";
    if (error.status === 401) lock();
    else toast(`${error.message} ${error.advice}`, "Try again", connect);
  }
  drawNow();
  if (!at("panel").hidden) showPanel(true);
}

build();
join(running, () => (draw(), drawSidebar(false)));
await store.open();
open(store.conversations.get(sessionStorage.getItem("openqwen.open")) ?? fresh());
focusField();
connect();
