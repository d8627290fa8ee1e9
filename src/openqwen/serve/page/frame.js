/** The buttons at the top of the page and below the field for messages. */

import { at, h, icon, iconButton } from "./dom.js";

/** Add the buttons to the page. act: functions that they call. */
export function buildFrame(act) {
  at("top").append(
    iconButton("menu", "Conversations", act.openSidebar, { id: "open-sidebar" }),
    h("h1", { id: "title" }),
    iconButton("prompt", "Prompt as the model reads it", act.showPrompt, {
      id: "show-prompt",
      hidden: true,
    }),
    iconButton("plus", "New conversation", act.fresh, { id: "new" }),
    iconButton("sliders", "Settings", act.togglePanel, {
      id: "open-panel",
      "aria-expanded": "false",
      "aria-controls": "panel",
    }),
  );
  const round = (id, label, title, props = {}) =>
    h("button", { id, class: "round", "aria-label": label, title, ...props }, icon(id));
  const model = { type: "button", id: "model", class: "quiet text", title: "Choose the model" };
  at("composer-foot").append(
    h("button", { ...model, onclick: act.openPanel }),
    h("span", { id: "usage", class: "hint" }),
    round("send", "Send", "Send"),
    round("stop", "Stop", "Stop (Esc)", { type: "button", hidden: true, onclick: act.stopAll }),
  );
}
