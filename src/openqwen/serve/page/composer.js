/** The field for messages: its height, and the drafts that it keeps, one for each conversation. */

import { at } from "./dom.js";

const name = (id) => `openqwen.draft.${id}`;

/** Fit the field's height to its text. */
export function grow() {
  const area = at("composer-text");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
}

/** Focus the field, but not on a touch screen, where that would open the keyboard. */
export function focusField() {
  if (!matchMedia("(pointer: coarse)").matches) at("composer-text").focus();
}

/** Put a conversation's draft into the field. */
export function loadDraft(id) {
  at("composer-text").value = localStorage.getItem(name(id)) ?? "";
  grow();
}

/** Keep the field's text as a conversation's draft. */
export function keepDraft(id) {
  const text = at("composer-text").value;
  if (text) localStorage.setItem(name(id), text);
  else dropDraft(id);
}

export function dropDraft(id) {
  localStorage.removeItem(name(id));
}
