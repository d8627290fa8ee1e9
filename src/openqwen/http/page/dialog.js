/** Windows above the page. */

import { h, iconButton, words } from "./dom.js";

/** Show a window above the page; it is removed when it is closed. Returns the window. */
export function show(title, kind, ...content) {
  const close = iconButton("close", words.close, () => dialog.close());
  const head = h("header", {}, h("h2", {}, title), close);
  const dialog = h("dialog", { "aria-label": title, class: kind }, head, content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
