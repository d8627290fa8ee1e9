/** Builds the page from nodes. Text becomes a text node, so a model's text is never HTML. */

/** The element of an id. */
export const at = (id) => document.getElementById(id);

/** An element with attributes, listeners (`onclick`) and children; null and false are left out. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

/** Line drawings on a 24 × 24 grid. */
const DRAWINGS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  edit: "M5 19l1-4L16.5 4.5l3 3L9 18zM14 7l3 3",
  fold: "M6 10l6 6 6-6",
  again: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4M19.5 4v4.2h-4.2",
  prompt: "M6 4h12v16H6zM9 8.5h6M9 12h6M9 15.5h3.5",
  check: "M5 12.5l4.5 4.5L19 7.5",
  tokens: "M4 7h5v4H4zM11 7h9v4h-9zM4 14h9v4H4zM15 14h5v4h-5z",
  sliders: "M4 8h8M18 8h2M4 16h3M13 16h7M15 5.5v5M10 13.5v5",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4" +
    "M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  dark: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 4v16M12 8h5.5M12 12h8M12 16h6.5",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  undo: "M9 6L4 11l5 5M4 11h10a6 6 0 0 1 6 6v2",
  redo: "M15 6l5 5-5 5M20 11H10a6 6 0 0 0-6 6v2",
  history: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 8v4.5l3 2",
  keys: "M3 7h18v10H3zM7 10.5h.01M11 10.5h.01M15 10.5h.01M8 14h8",
};

/** A decorative drawing; its button carries the name. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", DRAWINGS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows a drawing and is called `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button",
    { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...props },
    icon(name),
  );
}

/** A button with a text. kind: of its look, as "small" or "primary". */
export const button = (text, onclick, kind = "", props = {}) =>
  h("button", { type: "button", class: `button ${kind}`, onclick, ...props }, text);

const THEMES = { auto: "light", light: "dark", dark: "auto" };

/** A button that goes from the system's theme to light, to dark, and back. */
export function themeButton(label) {
  const root = document.documentElement;
  const change = () => {
    const chosen = THEMES[root.dataset.theme] ?? "auto";
    root.dataset.theme = chosen;
    localStorage.setItem("openqwen.theme", chosen);
    face.replaceChildren(icon(chosen));
  };
  const face = iconButton(root.dataset.theme, label, change);
  return face;
}

/** Words on shared buttons; a page in another language sets its own. */
export const words = {
  close: "Close",
  copy: "Copy",
  copied: "Copied",
  code: "Copy code",
  table: "Table",
};

/** Copy text, also without the clipboard API, which exists in a secure context only. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { value: text, class: "offscreen", readonly: true });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A button that copies `text()` and says so for a moment, in a word or (drawn) in a drawing. */
export function copyButton(text, label, drawn = false) {
  const face = (done) => (drawn ? icon(done ? "check" : "copy") : done ? words.copied : words.copy);
  let timer = 0;
  const onclick = async () => {
    await copy(text());
    button.replaceChildren(face(true));
    announce(words.copied);
    clearTimeout(timer);
    timer = setTimeout(() => button.replaceChildren(face(false)), 1600);
  };
  const button = h(
    "button",
    {
      type: "button",
      class: drawn ? "quiet" : "quiet text",
      "aria-label": label,
      title: drawn && label,
      onclick,
    },
    face(false),
  );
  return button;
}

/** Tell a screen reader. */
export function announce(text) {
  at("status").textContent = text;
}

/** A line at the foot of the page for some seconds, with one action perhaps ("Undo"). */
export function toast(text, action = null, onaction = null) {
  const place = at("toasts");
  const box = h("div", { class: "toast" }, h("span", {}, text));
  const gone = setTimeout(() => box.remove(), 8000);
  const done = () => (clearTimeout(gone), box.remove());
  if (action)
    box.append(
      h(
        "button",
        { type: "button", class: "quiet text", onclick: () => (done(), onaction()) },
        action,
      ),
    );
  place.replaceChildren(box);
}

/** Give a file to the browser to save. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const number = new Intl.NumberFormat("en");
