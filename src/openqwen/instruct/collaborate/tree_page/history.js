/** The list of edits: who did what and when, and what became of it. */

import { show } from "./dialog.js";
import { at, button, h } from "./dom.js";
import { moment, t } from "./texts.js";

/** An edit in words. */
export function said({ edit, tag, into, name, parent = null }) {
  const key = edit === "move" && parent === null ? "did.top" : `did.${edit}`;
  return t(key, { tag, into, name, parent });
}

/** Show the list. ask(before): earlier edits. undo(number): a promise of the newest edits. */
export function showHistory(newest, ask, undo) {
  const list = h("ol", { class: "history" });
  const none = h("p", {}, t("history.none"));
  const more = button(t("history.more"), async () => {
    const { history } = await ask(Number(list.lastElementChild.dataset.number));
    add(history);
  });
  const add = (entries) => {
    list.append(...entries.map(entryNode));
    none.hidden = list.childElementCount > 0;
    more.hidden = entries.length === 0 || entries.at(-1).number === 0;
  };
  const entryNode = (entry) => {
    const { number, by, at: time, undone, fault } = entry;
    const who = (one) => `${one.by || t("nobody")}, ${moment(one.at)}`;
    const act = async () => {
      const entries = await undo(undone ? undone.number : number);
      list.replaceChildren();
      add(entries ?? []);
      at(`edit-${number}`)?.focus();
    };
    const label = t(undone ? "history.redo" : "history.undo");
    const named = { id: `edit-${number}`, "aria-label": `${label}: ${said(entry)}` };
    return h(
      "li",
      { "data-number": String(number), class: undone ? "undone" : "" },
      h(
        "div",
        {},
        h("p", { class: "what" }, said(entry)),
        h("p", { class: "hint" }, who({ by, at: time })),
        undone && h("p", { class: "hint" }, t("history.undone", { who: who(undone) })),
        fault && h("p", { class: "wrong" }, t("history.fault", { fault })),
      ),
      button(label, act, "small", named),
    );
  };
  add(newest);
  show(t("history"), "", none, list, more);
}
