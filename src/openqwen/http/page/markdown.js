/** Shows Markdown while it is written; unchanged parts keep their nodes, so nothing flickers. */

import { blocks } from "./blocks.js";
import { copyButton, h, words } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

/** One text in one element. */
export class Markdown {
  constructor() {
    this.element = h("div", { class: "markdown" });
    this.shown = []; // {block, view}, in order
    this.text = null;
  }

  /** Show a text, whole each time. live: more will come. */
  update(text, live = false) {
    if (text === this.text && live === this.live) return;
    Object.assign(this, { text, live });
    const wanted = blocks(text);
    wanted.forEach((block, n) => {
      const open = live && n === wanted.length - 1;
      const old = this.shown[n];
      if (old && old.block.raw === block.raw && old.block.kind === block.kind && old.open === open)
        return;
      if (old?.view.grow?.(block, open)) Object.assign(old, { block, open });
      else this.place(n, { block, open, view: show(block, open) });
    });
    for (const extra of this.shown.splice(wanted.length)) extra.view.element.remove();
  }

  place(n, entry) {
    if (this.shown[n]) this.shown[n].view.element.replaceWith(entry.view.element);
    else this.element.append(entry.view.element);
    this.shown[n] = entry;
  }
}

/** A block's element, and for code the way to lengthen it in place. */
function show(block, live) {
  if (block.kind === "code") return code(block, live);
  return { element: element(block, live) };
}

function element(block, live) {
  switch (block.kind) {
    case "heading":
      return h(
        `h${Math.min(block.level + 2, 6)}`,
        { class: `level-${block.level}` },
        inline(block.text, live),
      );
    case "rule":
      return h("hr");
    case "math":
      return h("div", { class: "math block", tabindex: "0" }, block.text);
    case "quote":
      return h("blockquote", {}, children(block.children, live));
    case "list":
      return list(block, live);
    case "table":
      return table(block, live);
    default:
      return h("p", {}, inline(block.text, live));
  }
}

function children(all, live) {
  return all.map((block, n) => show(block, live && n === all.length - 1).element);
}

function list(block, live) {
  const items = block.items.map((item, n) => {
    const last = live && n === block.items.length - 1;
    const [first, ...rest] = item;
    const task = first?.kind === "paragraph" && /^\[([ xX])\]\s+/.exec(first.text);
    const opening = task ? { ...first, text: first.text.slice(task[0].length) } : first;
    const box =
      task &&
      h("input", {
        type: "checkbox",
        disabled: true,
        checked: task[1] !== " ",
        "aria-label": task[1] === " " ? "to do" : "done",
      });
    if (!block.loose) {
      const parts = item.length ? [opening, ...rest] : [];
      const nodes = parts.flatMap((part, m) => {
        const open = last && m === parts.length - 1;
        return part.kind === "paragraph"
          ? [...inline(part.text, open).childNodes]
          : [show(part, open).element];
      });
      return h("li", { class: task && "task" }, box, nodes);
    }
    return h(
      "li",
      { class: task && "task" },
      box,
      opening ? children([opening, ...rest], last) : [],
    );
  });
  const props = block.ordered && block.start !== 1 ? { start: block.start } : {};
  return h(block.ordered ? "ol" : "ul", props, items);
}

function table({ aligned, head, rows }, live) {
  const row = (texts, tag, last) =>
    h(
      "tr",
      {},
      texts.map((text, n) => {
        return h(
          tag,
          { class: aligned[n] && `to-${aligned[n]}`, scope: tag === "th" && "col" },
          inline(text, last && n === texts.length - 1),
        );
      }),
    );
  const body =
    rows.length > 0 &&
    h(
      "tbody",
      {},
      rows.map((texts, n) => row(texts, "td", live && n === rows.length - 1)),
    );
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": words.table },
    h("table", {}, h("thead", {}, row(head, "th", false)), body),
  );
}

function code(block, live) {
  let shown = block;
  const text = h("code", {});
  const name = h("span", { class: "language" }, block.language || "text");
  const figure = h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      {},
      name,
      copyButton(() => shown.text, words.code),
    ),
    h("pre", { tabindex: "0" }, text),
  );
  const paint = (next, open) => {
    shown = next;
    if (open) text.textContent = next.text;
    else text.replaceChildren(highlight(next.text, next.language));
  };
  paint(block, live);
  const grow = (next, open) => {
    if (next.kind !== "code" || next.language !== shown.language) return false;
    if (
      open &&
      next.text.startsWith(shown.text) &&
      text.firstChild?.nodeType === Node.TEXT_NODE &&
      text.childNodes.length === 1
    ) {
      text.firstChild.appendData(next.text.slice(shown.text.length));
      shown = next;
    } else paint(next, open);
    return true;
  };
  return { element: figure, grow };
}
