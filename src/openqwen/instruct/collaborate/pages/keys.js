/** Keys: what each one does, a list of them, and a person's own choice, kept in this browser. */

import { show } from "./dialog.js";
import { at, button, h } from "./dom.js";
import { t } from "./texts.js";

const KEPT = "openqwen.annotate.keys";
const DEFAULTS = {
  next: "j",
  previous: "k",
  up: "Shift+ArrowUp",
  down: "Shift+ArrowDown",
  clear: "0",
  scores: "v",
  flags: "f",
  write: "w",
  none: "n",
  comment: "m",
  guidelines: "g",
  undo: "u",
  redo: "y",
  skip: "x",
  submit: "Ctrl+Enter",
  help: "?",
};
const TYPING = "input:not([type=radio], [type=checkbox]), textarea, select";
const WHILE_TYPING = ["submit"];

function kept() {
  try {
    return { ...JSON.parse(localStorage.getItem(KEPT)) };
  } catch {
    return {};
  }
}

/** The key of an action; "" where it was switched off. */
export const keyOf = (action) => kept()[action] ?? DEFAULTS[action];

/** The name of the key that was pressed, as `Ctrl+Enter` or `j`; null for a bare modifier. */
function pressed(event) {
  if (["Control", "Shift", "Alt", "Meta"].includes(event.key)) return null;
  const symbol = event.key.length === 1;
  const parts = [];
  if (event.ctrlKey || event.metaKey) parts.push("Ctrl");
  if (event.altKey) parts.push("Alt");
  if (event.shiftKey && !symbol) parts.push("Shift");
  return [...parts, symbol ? event.key.toLowerCase() : event.key].join("+");
}

/** Call the action of a key. actions: name → function; `place(n)` gets the digits 1 to 9. */
export function press(event, actions) {
  if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  const name = pressed(event);
  const typing = event.target.closest?.(TYPING);
  if (typing && name === "Escape") return typing.blur();
  const action = Object.keys(DEFAULTS).find((one) => keyOf(one) === name);
  if (typing && !WHILE_TYPING.includes(action)) return;
  if (action && actions[action]) {
    event.preventDefault();
    actions[action]();
  } else if (/^[1-9]$/.test(name ?? "") && actions.place) {
    event.preventDefault();
    actions.place(Number(name));
  }
}

/** Keys as `kbd` elements. */
export function keyNodes(name) {
  const shown = { ArrowUp: "↑", ArrowDown: "↓", Enter: "Enter" };
  if (!name) return [h("span", { class: "hint" }, t("keys.off"))];
  return name.split(/\+(?=.)/).map((one) => h("kbd", {}, shown[one] ?? one.toUpperCase()));
}

/** The list of keys; a click on one waits for another. */
export function showKeys() {
  const list = h("dl", { class: "keys" });
  const draw = () => {
    const digits = h("dd", {}, h("kbd", {}, "1"), " – ", h("kbd", {}, "9"));
    const rows = Object.keys(DEFAULTS).flatMap((action) => [
      h("dt", {}, t(`keys.${action}`)),
      h("dd", {}, changeButton(action, draw)),
    ]);
    list.replaceChildren(h("dt", {}, t("keys.place")), digits, ...rows);
  };
  draw();
  const reset = () => {
    localStorage.removeItem(KEPT);
    draw();
  };
  const hint = h("p", { class: "hint" }, t("keys.hint"));
  show(t("keys.title"), "narrow", hint, list, button(t("keys.reset"), reset, "small"));
}

function changeButton(action, draw) {
  const wait = () => {
    face.replaceChildren(t("keys.press"));
    face.onkeydown = (event) => {
      const name = pressed(event);
      if (!name || name === "Tab") return;
      event.preventDefault();
      event.stopPropagation();
      if (name !== "Escape") choose(action, name === "Delete" || name === "Backspace" ? "" : name);
      draw();
      at(`key-${action}`).focus();
    };
    face.onblur = draw;
  };
  const props = { type: "button", class: "quiet text", id: `key-${action}`, onclick: wait };
  const face = h("button", props, keyNodes(keyOf(action)));
  return face;
}

/** Give an action a key; another action that had it loses it. */
function choose(action, name) {
  const mine = kept();
  for (const other of Object.keys(DEFAULTS))
    if (name && other !== action && keyOf(other) === name) mine[other] = "";
  mine[action] = name;
  localStorage.setItem(KEPT, JSON.stringify(mine));
}
