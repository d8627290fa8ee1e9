/** The data page: the address holds the filters and the record, so every view has a link. */

import * as api from "./api.js";
import {
  announce,
  at,
  button,
  copy,
  download,
  h,
  iconButton,
  number,
  themeButton,
  toast,
} from "./dom.js";
import { facets } from "./facets.js";
import { list } from "./list.js";
import { recordNodes, trouble } from "./record.js";
import { keyForm } from "./request.js";

const view = { plain: false, difference: false };
let about = null;
let shown = null; // the record that is shown, or null
let asked = ""; // the filters that the statistics stand for
let waiting = new AbortController();

/** The filters and the record of the address. */
const params = () => new URLSearchParams(location.search);

function filtersOf(all) {
  const filters = new URLSearchParams(all);
  filters.delete("record");
  return filters;
}

/** The address with some parameters changed; null removes one. */
function address(changes, from = params()) {
  for (const [name, value] of Object.entries(changes))
    if (value === null) from.delete(name);
    else from.set(name, value);
  return `${location.pathname}?${from}`.replace(/\?$/, "");
}

function go(changes) {
  history.pushState(null, "", address(changes));
  draw();
}

/** Change filters: the list begins anew, and a record that was shown is left. */
const change = (changes) => go({ record: null, offset: null, ...changes });

async function draw() {
  waiting.abort();
  waiting = new AbortController();
  const { signal } = waiting;
  const all = params();
  try {
    about ??= await api.ask("api/source", signal);
    drawTop();
    await (all.has("record") ? drawRecord(all, signal) : drawList(all, signal));
    await drawFilters(filtersOf(all), signal);
  } catch (error) {
    if (error.name !== "AbortError") drawError(error);
  }
}

async function drawList(all, signal) {
  const page = await api.ask(`api/records?${filtersOf(all)}`, signal);
  shown = null;
  document.title = `${about.source}: data`;
  at("main").replaceChildren(...list(page, filtersOf(all), { address, go, change }));
  at("main").scrollTop = 0;
  announce(`${number.format(page.total)} records`);
}

async function drawRecord(all, signal) {
  const name = encodeURIComponent(all.get("record"));
  const found = await api.ask(`api/records/${name}?${filtersOf(all)}`, signal);
  const again = shown?.number === found.number;
  shown = found;
  document.title = `Record ${found.number}: ${about.source}`;
  paintRecord();
  if (!again) at("main").scrollTop = 0;
  announce(`Record ${found.number}`);
}

function paintRecord() {
  const record = shown;
  const toggle = (name, said) =>
    h(
      "button",
      {
        type: "button",
        class: "quiet text",
        "aria-pressed": String(view[name]),
        onclick: () => ((view[name] = !view[name]), paintRecord()),
      },
      said,
    );
  const save = async () => {
    try {
      const raw = await api.text(`api/records/${record.number}/raw`);
      download(`record-${record.number}.json`, raw);
    } catch (error) {
      toast(error.message);
    }
  };
  const link = async () => {
    await copy(location.href);
    toast("The link to this record is copied.");
  };
  at("main").replaceChildren(
    h(
      "div",
      { class: "bar" },
      iconButton("left", "Previous record (K)", () => move("previous"), {
        disabled: record.previous === null,
      }),
      iconButton("right", "Next record (J)", () => move("next"), {
        disabled: record.next === null,
      }),
      h("h1", {}, `Record ${number.format(record.number)}`),
      h("span", { class: "gap" }),
      toggle("plain", "Plain text"),
      record.chosen && toggle("difference", "Difference"),
      iconButton("copy", "Copy the link to this record", link),
      iconButton("down", "Save the raw record", save),
      iconButton("close", "Back to the list (Esc)", () => go({ record: null })),
    ),
    h("p", { class: "hint place" }, placeOf(record)),
    ...(record.tags?.length ? [h("p", { class: "chips" }, record.tags.map(chip))] : []),
    h("article", { class: "record" }, recordNodes(record, view)),
  );
}

function placeOf(record) {
  const parts = [`${number.format(record.place + 1)} in the list`];
  if (record.form) parts.push(record.form);
  if (record.grade !== null && record.grade !== undefined) parts.push(`grade ${record.grade}`);
  parts.push(`${number.format(record.bytes)} bytes`);
  parts.push(`${record.file}:${record.line}`);
  return parts.join(" · ");
}

function chip(tag) {
  return h("button", { type: "button", class: "chip", onclick: () => change({ tag }) }, tag);
}

function move(where) {
  if (shown && shown[where] !== null) go({ record: shown[where] });
}

async function drawFilters(filters, signal) {
  for (const name of ["offset", "sort"]) filters.delete(name);
  if (asked === `${filters}` && at("filters").childElementCount) return;
  const statistics = await api.ask(`api/statistics?${filters}`, signal);
  asked = `${filters}`;
  const focused = document.activeElement?.id;
  at("filters").replaceChildren(
    h(
      "div",
      { class: "row between" },
      h("h2", {}, `${number.format(statistics.total)} records`),
      [...filters].length > 0 &&
        button("Clear filters", clear, "small"),
      iconButton("close", "Close the filters", closeFilters, { id: "close-filters" }),
    ),
    ...facets(statistics, filters, change),
  );
  if (focused) at(focused)?.focus();
}

function clear() {
  at("search").value = "";
  history.pushState(null, "", location.pathname);
  draw();
}

function drawTop() {
  const stale = { grown: "has grown", changed: "has changed", gone: "is gone" }[about.changed];
  if (!at("search")) buildTop();
  const search = at("search");
  if (document.activeElement !== search) search.value = params().get("text") ?? "";
  at("stale").hidden = !stale;
  at("stale").replaceChildren(
    `The source ${stale} since it was read. `,
    button("Read it again", readAgain, "small"),
  );
}

function buildTop() {
  const find = (event) => {
    event.preventDefault();
    change({ text: at("search").value.trim() || null });
  };
  const home = (event) => (event.preventDefault(), clear());
  const opened = { id: "open-filters", "aria-controls": "filters" };
  at("top").append(
    iconButton("sliders", "Filters and statistics", openFilters, opened),
    h(
      "a",
      { class: "brand", href: location.pathname, title: about.files.join("\n"), onclick: home },
      about.source.replace(/^.*\/(?=.)/, ""),
    ),
    h(
      "form",
      { role: "search", onsubmit: find },
      h("label", { class: "offscreen", for: "search" }, "Search"),
      h("input", {
        id: "search",
        type: "search",
        placeholder: 'Search: words, "a phrase"',
        autocomplete: "off",
      }),
    ),
    themeButton("Light or dark"),
    h("p", { id: "stale", role: "status", hidden: true }),
  );
}

async function readAgain() {
  toast("Reading the source again …");
  try {
    about = await api.post("api/read-again");
    asked = "";
    toast(`${number.format(about.records)} records.`);
    draw();
  } catch (error) {
    toast(error.message);
  }
}

const openFilters = () => document.body.classList.add("with-filters");
const closeFilters = () => document.body.classList.remove("with-filters");

function drawError(error) {
  const more = [];
  if (error.status === 401) more.push(keyForm(draw));
  else if (error.status === 409) more.push(button("Read it again", readAgain, "small"));
  at("main").replaceChildren(trouble(error.message, ...more));
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (document.body.classList.contains("with-filters")) closeFilters();
    else if (typing) event.target.blur();
    else if (shown) go({ record: null });
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    at("search").focus();
  } else if (shown && ["j", "ArrowRight"].includes(event.key)) move("next");
  else if (shown && ["k", "ArrowLeft"].includes(event.key)) move("previous");
});
at("shade").addEventListener("click", closeFilters);
window.addEventListener("popstate", draw);
window.addEventListener("focus", async () => {
  about &&= await api.ask("api/source").catch(() => about);
  if (about) drawTop();
});
draw();
