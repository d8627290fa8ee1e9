/** Pieces that the views share. */

import { announce, at, h, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { t } from "./texts.js";

export const letterOf = (n) => String.fromCharCode(65 + n);

/** A button with a text. kind: of its look, as "small" or "primary". */
export const button = (text, onclick, kind = "", props = {}) =>
  h("button", { type: "button", class: `button ${kind}`, onclick, ...props }, text);

/** Show a window above the page; it is removed when it is closed. Returns the window. */
export function show(title, kind, ...content) {
  const close = iconButton("close", t("close"), () => dialog.close());
  const head = h("header", {}, h("h2", {}, title), close);
  const dialog = h("dialog", { "aria-label": title, class: kind }, head, content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Fill the page with a few words. */
export function message(title, ...content) {
  const box = h("section", { class: "message-box" }, h("h1", {}, title), content);
  at("main").replaceChildren(box);
  announce(title);
}

/** A text as Markdown. */
export function markdown(text) {
  const shown = new Markdown();
  shown.update(text);
  return shown.element;
}

/** The messages of an instruction; roles are named where there are several. */
export function promptNodes(prompt) {
  const name = (role) => prompt.length > 1 && h("p", { class: "eyebrow" }, t(`role.${role}`));
  return prompt.map(({ role, content }) =>
    h("div", { class: `message ${role}` }, name(role), markdown(content)),
  );
}
