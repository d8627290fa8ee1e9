/** One record: its conversation, the difference of its answers, its fields. */

import { difference } from "./difference.js";
import { copyButton, h, number } from "./dom.js";
import { highlight } from "./highlight.js";
import { Markdown } from "./markdown.js";

const LONGEST_MARKDOWN = 30_000; // characters; beyond them a text is shown as it is

/** The record's nodes. view: {plain, difference}. */
export function recordNodes(record, view) {
  if (record.fault) return [trouble(record.fault), plain(record.raw ?? "")];
  const nodes = record.messages.map((message) => turn(message, view));
  const left = record.messages_left_out;
  if (left) nodes.push(h("p", { class: "note" }, `${left} more messages are not shown.`));
  if (record.chosen) nodes.push(pair(record, view));
  if (record.text) nodes.push(h("section", { class: "turn" }, body(record.text, view)));
  if (record.tools) nodes.push(json("Tools", record.tools));
  if (record.fields) nodes.push(json(nodes.length ? "Fields" : "Record", record.fields));
  return nodes;
}

export function trouble(text, ...more) {
  return h("div", { class: "trouble", role: "alert" }, h("strong", {}, text), ...more);
}

function turn(message, view, name = message.role) {
  return h(
    "section",
    { class: `turn ${message.role}` },
    h(
      "div",
      { class: "label" },
      h("span", {}, name),
      h("span", { class: "size" }, `${number.format(message.characters)} characters`),
      copyButton(() => message.text, `Copy: ${name}`, true),
    ),
    body(message, view),
    ...message.calls.map((call) =>
      h(
        "div",
        { class: "call" },
        h("header", {}, h("strong", {}, call.name)),
        h("pre", { tabindex: "0" }, highlight(call.arguments.text, "json")),
      ),
    ),
  );
}

/** A text as Markdown or as it is. */
function body(text, view) {
  const nodes = [];
  if (view.plain || text.characters > LONGEST_MARKDOWN) nodes.push(plain(text.text));
  else {
    const markdown = new Markdown();
    markdown.update(text.text);
    nodes.push(markdown.element);
  }
  if (text.cut) nodes.push(cut(text));
  return h("div", { class: "body" }, nodes);
}

function cut(text) {
  const left = number.format(text.characters - text.text.length);
  return h("p", { class: "note" }, `Cut here: ${left} more characters are in the raw record.`);
}

function plain(text) {
  return h("div", { class: "plain" }, text);
}

function pair({ chosen, rejected }, view) {
  if (!view.difference)
    return h(
      "div",
      { class: "pair" },
      turn(chosen, view, "chosen"),
      turn(rejected, view, "rejected"),
    );
  const pieces = difference(rejected.text, chosen.text).map(({ kind, text }) =>
    kind === "same" ? text : h(kind === "added" ? "ins" : "del", {}, text),
  );
  const legend = h(
    "p",
    { class: "note" },
    "In the rejected answer only: ",
    h("del", {}, "like this"),
    "; in the chosen answer only: ",
    h("ins", {}, "like this"),
    ".",
  );
  return h("section", { class: "turn" }, legend, h("div", { class: "plain" }, pieces));
}

function json(title, value) {
  return h(
    "section",
    { class: "turn" },
    h(
      "div",
      { class: "label" },
      h("span", {}, title),
      copyButton(() => value.text, `Copy: ${title}`, true),
    ),
    h(
      "figure",
      { class: "code" },
      h("pre", { tabindex: "0" }, highlight(value.text, "json")),
    ),
    value.cut && cut(value),
  );
}
