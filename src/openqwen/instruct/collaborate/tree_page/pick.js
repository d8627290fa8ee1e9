/** A window in which a person picks one tag of many. */

import { show } from "./dialog.js";
import { h } from "./dom.js";
import { number, t } from "./texts.js";

const MOST = 50; // choices at a time

/** A promise of the choice that is picked, or null. choices: [{value, text, count}]. */
export function pick(title, hint, choices) {
  return new Promise((resolve) => {
    let [shown, active, picked] = [[], 0, null];
    const list = h("ul", { id: "choices", role: "listbox", "aria-label": title });
    const field = h("input", {
      type: "text",
      role: "combobox",
      autocomplete: "off",
      placeholder: t("pick.search"),
      "aria-label": t("pick.search"),
      "aria-expanded": "true",
      "aria-controls": "choices",
      "aria-autocomplete": "list",
    });
    const left = h("p", { class: "hint", role: "status" });
    const draw = () => {
      const wanted = field.value.trim().toLowerCase();
      const found = choices.filter(({ text }) => text.toLowerCase().includes(wanted));
      shown = found.slice(0, MOST);
      active = Math.min(Math.max(active, 0), shown.length - 1);
      const more = found.length - shown.length;
      left.textContent = more > 0 ? t("pick.more", { n: more }) : "";
      if (!found.length) left.textContent = t("pick.none");
      list.replaceChildren(...shown.map(option));
      list.hidden = !shown.length;
      if (shown.length) field.setAttribute("aria-activedescendant", `choice-${active}`);
      else field.removeAttribute("aria-activedescendant");
      list.children[active]?.scrollIntoView({ block: "nearest" });
    };
    const option = ({ value, text, count }, n) =>
      h(
        "li",
        {
          id: `choice-${n}`,
          role: "option",
          "aria-selected": String(n === active),
          onclick: () => done(value),
        },
        h("span", { class: "name" }, text),
        count !== undefined && h("span", { class: "count" }, number.format(count)),
      );
    const done = (value) => ((picked = { value }), dialog.close());
    field.addEventListener("input", () => ((active = 0), draw()));
    field.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.isComposing) return;
      if (step) ((active += step), draw());
      else if (event.key === "Enter" && shown[active]) done(shown[active].value);
      else return;
      event.preventDefault();
    });
    const dialog = show(title, "narrow", h("p", { class: "hint" }, hint), field, list, left);
    dialog.addEventListener("close", () => resolve(picked));
    draw();
    field.focus();
  });
}
