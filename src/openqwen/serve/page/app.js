/** The page: which conversation is open, and what each button and key does. */

import { answer, anyRunning, isRunning, parseTools, request, running, stop } from "./answer.js";
import * as api from "./api.js";
import { showKeys, showPrompt } from "./dialogs.js";
import { dropDraft, focusField, grow, keepDraft, loadDraft } from "./composer.js";
import { announce, at, icon, number, toast } from "./dom.js";
import { buildFrame } from "./frame.js";
import { fillPanel } from "./panel.js";
import { fillFoot, fillSidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { join } from "./tabs.js";
import { add, before, merge, newConversation, newId } from "./tree.js";
import { path, ROOT, select, titleOf, versions } from "./tree.js";
import { keyForm, pair, reconcile, Turn, welcome } from "./view.js";

const TRIES = 10; // automatic requests to a busy server
const LOCKED = "A key is needed";

const store = new Store((id) => {
  if (id === current?.id && !store.conversations.has(id)) open(fresh());
  else draw();
  drawSidebar(false);
});
let current = null;
let catalog = [];
let canRender = false;
let link = "Connecting"; // to the server: "" once its models are known, else the status
const gate = keyForm(connect);
let follow = true; // the view stays at the end while text arrives
let frame = 0;
const views = new Map(); // turn id -> Turn
const waits = new Map(); // turn id -> {seconds, timer}
const tries = new Map(); // turn id -> number of automatic requests

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
      const results =
        last &&
        one === node &&
        one.calls?.length &&
        !isRunning(one) &&
        !one.error &&
        one.done !== false;
      view.update({
        conversation: current,
        last,
        chosen: one === node,
        results,
        waiting: waits.get(one.id)?.seconds,
        canRender,
      });
      view.element.classList.toggle("last", last);
      return view.element;
    });
    if (group.length === 1) return shown[0];
    const view = viewOf(node);
    const frameOfPair = views.get(node.pair) ?? { element: pair([]) };
    views.set(node.pair, frameOfPair);
    view.element.classList.add("chosen");
    for (const other of shown) if (other !== view.element) other.classList.remove("chosen");
    reconcile(frameOfPair.element, shown);
    return frameOfPair.element;
  });
  const shown = elements.length
    ? elements
    : [welcome(link || current.settings.model, store.durable)];
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
  at("usage").textContent = used
    ? limit
      ? `${all} of ${number.format(limit)} tokens`
      : `${all} tokens`
    : "";
  at("model").textContent = settings.compare
    ? `${settings.model} and ${settings.second || "no second model yet"}`
    : settings.model || "no model";
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("send").disabled = !at("composer-text").value.trim();
}

/** asked: by the user; if not, an open menu or a title being edited is left alone. */
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
  loadDraft(current.id);
  settleModel();
  drawNow();
  drawSidebar();
  if (!at("panel").hidden) showPanel(true);
}

/** A new conversation with the settings of the current one. */
function fresh() {
  return newConversation(current?.settings ?? store.list()[0]?.settings);
}

/** Replace a model that the server no longer has by the first that it has. */
function settleModel() {
  const ids = catalog.map((model) => model.id);
  const { settings } = current;
  if (ids.length && !ids.includes(settings.model)) settings.model = ids[0];
  if (ids.length && !settings.base && !ids.includes(settings.second))
    settings.second = ids.find((id) => id !== settings.model) ?? ids[0];
}

// ---- What can be done

/** Request an answer to a turn; from both models, if there is a second one. */
async function generate(conversation, parent) {
  const { settings } = conversation;
  const asked = [{ model: settings.model }];
  if (settings.compare && settings.second)
    asked.push({ model: settings.second, base: settings.base });
  const together = asked.length > 1 ? newId() : undefined;
  const nodes = asked.map((fields) =>
    add(conversation, parent, {
      role: "assistant",
      content: "",
      done: false,
      ...fields,
      ...(together && { pair: together }),
    }),
  );
  select(conversation, nodes[0]);
  follow = true;
  announce("The model answers");
  await Promise.all(nodes.map((node) => run(conversation, node)));
}

async function run(conversation, node) {
  const kept = () => store.conversations.has(conversation.id); // not deleted since
  const changed = () => {
    if (kept()) store.changed(conversation, node, true);
    if (conversation === current) draw();
  };
  const over = answer(conversation, node, changed);
  drawNow();
  drawSidebar(false);
  await over;
  if (node.error?.retry && (tries.get(node.id) ?? 0) < TRIES)
    wait(conversation, node, Math.ceil(node.error.retry));
  else if (node.error?.status === 401) lock();
  // An error is announced as an alert.
  else if (!node.error) announce(`Answer finished, ${node.stats?.tokens ?? 0} tokens`);
  if (kept()) await store.changed(conversation, node);
  drawSidebar(false);
}

/** Send the request again after the time that a busy server asks for. */
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
  node.model ||= conversation.settings.model; // not known at the first request
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
  const user = add(current, path(current).at(-1)?.id ?? ROOT, {
    role: "user",
    content: text.trim(),
  });
  store.changed(current, user);
  at("composer-text").value = "";
  keepDraft(current.id);
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
    dropDraft(conversation.id);
    Object.values(conversation.nodes).forEach((node) => (stop(node), endWait(node)));
    if (conversation === current) open(store.list()[0] ?? fresh());
    drawSidebar();
    toast(
      `“${titleOf(conversation)}” is deleted.`,
      "Undo",
      () => (store.changed(conversation), open(conversation)),
    );
  },
  bring(conversations) {
    for (const one of conversations) {
      const ours = store.conversations.get(one.id);
      store.changed(ours ? Object.assign(ours, merge(ours, one)) : one);
    }
    open(store.conversations.get(conversations[0].id));
    toast(
      conversations.length === 1
        ? "One conversation is imported."
        : `${conversations.length} conversations are imported.`,
    );
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
    const edited = add(
      current,
      node.parent,
      role === "user" ? { role, content: text } : { role, model, content: text, finish: "edited" },
    );
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
      const result = add(current, parent, {
        role: "tool",
        callId: call.id,
        name: call.name,
        content: texts[n],
      });
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
      const { model, messages, tools } = request(
        current.settings,
        turns,
        node?.model ?? current.settings.model,
      );
      if (!messages.length) toast("There is no prompt yet: write a message first.");
      else
        showPrompt(
          await api.render(api.base(node?.base ?? ""), {
            model,
            messages,
            ...(tools && { tools }),
          }),
        );
    } catch (error) {
      toast(`${error.message} ${error.advice ?? ""}`);
    }
  },
};

function stopAll() {
  for (const node of liveTurns()) (stop(node), endWait(node));
}

// ---- Fields, keys, side panels

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
  } else if (
    event.key === "Enter" &&
    event.target === field &&
    !event.shiftKey &&
    !event.isComposing &&
    !matchMedia("(pointer: coarse)").matches
  ) {
    send(field.value);
  } else return;
  event.preventDefault();
}

function build() {
  buildFrame({
    openSidebar: () => showSidebar(true),
    togglePanel: () => showPanel(at("panel").hidden),
    openPanel: () => showPanel(true),
    showPrompt: () => act.showPrompt(null),
    fresh: act.fresh,
    stopAll,
  });
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
  at("composer-text").oninput = () => (grow(), keepDraft(current.id), draw());
  at("shade").onclick = () => showSidebar(false);
  document.addEventListener("keydown", onkey);
  addEventListener(
    "beforeunload",
    (event) => anyRunning() && store.durable === false && event.preventDefault(),
  );
  const full = "The browser's storage is full. Export conversations and delete some";
  store.onfull = () => toast(`${full}, or the newest will be lost.`);
  fillFoot(at("sidebar-foot"), () => store.list(), act);
}

/** Ask the user for a key; if there is one, say that it is wrong. */
function lock() {
  link = LOCKED;
  gate.say(api.key.get() ? "The server does not accept this key." : "");
  draw();
}

/**
 * Ask the server for its models, and whether it renders prompts.
 * Requests that failed for lack of a key are sent again.
 */
async function connect() {
  try {
    catalog = await api.models();
    link = "";
    settleModel();
    const body = { model: current.settings.model, messages: [{ role: "user", content: "?" }] };
    canRender = await api.render(api.HOME, body).then(
      () => true,
      () => false,
    );
    const last = path(current).at(-1);
    const refused = Object.values(current.nodes).filter((node) => node.error?.status === 401);
    for (const node of refused)
      if (node === last || (node.pair && node.pair === last.pair)) again(current, node);
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
