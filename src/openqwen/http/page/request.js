/** Requests to a server whose clients show an API key. */

import { button, h } from "./dom.js";

const KEY = "openqwen.key";

/** What is wrong. status 0: no response. */
export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** The response; its status is good. offline: what to say where there is none. */
export async function send(path, offline, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, offline);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Refusal(response.status, error?.message ?? `Status ${response.status}.`, error?.code);
}

/** Options of a request that changes something. */
export const posted = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});

/** A form for the server's key; draw(): shows the page anew. */
export function keyForm(draw, label = "Key", use = "Use this key") {
  const field = h("input", { type: "password", "aria-label": label, autocomplete: "off" });
  const onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, field.value.trim());
    draw();
  };
  const go = button(use, null, "primary", { type: "submit" });
  return h("form", { class: "row", onsubmit }, field, go);
}
