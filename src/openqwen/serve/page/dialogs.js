/** Windows above the page: the prompt as rendered, and the keys. */

import { show } from "./dialog.js";
import { copyButton, h, number } from "./dom.js";

/** The text that the model reads, control tokens marked. */
export function showPrompt({ prompt, tokens }) {
  const parts = prompt
    .split(/(<\|[a-z_]+\|>|<\/?tools?>|<\/?tool_call>|<\/?tool_response>)/)
    .map((part, n) => (n % 2 ? h("span", { class: "control" }, part) : part));
  show(
    "Prompt",
    "wide",
    h(
      "div",
      { class: "row" },
      h(
        "span",
        { class: "hint" },
        `${number.format(tokens)} tokens, as the chat template renders them`,
      ),
      copyButton(() => prompt, "Copy the prompt"),
    ),
    h("pre", { class: "prompt", tabindex: "0" }, parts),
  );
}

const KEYS = [
  ["Send", "Enter"],
  ["New line", "Shift Enter"],
  ["Stop the answer", "Esc"],
  ["Edit the last message", "↑ in an empty field"],
  ["Regenerate the last answer", "Ctrl Shift Enter"],
  ["New conversation", "Ctrl Shift O"],
  ["Settings", "Ctrl ,"],
  ["To the message field", "/"],
  ["This list", "Ctrl /"],
];

export function showKeys() {
  show(
    "Keys",
    "narrow",
    h(
      "dl",
      { class: "keys" },
      KEYS.map(([what, keys]) => [
        h("dt", {}, what),
        h(
          "dd",
          {},
          keys
            .split(" ")
            .map((one) => (/^(in|an|empty|field)$/.test(one) ? `${one} ` : h("kbd", {}, one))),
        ),
      ]).flat(),
    ),
  );
}
