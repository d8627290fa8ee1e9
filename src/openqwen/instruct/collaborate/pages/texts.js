/** Texts of the interface, one JSON file a language; the choice is remembered in this browser. */

const LANGUAGES = { en: "English", zh: "中文" };
const CHOICE = "openqwen.language";
let texts = {};
let plural = new Intl.PluralRules("en");
export let language = "en";
export let number = new Intl.NumberFormat("en");

/** Load a language; without one, the chosen one or the browser's. */
export async function speak(wanted = null) {
  if (wanted) localStorage.setItem(CHOICE, wanted);
  const named = [localStorage.getItem(CHOICE), ...navigator.languages];
  const known = named.map((name) => name?.slice(0, 2)).find((name) => name in LANGUAGES);
  const chosen = known ?? "en";
  texts = await (await fetch(`${chosen}.json`)).json();
  language = chosen;
  plural = new Intl.PluralRules(chosen);
  number = new Intl.NumberFormat(chosen);
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : chosen;
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
export const percent = (value) => (value === null ? "–" : `${few(100 * value, 0)} %`);

/** A duration in seconds. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return t("seconds", { s: few(seconds, seconds < 10 ? 1 : 0) });
  return t("minutes", { m: few(seconds / 60, 1) });
}

/** A moment, from seconds since 1970. */
export function moment(seconds) {
  const shown = { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(language, shown).format(new Date(seconds * 1000));
}

export const languages = () => Object.entries(LANGUAGES);
