/** A window above the page. */

import { h, iconButton } from "./dom.js";
import { t } from "./texts.js";

/** Show nodes in a window; it is removed when it is closed. Returns the window. */
export function show(title, kind, ...content) {
  const dialog = h(
    "dialog",
    { "aria-label": title, class: kind },
    h(
      "header",
      {},
      h("h2", {}, title),
      iconButton("close", t("close"), () => dialog.close()),
    ),
    content,
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
