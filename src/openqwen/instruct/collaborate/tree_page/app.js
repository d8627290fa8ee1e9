/** The page of a tree of tags: people merge, rename, move and drop, and can undo all of it. */

import { detailNodes } from "./detail.js";
import { show } from "./dialog.js";
import { announce, at, button, h, iconButton, themeButton, toast } from "./dom.js";
import { said, showHistory } from "./history.js";
import { newKey, Outbox } from "./outbox.js";
import { pick } from "./pick.js";
import { keyForm, posted, send } from "./request.js";
import { TagRows } from "./rows.js";
import { known, languageChoice, speak, t } from "./texts.js";

const EVERY = 4000; // milliseconds between two looks for others' edits
const KEYS = {
  ArrowUp: "keys.move",
  ArrowRight: "keys.fold",
  Space: "keys.select",
  "Ctrl A": "keys.all",
  Enter: "keys.detail",
  F2: "rename",
  M: "merge",
  V: "move",
  Delete: "drop",
  "Ctrl Z": "undo",
  "Ctrl Y": "redo",
  H: "history",
  "/": "search",
  "?": "keys",
};
let [about, state, outbox, rows, busy] = [null, null, null, null, false];

const call = async (path, options) => {
  const response = await send(`api/${path}`, t("error.offline"), options);
  return response.json();
};
const query = (path, values) => call(`${path}?${new URLSearchParams(values)}`);
const person = () => localStorage.getItem("openqwen.person") ?? about.person;

async function start() {
  await speak();
  try {
    about = await call("about");
    document.title = `${t("tree")}: ${about.title}`;
    outbox?.close();
    outbox = new Outbox(`tree.${about.id}`, {
      send: ({ body }) => call("edits", posted(body)),
      onchange: drawActions,
      onrefused: refused,
    });
    await draw();
    await outbox.flush(); // what an earlier page could not send
    take(await query("tree", { by: person() }));
  } catch (error) {
    const again = error.status === 401 ? keyForm(start, t("key"), t("key.use")) : null;
    at("main").replaceChildren(
      h("div", { class: "trouble", role: "alert" }, h("p", {}, error.message), again),
    );
    if (!again) setTimeout(start, EVERY);
    if (error.status === undefined) throw error;
  }
}

/** Build the page in the chosen language. */
async function draw() {
  const before = rows;
  rows = new TagRows({ onactive: drawDetail, onselect: drawActions });
  if (before) Object.assign(rows, { active: before.active, selected: before.selected });
  const search = h("input", {
    id: "search",
    type: "search",
    placeholder: t("search"),
    "aria-label": t("search"),
    autocomplete: "off",
    oninput: (event) => rows.find(event.target.value),
  });
  const tool = (name, act) => iconButton(name, t(name), act, { id: name });
  at("skip-link").textContent = t("skip");
  at("top").replaceChildren(
    h("h1", { class: "brand" }, about.title),
    h("span", { id: "saved", class: "hint", role: "status" }),
    search,
    tool("undo", () => step("undo")),
    tool("redo", () => step("redo")),
    tool("history", openHistory),
    h("span", { class: "gap" }),
    languageChoice(draw),
    themeButton(t("theme")),
    tool("keys", showKeys),
    button(person() || t("nobody"), () => askName(), "small", { id: "person", title: t("person") }),
  );
  at("main").replaceChildren(
    h("div", { id: "found", class: "row between" }),
    rows.element,
    h("div", { id: "actions", role: "toolbar", "aria-label": t("actions") }),
  );
  at("detail").setAttribute("aria-label", t("detail"));
  if (state) take(state);
}

/** Show the tree as the server has it. */
function take(found, next = null) {
  state = found;
  rows.set(found.tags);
  if (next && rows.tags.has(next)) rows.show(next);
  else drawDetail();
}

function drawActions() {
  const targets = rows.targets();
  const waiting = outbox.waiting().length > 0 && !busy;
  const count = rows.selected.size;
  const act = (name, run, few = true) =>
    button(t(name), run, "", { id: name, disabled: waiting || !targets.length || !few });
  const focused = document.activeElement?.id;
  at("actions").replaceChildren(
    h("p", {}, count ? t("selected", { n: count }) : targets[0]?.name ?? t("none")),
    ...(count ? [button(t("clear"), () => rows.clear(), "", { id: "clear" })] : []),
    act("rename", rename, targets.length === 1),
    act("merge", merge),
    act("move", move),
    act("drop", drop),
    button(t("detail"), openDetail, "", { id: "open-detail", disabled: !rows.current() }),
  );
  if (focused) at(focused)?.focus();
  const [found, all] = [rows.found?.size ?? 0, rows.tags.size];
  at("found").replaceChildren(
    h("p", { class: "hint", role: "status" }, t(rows.wanted ? "found" : "tags", { n: all, found })),
    ...(rows.wanted && found ? [button(t("selectFound"), () => rows.selectFound(), "small")] : []),
  );
  at("saved").textContent = waiting ? t("waiting") : "";
  at("undo").disabled = waiting || !state?.undo.length;
  at("redo").disabled = waiting || !state?.redo.length;
}

async function drawDetail() {
  drawActions();
  const tag = rows.current();
  if (!tag) return at("detail").replaceChildren(h("p", { class: "hint" }, t("none")));
  const above = rows.above(tag).map(({ name }) => name);
  const ask = (offset) => query("tag", { name: tag.name, offset });
  const nodes = await ask(0).then(
    (found) => detailNodes(found, above.reverse(), (name) => rows.show(name), ask),
    (error) => [h("p", { class: "wrong" }, error.message)],
  );
  if (rows.active !== tag.name) return;
  const close = iconButton("close", t("detail.close"), closeDetail, { id: "close-detail" });
  at("detail").replaceChildren(
    h("header", { class: "row between" }, h("h2", { tabindex: "-1" }, tag.name), close),
    ...nodes,
  );
}

/** Send edits that belong together. next: the tag to go to. */
async function perform(edits, next = null) {
  if (busy) return null;
  if (!person() && !(await askName())) return null;
  if (outbox.waiting().length) return toast(t("waiting"));
  busy = true;
  const key = newKey();
  const body = { key, after: state.version, by: person(), edits };
  const found = await outbox.add({ key, body }).finally(() => (busy = false));
  drawActions();
  if (!found) return null;
  rows.selected.clear();
  take(found, next);
  return found;
}

async function change(edits, next) {
  if (!(await perform(edits, next))) return;
  const n = edits.length;
  const what = n === 1 ? said(edits[0]) : t(`did.${edits[0].edit}.many`, { n });
  announce(what);
  toast(what, t("undo"), () => step("undo"));
}

async function step(kind) {
  const numbers = state[kind];
  if (!numbers.length) return;
  const edits = numbers.map((undoes) => ({ edit: "undo", undoes }));
  if (await perform(edits)) toast(t(`did.${kind}`, { n: numbers.length }));
}

async function rename() {
  if (rows.selected.size) rows.show([...rows.selected][0]);
  const { name: tag } = rows.current();
  const name = await rows.rename();
  if (name && rows.tags.has(name)) toast(t("rename.taken", { name }));
  else if (name) await change([{ edit: "rename", tag, name }], name);
}

async function merge() {
  const targets = rows.targets();
  const rest = [...rows.tags.values()].filter((tag) => !targets.includes(tag));
  const order = (a, b) => b.count - a.count;
  const first = targets.length > 1 ? [...targets].sort(order) : [];
  const choices = [...first, ...rest.sort(order)].map(asChoice);
  const title = t("merge.title", { n: targets.length, tag: targets[0].name });
  const picked = await pick(title, t("merge.hint"), choices);
  if (!picked) return;
  const into = picked.value;
  const away = targets.filter(({ name }) => name !== into);
  const edits = away.map(({ name: tag }) => ({ edit: "merge", tag, into }));
  await change(edits, into);
}

async function move() {
  const targets = rows.targets();
  const free = (tag) => ![tag, ...rows.above(tag)].some((one) => targets.includes(one));
  const rest = [...rows.tags.values()].filter(free).sort((a, b) => b.count - a.count);
  const choices = [{ value: null, text: t("move.top") }, ...rest.map(asChoice)];
  const title = t("move.title", { n: targets.length, tag: targets[0].name });
  const picked = await pick(title, t("move.hint"), choices);
  if (!picked) return;
  const parent = picked.value === null ? {} : { parent: picked.value };
  await change(targets.map(({ name: tag }) => ({ edit: "move", tag, ...parent })), targets[0].name);
}

const asChoice = ({ name, count }) => ({ value: name, text: name, count });
const drop = () => change(rows.targets().map(({ name: tag }) => ({ edit: "drop", tag })));

/** The server did not take an edit, for somebody else has changed its tags, perhaps. */
async function refused(entry, error) {
  outbox.drop("refused", entry.key);
  const text = known(`error.${error.code}`) ? t(`error.${error.code}`) : "";
  const did = entry.body.edits.filter(({ edit }) => edit !== "undo").map(said).join(" ");
  toast(`${text} ${error.message} ${did}`, t("history"), openHistory);
  await look(true);
}

/** Look whether others have changed the tree. */
async function look(now = false) {
  if (!state || rows.editing || (!now && (busy || document.visibilityState === "hidden"))) return;
  try {
    const { version } = state;
    const found = await query("tree", { by: person(), version });
    if (found.version === state.version || (busy && !now)) return;
    const other = found.history.find((one) => one.number >= version && one.by !== person());
    take(found);
    if (other && !now) toast(`${other.by || t("nobody")}: ${said(other)}`);
    else if (!now) toast(t("changed"));
  } catch (error) {
    at("saved").textContent = error.message;
  }
}

function openHistory() {
  const undo = async (undoes) => {
    await perform([{ edit: "undo", undoes }]);
    return state.history;
  };
  showHistory(state.history, (before) => query("history", { before }), undo);
}

/** Ask for the person's name; a promise of whether there is one. */
function askName() {
  return new Promise((resolve) => {
    const field = h("input", { id: "name", value: person(), maxlength: "200" });
    const onsubmit = (event) => {
      event.preventDefault();
      localStorage.setItem("openqwen.person", field.value.trim());
      dialog.close();
    };
    const save = button(t("person.use"), null, "primary", { type: "submit" });
    const label = h("label", { for: "name" }, t("person.name"));
    const hint = h("p", { class: "hint" }, t("person.hint"));
    const form = h("form", { class: "field", onsubmit }, label, field, hint, h("p", {}, save));
    const dialog = show(t("person"), "narrow", form);
    dialog.addEventListener("close", async () => {
      at("person").textContent = person() || t("nobody");
      state = { ...state, ...(await query("tree", { by: person() }).catch(() => state)) };
      drawActions();
      resolve(Boolean(person()));
    });
  });
}

function showKeys() {
  const face = { ArrowUp: "↑ ↓", ArrowRight: "→ ←" };
  const keys = Object.entries(KEYS).flatMap(([key, what]) => [
    h("dt", {}, t(what)),
    h("dd", {}, (face[key] ?? key).split(" ").map((one) => h("kbd", {}, one))),
  ]);
  show(t("keys"), "narrow", h("dl", { class: "keys" }, keys));
}

function openDetail() {
  document.body.classList.add("with-detail");
  at("shade").hidden = false;
  at("detail").querySelector("h2")?.focus();
}

function closeDetail() {
  document.body.classList.remove("with-detail");
  at("shade").hidden = true;
  rows.element.focus();
}

function press(event) {
  if (!state || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const control = event.ctrlKey || event.metaKey;
  const inTree = event.target === rows.element;
  const inSearch = event.target.id === "search";
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const plain = { m: merge, v: move, Delete: drop, h: openHistory, Enter: openDetail };
  if (inSearch && ["ArrowDown", "Enter"].includes(key)) rows.element.focus();
  else if (inSearch && key === "Escape") {
    at("search").value = "";
    rows.find("");
    rows.element.focus();
  } else if (key === "Escape" && document.body.matches(".with-detail")) closeDetail();
  else if (event.target.closest("input, select, textarea")) return;
  else if (control && key === "z") step(event.shiftKey ? "redo" : "undo");
  else if (control && key === "y") step("redo");
  else if (inTree && rows.press(event));
  else if (control || event.altKey) return;
  else if (key === "/") at("search").focus();
  else if (key === "?") showKeys();
  else if (inTree && key in plain && rows.current()) plain[key]();
  else if (inTree && key === "F2" && rows.targets().length === 1) rename();
  else return;
  event.preventDefault();
}

addEventListener("keydown", press);
addEventListener("focus", () => look());
setInterval(look, EVERY);
at("shade").addEventListener("click", closeDetail);
await start();
rows?.element.focus();
