/** The settings of one conversation: model, system prompt, sampling, tools, a second model. */

import { parseTools } from "./answer.js";
import * as api from "./api.js";
import { h, iconButton, toast } from "./dom.js";
import { DEFAULTS } from "./tree.js";

const SAMPLING = [
  [
    "temperature",
    "Temperature",
    "0 takes the likeliest token; higher varies more.",
    { min: 0, max: 2, step: 0.05 },
  ],
  [
    "top_p",
    "Top p",
    "Keep the likeliest tokens that share this probability.",
    { min: 0.01, max: 1, step: 0.01 },
  ],
  ["top_k", "Top k", "Keep so many of the likeliest tokens; 0 keeps all.", { min: 0, step: 1 }],
  [
    "min_p",
    "Min p",
    "Drop tokens below this share of the likeliest one.",
    { min: 0, max: 1, step: 0.01 },
  ],
  [
    "repetition_penalty",
    "Repetition penalty",
    "Above 1 discourages what prompt and answer hold.",
    { min: 0.1, max: 10, step: 0.05 },
  ],
  [
    "presence_penalty",
    "Presence penalty",
    "Off the score of each token the answer holds, once.",
    { min: -2, max: 2, step: 0.1 },
  ],
  [
    "frequency_penalty",
    "Frequency penalty",
    "The same, for each time it occurs.",
    { min: -2, max: 2, step: 0.1 },
  ],
  ["max_tokens", "Longest answer", "In tokens.", { min: 1, step: 1 }],
  ["seed", "Seed", "The same seed, the same draws; none: a new one each time.", { step: 1 }],
];

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather at a place now",
      parameters: {
        type: "object",
        properties: { place: { type: "string" } },
        required: ["place"],
      },
    },
  },
];

/** Fill the panel for a conversation. changed(): its settings are other than before. */
export function fillPanel(place, conversation, catalog, { changed, close }) {
  const { settings } = conversation;
  const set = (name, value) => {
    settings[name] = value;
    changed();
  };
  const fields = h("div", { class: "fields" });
  const fill = () =>
    fields.replaceChildren(
      group(
        "Model",
        modelChoice("Model", settings.model, catalog, (id) => set("model", id)),
        system(settings, set),
      ),
      group(
        "Sampling",
        SAMPLING.map((field) => numeric(field, settings, set)),
        stops(settings, set),
        h(
          "div",
          { class: "row" },
          h("button", { type: "button", class: "button", onclick: reset }, "Reset sampling"),
        ),
      ),
      group("Tools", tools(settings, set)),
      group("Side by side", compare(settings, set, catalog, fill)),
      group(
        "Look inside",
        check(
          "Token probabilities",
          "Ask for log-probabilities; the answer can then be coloured by how sure the model was.",
          settings.logprobs,
          (on) => set("logprobs", on),
        ),
      ),
      (api.key.get() &&
        group(
          "Key",
          h(
            "div",
            { class: "row" },
            h("button", { type: "button", class: "button", onclick: forget }, "Forget the key"),
          ),
        )) ||
        "",
    );
  const reset = () => {
    const names = [...SAMPLING.map(([name]) => name), "stop"];
    for (const name of names) settings[name] = DEFAULTS[name];
    changed();
    fill();
    toast("Sampling is back to its defaults.");
  };
  const forget = () => {
    api.key.forget();
    fill();
    toast("The key is forgotten.");
  };
  fill();
  place.replaceChildren(
    h("header", {}, h("h2", {}, "Settings"), iconButton("close", "Close the settings", close)),
    h(
      "p",
      { class: "hint" },
      "Of this conversation; new ones begin with them. Empty: the model's own default.",
    ),
    fields,
  );
}

let serial = 0;

function group(title, ...children) {
  return h("fieldset", {}, h("legend", {}, title), children.flat());
}

function labelled(label, hint, field, wide = true) {
  const id = `field-${serial++}`;
  field.id = id;
  if (hint) field.setAttribute("aria-describedby", `${id}-hint`);
  return h(
    "div",
    { class: wide ? "field" : "field short" },
    h("label", { for: id }, label),
    field,
    hint && h("p", { class: "hint", id: `${id}-hint` }, hint),
  );
}

/** A choice among the server's models. */
export function modelChoice(label, value, catalog, onchoose) {
  const known = catalog.map((model) => model.id);
  const options = value && !known.includes(value) ? [value, ...known] : known;
  const choice = h(
    "select",
    { onchange: () => onchoose(choice.value) },
    options.map((id) => h("option", { value: id, selected: id === value }, id)),
  );
  return labelled(label, null, choice);
}

function system(settings, set) {
  const area = h("textarea", {
    rows: "4",
    value: settings.system,
    placeholder: "The model's own",
    oninput: () => set("system", area.value),
  });
  return labelled("System prompt", null, area);
}

function numeric([name, label, hint, limits], settings, set) {
  const field = h("input", {
    type: "number",
    value: settings[name],
    placeholder: "default",
    inputmode: "decimal",
    ...limits,
    step: "any",
  });
  const wrong = h("p", { class: "wrong", role: "alert" });
  field.addEventListener("input", () => {
    const whole = limits.step === 1 && field.value && !Number.isInteger(Number(field.value));
    wrong.textContent = whole
      ? "A whole number."
      : field.checkValidity()
        ? ""
        : field.validationMessage;
    field.setAttribute("aria-invalid", String(Boolean(wrong.textContent)));
    if (!wrong.textContent) set(name, field.value);
  });
  const box = labelled(label, hint, field, false);
  box.append(wrong);
  return box;
}

function stops(settings, set) {
  const area = h("textarea", {
    rows: "2",
    class: "mono",
    value: settings.stop,
    oninput: () => set("stop", area.value),
  });
  return labelled("Stop texts", "One a line; the answer ends before them.", area);
}

function tools(settings, set) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const right = h("p", { class: "hint" });
  const area = h("textarea", {
    rows: "6",
    class: "mono",
    value: settings.tools,
    spellcheck: "false",
    placeholder: '[{"name": "…", "description": "…", "parameters": {…}}]',
  });
  const check = () => {
    wrong.textContent = right.textContent = "";
    try {
      const all = parseTools(area.value);
      const names = all.map((tool) => tool.function.name).join(", ");
      const count = `${all.length} function${all.length === 1 ? "" : "s"}`;
      if (all.length) right.textContent = `${count}: ${names}`;
    } catch (error) {
      wrong.textContent = error.message;
    }
    area.setAttribute("aria-invalid", String(Boolean(wrong.textContent)));
  };
  area.addEventListener("input", () => (check(), set("tools", area.value)));
  const example = () => {
    area.value = JSON.stringify(EXAMPLE, null, 2);
    area.dispatchEvent(new Event("input"));
  };
  check();
  return [
    labelled("Functions, as JSON", "The model may call them; you type what they give back.", area),
    wrong,
    right,
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "button", onclick: example }, "Insert an example"),
    ),
  ];
}

function compare(settings, set, catalog, fill) {
  const parts = [
    check(
      "Two answers to each message",
      "Both read the same conversation; the one you choose goes on.",
      settings.compare,
      (on) => (set("compare", on), fill()),
    ),
  ];
  if (!settings.compare) return parts;
  const place = h(
    "div",
    {},
    modelChoice("Second model", settings.second, settings.base ? [] : catalog, (id) =>
      set("second", id),
    ),
  );
  const wrong = h("p", { class: "wrong", role: "alert" });
  const field = h("input", {
    type: "text",
    value: settings.base,
    placeholder: api.HOME,
    spellcheck: "false",
  });
  const load = async () => {
    wrong.textContent = "";
    try {
      const where = api.base(field.value.trim());
      const others = await api.models(where);
      set("base", field.value.trim() ? where : "");
      if (!others.some((model) => model.id === settings.second)) set("second", others[0]?.id ?? "");
      place.replaceChildren(
        modelChoice("Second model", settings.second, others, (id) => set("second", id)),
      );
    } catch (error) {
      wrong.textContent = `${error.message} ${error.advice ?? ""}`;
    }
  };
  field.addEventListener("change", load);
  if (settings.base) load();
  return [
    ...parts,
    place,
    labelled(
      "Its path",
      "Another API on this server, such as a reference checkpoint's behind a proxy.",
      field,
    ),
    wrong,
  ];
}

function check(label, hint, on, onchange) {
  const box = h("input", { type: "checkbox", checked: on, onchange: () => onchange(box.checked) });
  return h(
    "div",
    { class: "field" },
    h("label", { class: "check" }, box, label),
    h("p", { class: "hint" }, hint),
  );
}
