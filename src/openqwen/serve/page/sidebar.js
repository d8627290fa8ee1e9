/** The list of conversations: choose, rename, delete, take out, bring in. */

import { download, h, iconButton, toast } from "./dom.js";
import { fromFile, titleOf } from "./tree.js";

const THEMES = { auto: "As the system", light: "Light", dark: "Dark" };

/** Draw the list. act: open, fresh, rename, remove, bring; see app.js. */
export function fillSidebar(place, conversations, current, busy, act) {
  const search = place.querySelector("input")?.value ?? "";
  const items = h("ul", { class: "list" });
  const fill = (text) => {
    const wanted = text.trim().toLowerCase();
    const found = conversations.filter((one) => !wanted || contains(one, wanted));
    items.replaceChildren(...found.map((one) => item(one, one === current, busy(one), act)));
    if (!found.length)
      items.append(h("li", { class: "hint" }, wanted ? "Nothing found." : "None yet."));
  };
  fill(search);
  const field = h("input", {
    type: "search",
    placeholder: "Search",
    "aria-label": "Search conversations",
    value: search,
    oninput: () => fill(field.value),
  });
  const focused = document.activeElement === place.querySelector("input");
  place.replaceChildren(
    h("button", { type: "button", class: "button new", onclick: act.fresh }, "New conversation"),
    conversations.length > 5 ? field : "",
    items,
  );
  if (focused && field.isConnected) field.focus();
}

function contains(conversation, text) {
  return (
    titleOf(conversation).toLowerCase().includes(text) ||
    Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(text))
  );
}

function item(conversation, current, busy, act) {
  const title = titleOf(conversation);
  const open = h(
    "button",
    {
      type: "button",
      class: "open",
      "aria-current": current && "page",
      title,
      onclick: () => act.open(conversation),
    },
    busy && h("span", { class: "busy", "aria-label": "answering" }),
    h("span", { class: "name" }, title),
  );
  const row = h("li", { class: current && "current" }, open);
  const menu = h(
    "details",
    { class: "menu" },
    h("summary", { "aria-label": `More about ${title}`, title: "More" }, "···"),
    h(
      "div",
      { class: "choices" },
      choice("Rename", () => rename(row, conversation, title, act)),
      choice("Export", () =>
        download(
          `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`,
          exported([conversation]),
        ),
      ),
      choice("Delete", () => act.remove(conversation)),
    ),
  );
  menu.addEventListener(
    "focusout",
    (event) => menu.contains(event.relatedTarget) || menu.removeAttribute("open"),
  );
  menu.addEventListener(
    "keydown",
    (event) =>
      event.key === "Escape" &&
      menu.open &&
      (event.stopPropagation(), menu.removeAttribute("open"), menu.firstChild.focus()),
  );
  menu.addEventListener(
    "click",
    (event) => event.target.closest(".choices") && menu.removeAttribute("open"),
  );
  row.append(menu);
  return row;
}

function choice(label, onclick) {
  return h("button", { type: "button", onclick }, label);
}

function rename(row, conversation, title, act) {
  const field = h("input", { type: "text", value: title, "aria-label": "Title", maxlength: "200" });
  let over = false;
  const close = (keep) => {
    if (over) return;
    over = true;
    act.rename(conversation, keep ? field.value.trim() : conversation.title);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") close(true);
    if (event.key === "Escape") (event.stopPropagation(), close(false));
  });
  field.addEventListener("blur", () => close(true));
  row.replaceChildren(field);
  field.select();
}

/** The text of an export. */
export function exported(conversations) {
  return JSON.stringify({ format: "openqwen.conversations", version: 1, conversations }, null, 1);
}

/** Theme, export of all, import. */
export function fillFoot(place, all, act) {
  const file = h("input", {
    type: "file",
    accept: ".json,.jsonl",
    hidden: true,
    "aria-label": "File to import",
  });
  file.addEventListener("change", async () => {
    try {
      for (const one of file.files) act.bring(fromFile(await one.text()));
    } catch (error) {
      toast(error.message);
    }
    file.value = "";
  });
  const theme = document.documentElement.dataset.theme;
  const next = { auto: "light", light: "dark", dark: "auto" }[theme];
  const turn = () => {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("openqwen.theme", next);
    fillFoot(place, all, act);
    place.querySelector("button").focus();
  };
  place.replaceChildren(
    iconButton(theme, `Theme: ${THEMES[theme].toLowerCase()}`, turn),
    iconButton("keys", "Keyboard shortcuts", act.keys),
    h("span", { class: "gap" }),
    h("button", { type: "button", class: "quiet text", onclick: () => file.click() }, "Import"),
    h(
      "button",
      {
        type: "button",
        class: "quiet text",
        onclick: () => download("openqwen-conversations.json", exported(all())),
      },
      "Export",
    ),
    file,
  );
}
