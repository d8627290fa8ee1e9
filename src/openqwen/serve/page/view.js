/** How turns look. A turn's view lives as long as its turn and changes in place. */

import { isRunning } from "./answer.js";
import { key } from "./api.js";
import { copyButton, h, iconButton, number } from "./dom.js";
import { Markdown } from "./markdown.js";
import { versions } from "./tree.js";

/** Make an element's children exactly these, moving none that is in place. */
export function reconcile(parent, nodes) {
  const kept = new Set(nodes);
  for (const child of [...parent.childNodes]) if (!kept.has(child)) child.remove();
  nodes.forEach((node, n) => {
    if (parent.childNodes[n] !== node) parent.insertBefore(node, parent.childNodes[n] ?? null);
  });
}

const NOTES = {
  stopped: "Stopped.",
  length: "The longest answer was reached; the settings can raise it.",
  edited: "Edited by you.",
  interrupted: "Interrupted; what had come is kept.",
};

/** One turn. act: what its buttons do, see app.js. */
export class Turn {
  constructor(node, act) {
    Object.assign(this, { node, act, editing: false, asTokens: false });
    this.label = h("h2", { class: "label" });
    this.body = h("div", { class: "body" });
    this.foot = h("div", { class: "foot" });
    this.element = h(
      "article",
      { class: `turn ${node.role}`, "data-id": node.id },
      this.label,
      this.body,
      this.foot,
    );
    this.markdown = new Markdown();
    this.calls = [];
    this.stats = h("span", { class: "stats" });
  }

  /** place: {conversation, last, chosen, results, waiting, canRender} */
  update(place) {
    this.place = place;
    const { node } = this;
    const running = isRunning(node);
    this.label.textContent =
      { user: "You", tool: `Result of ${node.name || "a call"}` }[node.role] ??
      (node.model || "Model");
    this.element.setAttribute("aria-label", this.label.textContent);
    this.element.classList.toggle("running", running);
    this.element.classList.toggle("waiting-first", running && !node.content && !node.calls?.length);
    if (!this.editing) reconcile(this.body, this.content(running));
    this.stats.textContent = statistics(node, running);
    const state = JSON.stringify([
      running,
      place.last,
      place.chosen,
      place.canRender,
      this.editing,
      this.asTokens,
      !!node.tokens,
      !!node.content,
      versionsOf(place, node),
    ]);
    if (state !== this.state) this.foot.replaceChildren(...this.buttons(running));
    this.state = state;
  }

  content(running) {
    const { node } = this;
    if (node.role !== "assistant") {
      this.plain ??= h("div", { class: node.role === "tool" ? "plain mono" : "plain" });
      if (this.plain.textContent !== node.content) this.plain.textContent = node.content;
      return [this.plain];
    }
    const parts = [];
    if (this.asTokens && node.tokens) parts.push(tokens(node.tokens));
    else if (node.content) {
      this.markdown.update(node.content, running);
      parts.push(this.markdown.element);
    }
    (node.calls ?? []).forEach((call, n) => {
      this.calls[n] ??= new CallView();
      this.calls[n].update(call, running);
      parts.push(this.calls[n].element);
    });
    if (this.place.results) parts.push((this.form ??= resultsForm(node, this.act)));
    const finish = running || node.done !== false ? node.finish : "interrupted";
    if (!running && node.error) parts.push(this.trouble());
    else if (!running && NOTES[finish]) parts.push(h("p", { class: "note" }, NOTES[finish]));
    return parts;
  }

  /** An error, where it happened, with what to do about it. */
  trouble() {
    const { error } = this.node;
    const { waiting } = this.place;
    const button = (text, onclick) =>
      h("button", { type: "button", class: "button", onclick }, text);
    const again = () => this.act.again(this.node);
    const box = h(
      "div",
      { class: "trouble", role: "alert" },
      h(
        "p",
        {},
        h("strong", {}, error.message),
        " ",
        error.retry && !waiting ? "The server is busy; try again later." : (error.advice ?? ""),
      ),
    );
    if (waiting) {
      box.append(
        h("p", { class: "note" }, `Asking again in ${waiting} s. `),
        h(
          "div",
          { class: "row" },
          button("Ask now", again),
          button("Leave it", () => this.act.cancelWait(this.node)),
        ),
      );
    } else if (error.long) {
      box.append(
        h(
          "div",
          { class: "row" },
          button("Shorten the message", () => this.act.shorten(this.node)),
          button("New conversation with it", () => this.act.afresh(this.node)),
        ),
      );
    } else if (error.status !== 401)
      box.append(h("div", { class: "row" }, button("Try again", again)));
    return box;
  }

  buttons(running) {
    const { node, act, place } = this;
    if (this.editing) return [];
    const assistant = node.role === "assistant";
    const [at, count] = versionsOf(place, node);
    const parts = [];
    if (count > 1) {
      parts.push(
        h(
          "span",
          { class: "versions" },
          iconButton("left", "Earlier version", () => act.go(node, -1), { disabled: at === 0 }),
          h("span", { "aria-label": `Version ${at + 1} of ${count}` }, `${at + 1}/${count}`),
          iconButton("right", "Later version", () => act.go(node, 1), {
            disabled: at === count - 1,
          }),
        ),
      );
    }
    const tools = h("span", { class: "tools" });
    if (!running) {
      if (node.content) tools.append(copyButton(() => node.content, "Copy message", true));
      if (node.content && node.role !== "tool")
        tools.append(iconButton("edit", "Edit", () => this.edit()));
      if (assistant) tools.append(iconButton("again", "Regenerate", () => act.regenerate(node)));
      if (assistant && node.tokens)
        tools.append(
          iconButton("tokens", "Token probabilities", () => this.toggleTokens(), {
            "aria-pressed": String(this.asTokens),
          }),
        );
      if (assistant && place.canRender)
        tools.append(
          iconButton("prompt", "Prompt as the model read it", () => act.showPrompt(node)),
        );
    }
    parts.push(tools);
    if (assistant && node.pair && !running) {
      parts.push(
        place.chosen
          ? h("span", { class: "chosen" }, "Continues")
          : h(
              "button",
              { type: "button", class: "button small", onclick: () => act.pick(node) },
              "Continue with this",
            ),
      );
    }
    if (assistant) parts.push(this.stats);
    return parts;
  }

  toggleTokens() {
    this.asTokens = !this.asTokens;
    this.update(this.place);
  }

  edit() {
    this.editing = true;
    const area = h("textarea", {
      value: this.node.content,
      "aria-label": "Edit the message",
      rows: String(Math.min(14, this.node.content.split("\n").length + 1)),
    });
    const close = () => {
      this.editing = false;
      this.update(this.place);
      document.getElementById("composer-text").focus();
    };
    const save = () => {
      close();
      if (area.value.trim() && area.value !== this.node.content)
        this.act.edit(this.node, area.value);
    };
    const onkeydown = (event) => {
      if (event.key === "Escape") (event.stopPropagation(), close());
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing)
        (event.preventDefault(), save());
    };
    area.addEventListener("keydown", onkeydown);
    const primary = this.node.role === "user" ? "Send as a new version" : "Save as a new version";
    reconcile(this.body, [
      h(
        "div",
        { class: "editor" },
        area,
        h(
          "div",
          { class: "row" },
          h("button", { type: "button", class: "button primary", onclick: save }, primary),
          h("button", { type: "button", class: "button", onclick: close }, "Cancel"),
        ),
      ),
    ]);
    this.update(this.place);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

function versionsOf({ conversation }, node) {
  const groups = versions(conversation, node);
  return [groups.findIndex((group) => group.includes(node)), groups.length];
}

/** "128 tokens · 24.1 tokens/s · first after 0.42 s" */
export function statistics(node, running) {
  const { stats } = node;
  if (!stats) return "";
  const parts = [`${number.format(stats.tokens)} token${stats.tokens === 1 ? "" : "s"}`];
  const { rate } = stats;
  const shown = rate < 100 ? rate?.toFixed(1) : number.format(Math.round(rate));
  if (rate) parts.push(`${shown} tokens/s`);
  if (stats.first > 0 && !running)
    parts.push(
      `first after ${stats.first < 10 ? stats.first.toFixed(2) : Math.round(stats.first)} s`,
    );
  return parts.join(" · ");
}

/** A function call that the model makes. */
class CallView {
  constructor() {
    this.name = h("strong", {});
    this.text = h("code", {});
    this.element = h(
      "section",
      { class: "call", "aria-label": "Tool call" },
      h(
        "header",
        {},
        h("span", { class: "eyebrow" }, "Calls"),
        this.name,
        copyButton(() => this.text.textContent, "Copy arguments"),
      ),
      h("pre", { tabindex: "0" }, this.text),
    );
  }

  update(call, running) {
    this.name.textContent = call.name || "…";
    let text = call.text;
    if (!running) {
      try {
        text = JSON.stringify(JSON.parse(call.text || "{}"), null, 2);
      } catch {
        /* shown as it came */
      }
    }
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}

/** Fields in which a person plays the tools. */
function resultsForm(node, act) {
  const areas = node.calls.map((call, n) => {
    const which = node.calls.length > 1 ? ` (call ${n + 1})` : "";
    const placeholder = `Result of ${call.name}${which}, as text or JSON`;
    return h("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder });
  });
  const onsubmit = (event) => {
    event.preventDefault();
    act.giveResults(
      node,
      areas.map((area) => area.value),
    );
  };
  return h(
    "form",
    { class: "results", onsubmit },
    areas,
    h(
      "div",
      { class: "row" },
      h(
        "button",
        { class: "button primary" },
        areas.length > 1 ? "Give the results" : "Give the result",
      ),
    ),
  );
}

/** Where the server's key is given. {element, say(text)}; then: after a key was given. */
export function keyForm(then) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const field = h("input", {
    type: "password",
    "aria-label": "API key",
    placeholder: "API key",
    autocomplete: "current-password",
    required: true,
  });
  const remember = h("input", { type: "checkbox", checked: key.remembered() });
  const onsubmit = (event) => {
    event.preventDefault();
    key.set(field.value.trim(), remember.checked);
    then();
  };
  const form = h(
    "form",
    { class: "key", onsubmit },
    h("p", {}, "This server needs a key; whoever runs it knows it."),
    h("div", { class: "row" }, field, h("button", { class: "button primary" }, "Use this key")),
    wrong,
    h(
      "label",
      { class: "check" },
      remember,
      "Remember it in this browser; otherwise until the tab closes",
    ),
  );
  return { element: form, say: (text) => (wrong.textContent = text) };
}

/** The answer's tokens, each the paler the surer the model was; the likeliest others on hover. */
function tokens(list) {
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  const spans = list.map(({ token, logprob, top }) => {
    const others = top
      .map(([other, value]) => `${JSON.stringify(other)}  ${percent(value)}`)
      .join("\n");
    const likeliest = others ? `\n\nlikeliest:\n${others}` : "";
    const title = `${JSON.stringify(token)}  ${percent(logprob)}${likeliest}`;
    const span = h("span", { class: "token", title }, token);
    span.style.setProperty("--doubt", (1 - Math.exp(logprob)).toFixed(3));
    return span;
  });
  const legend = h(
    "p",
    { class: "note legend" },
    h("span", {}, "sure"),
    h("span", { class: "scale", "aria-hidden": "true" }),
    h("span", {}, "unsure"),
  );
  return h("div", {}, legend, h("div", { class: "tokens-view" }, spans));
}

/** Two answers to one question, beside each other. */
export function pair(elements) {
  return h("div", { class: "pair" }, elements);
}

/** What stands where a conversation has not begun. head: the model's name, or why there is none. */
export function welcome(head, durable) {
  return h(
    "div",
    { class: "welcome" },
    h("p", { class: "eyebrow" }, head),
    h("h1", {}, "What would you like to ask?"),
    h(
      "p",
      { class: "lead" },
      durable
        ? "Conversations stay in this browser; messages go to this server and nowhere else."
        : "This browser keeps no data for this page: conversations are gone when the tab closes. " +
            "Export what you want to keep.",
    ),
    h(
      "p",
      { class: "hint" },
      h("kbd", {}, "Enter"),
      " sends, ",
      h("kbd", {}, "Shift"),
      " ",
      h("kbd", {}, "Enter"),
      " begins a new line, ",
      h("kbd", {}, "Ctrl"),
      " ",
      h("kbd", {}, "/"),
      " lists all keys.",
    ),
  );
}
