/** Pieces that the views share. */

import { announce, at, h } from "./dom.js";
import { Markdown } from "./markdown.js";
import { t } from "./texts.js";

export const letterOf = (n) => String.fromCharCode(65 + n);

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
