/**
 * The tree as rows. Only those in sight are in the page, so that thousands stay quick.
 *
 * The focus is on the tree itself, and the active row is its `aria-activedescendant`.
 */

import { h, icon } from "./dom.js";
import { number, t } from "./texts.js";

const BEYOND = 8; // rows above and below those in sight

export class TagRows {
  /** onactive(): another row is active. onselect(): other rows are selected or found. */
  constructor({ onactive, onselect }) {
    const props = { id: "tree", role: "tree", tabindex: "0", "aria-multiselectable": "true" };
    this.inner = h("div", { role: "none" });
    this.element = h("div", { ...props, "aria-label": t("tree") }, this.inner);
    this.element.addEventListener("scroll", () => this.paint());
    this.element.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.paint()).observe(this.element);
    Object.assign(this, { onactive, onselect, tags: new Map(), rows: [], roots: [], active: null });
    Object.assign(this, { selected: new Set(), closed: new Set(), wanted: "", editing: false });
  }

  /** Show these tags: [name, count, parent, forms …] each. */
  set(tags) {
    const place = Math.max(this.place(), 0);
    this.tags = new Map();
    for (const [name, count, parent, ...forms] of tags)
      this.tags.set(name, { name, count, parent, forms, children: [] });
    this.roots = [];
    for (const tag of this.tags.values())
      (this.tags.get(tag.parent)?.children ?? this.roots).push(tag);
    const order = (a, b) => b.count - a.count || (a.name < b.name ? -1 : 1);
    for (const some of [this.roots, ...[...this.tags.values()].map((tag) => tag.children)])
      some.sort(order);
    this.most = Math.max(1, ...[...this.tags.values()].map(({ count }) => count));
    for (const name of this.selected) if (!this.tags.has(name)) this.selected.delete(name);
    this.layout();
    this.go(this.tags.has(this.active) ? this.place() : place, false);
  }

  /** Show the tags whose name or form has a text, and the tags above them. */
  find(text) {
    this.wanted = text.trim().toLowerCase();
    this.layout();
    if (!this.found.has(this.tags.get(this.active)))
      this.go(this.rows.findIndex(({ tag }) => this.found.has(tag)));
  }

  layout() {
    const has = ({ name, forms }) =>
      [name, ...forms].some((one) => one.toLowerCase().includes(this.wanted));
    this.found = new Set([...this.tags.values()].filter(has));
    const shown = new Set(this.found);
    for (const tag of this.found) for (const one of this.above(tag)) shown.add(one);
    this.rows = [];
    const add = (tags, level) => {
      const some = tags.filter((tag) => shown.has(tag));
      for (const [n, tag] of some.entries()) {
        this.rows.push({ tag, level, place: n + 1, of: some.length });
        if (this.isOpen(tag)) add(tag.children, level + 1);
      }
    };
    add(this.roots, 1);
    this.paint();
    this.onselect();
  }

  /** The tags above one, the nearest first. */
  above(tag) {
    const found = [];
    while ((tag = this.tags.get(tag.parent))) found.push(tag);
    return found;
  }

  isOpen = ({ name }) => Boolean(this.wanted) || !this.closed.has(name);
  place = () => this.rows.findIndex(({ tag }) => tag.name === this.active);
  current = () => this.tags.get(this.active) ?? null;

  /** What an action is done to: the selected tags, or else the active one. */
  targets() {
    const chosen = [...this.selected].map((name) => this.tags.get(name));
    return chosen.length ? chosen : [this.current()].filter(Boolean);
  }

  paint() {
    if (this.editing) return;
    const height = parseFloat(getComputedStyle(this.element).getPropertyValue("--row"));
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(Math.floor(scrollTop / height) - BEYOND, 0);
    const last = Math.ceil((scrollTop + clientHeight) / height) + BEYOND;
    this.inner.style.height = `${height * this.rows.length}px`;
    this.inner.style.paddingTop = `${height * first}px`;
    const rows = this.rows.slice(first, last).map((row, n) => this.row(row, first + n));
    this.inner.replaceChildren(...rows);
    const place = this.place();
    if (place >= first && place < last) // else it is not in the page
      this.element.setAttribute("aria-activedescendant", `row-${place}`);
    else this.element.removeAttribute("aria-activedescendant");
  }

  row({ tag, level, place, of }, index) {
    const { name, count, children } = tag;
    const [selected, open] = [this.selected.has(name), this.isOpen(tag)];
    const look = ["tag", name === this.active && "active", !this.found.has(tag) && "above"];
    const share = h("span", { class: "share" });
    share.style.width = `${(100 * count) / this.most}%`;
    const node = h(
      "div",
      {
        id: `row-${index}`,
        class: look.filter(Boolean).join(" "),
        role: "treeitem",
        "aria-level": String(level),
        "aria-posinset": String(place),
        "aria-setsize": String(of),
        "aria-selected": String(selected),
        "aria-expanded": children.length > 0 && String(open),
        "aria-label": `${name}, ${t("instructions", { n: count })}`,
      },
      h("span", { class: "fold" }, children.length > 0 && icon(open ? "fold" : "right")),
      h("span", { class: "box" }, selected && icon("check")),
      h("span", { class: "name" }, name),
      h("span", { class: "bar" }, share),
      h("span", { class: "count" }, number.format(count)),
    );
    node.style.setProperty("--level", Math.min(level - 1, 8));
    return node;
  }

  click(event) {
    const row = event.target.closest(".tag");
    if (!row || this.editing) return;
    const place = Number(row.id.slice(4));
    const { tag } = this.rows[place];
    if (event.target.closest(".fold") && tag.children.length) this.fold(tag, this.isOpen(tag));
    else if (event.shiftKey) this.range(place);
    else if (event.target.closest(".box") || event.ctrlKey || event.metaKey) this.toggle(place);
    else this.go(place);
  }

  /** Make a row active and bring it into sight. */
  go(place, said = true) {
    this.active = this.rows[Math.min(Math.max(place, 0), this.rows.length - 1)]?.tag.name ?? null;
    const height = parseFloat(getComputedStyle(this.element).getPropertyValue("--row"));
    const top = this.place() * height;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + height > scrollTop + clientHeight)
      this.element.scrollTop = top + height - clientHeight;
    this.paint();
    if (said) this.onactive();
  }

  /** Make a tag active, whatever is folded. */
  show(name) {
    for (const one of this.tags.has(name) ? this.above(this.tags.get(name)) : [])
      this.closed.delete(one.name);
    this.active = name;
    this.layout();
    if (this.place() >= 0) this.go(this.place());
  }

  fold(tag, closed) {
    if (closed) this.closed.add(tag.name);
    else this.closed.delete(tag.name);
    this.layout();
    if (this.place() < 0) this.show(tag.name);
  }

  toggle(place) {
    const { name } = this.rows[place].tag;
    if (!this.selected.delete(name)) this.selected.add(name);
    this.go(place);
    this.onselect();
  }

  /** Select the rows from the active one to this one. */
  range(place) {
    const [from, to] = [this.place(), place].sort((a, b) => a - b);
    for (const { tag } of this.rows.slice(Math.max(from, 0), to + 1)) this.selected.add(tag.name);
    this.go(place);
    this.onselect();
  }

  selectFound() {
    for (const tag of this.found) this.selected.add(tag.name);
    this.paint();
    this.onselect();
  }

  clear() {
    this.selected.clear();
    this.paint();
    this.onselect();
  }

  /** Whether a key moved, folded or selected something. */
  press(event) {
    const place = this.place();
    const tag = this.current();
    const page = Math.floor(this.element.clientHeight / 40);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    const far = { Home: 0, End: this.rows.length - 1 };
    const { key } = event;
    if (key in steps && event.shiftKey)
      this.range(Math.min(Math.max(place + steps[key], 0), this.rows.length - 1));
    else if (key in steps) this.go(place + steps[key]);
    else if (key in far) this.go(far[key]);
    else if (key === "ArrowRight" && tag?.children.length) {
      if (this.isOpen(tag)) this.go(place + 1);
      else this.fold(tag, false);
    } else if (key === "ArrowLeft" && tag) {
      if (tag.children.length && this.isOpen(tag) && !this.wanted) this.fold(tag, true);
      else if (tag.parent) this.show(tag.parent);
    } else if (key === " " && tag) this.toggle(place);
    else if (key === "Escape" && this.selected.size) this.clear();
    else if (key.toLowerCase() === "a" && (event.ctrlKey || event.metaKey)) this.selectFound();
    else return false;
    return true;
  }

  /** Let the active row's name be written anew: a promise of the new name, or null. */
  rename() {
    this.go(this.place());
    const { name } = this.current();
    const host = this.inner.querySelector(".active .name");
    const field = h("input", { value: name, maxlength: "200", "aria-label": t("rename.field") });
    host.replaceChildren(field);
    this.editing = true;
    field.select();
    field.focus();
    return new Promise((resolve) => {
      const end = (kept) => {
        if (!this.editing) return;
        const given = field.value.trim().replace(/\s+/g, " ");
        const focused = document.activeElement === field;
        this.editing = false;
        this.paint();
        if (focused) this.element.focus();
        resolve(kept && given && given !== name ? given : null);
      };
      field.addEventListener("blur", () => end(true));
      field.addEventListener("keydown", (event) => {
        event.stopPropagation();
        if (event.key === "Enter" && !event.isComposing) end(true);
        else if (event.key === "Escape") end(false);
      });
    });
  }
}
