/** Texts of the interface, one JSON file a language; the choice is remembered in this browser. */

import { at, h, words } from "./dom.js";

const LANGUAGES = { en: "English", zh: "中文" };
const CHOICE = "openqwen.language";
let texts = {};
let plural = new Intl.PluralRules("en");
export let language = "en";
export let number = new Intl.NumberFormat("en");

/** Load the chosen language; without one, the project's or the browser's. */
export async function speak(wanted = null) {
  const named = [localStorage.getItem(CHOICE), wanted, ...navigator.languages];
  const short = named.map((name) => name?.slice(0, 2));
  const chosen = short.find((name) => name in LANGUAGES) ?? "en";
  if (chosen === language && Object.keys(texts).length) return;
  texts = await (await fetch(`${chosen}.json`)).json();
  language = chosen;
  plural = new Intl.PluralRules(chosen);
  number = new Intl.NumberFormat(chosen);
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : chosen;
  for (const name of Object.keys(words))
    if (known(`words.${name}`)) words[name] = t(`words.${name}`);
}

/** A choice of the language; draw(): shows the page anew. */
export function languageChoice(draw) {
  const onchange = async (event) => {
    localStorage.setItem(CHOICE, event.target.value);
    await speak();
    await draw();
    at("language").focus();
  };
  const options = Object.entries(LANGUAGES).map(([value, name]) =>
    h("option", { value, selected: value === language, lang: value }, name),
  );
  return h("select", { id: "language", "aria-label": t("language"), onchange }, options);
}

/** A text, its `{names}` filled in. `{n}` also chooses between `key.one` and `key.other`. */
export function t(key, values = {}) {
  const form = typeof values.n === "number" ? `${key}.${plural.select(values.n)}` : key;
  const text = texts[form] ?? texts[`${key}.other`] ?? texts[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? number.format(value) : String(value ?? "");
  });
}

/** Whether a text exists. */
export const known = (key) => key in texts;

/** A number with few digits; a dash where there is none. */
export function few(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const shown = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return new Intl.NumberFormat(language, shown).format(value);
}

/** A share as percent. */
export const percent = (value) => (typeof value !== "number" ? "–" : `${few(100 * value, 0)} %`);

/** A duration in seconds. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return t("seconds", { s: few(seconds, seconds < 10 ? 1 : 0) });
  return t("minutes", { m: few(seconds / 60, 1) });
}

/** A moment, from an ISO 8601 text. */
export function moment(time) {
  if (!time) return "–";
  const shown = { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(language, shown).format(new Date(time));
}
