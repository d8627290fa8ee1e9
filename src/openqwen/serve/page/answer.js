/** Making an answer: one request, its stream, and what it leaves in the turn. */

import * as api from "./api.js";
import { elsewhere, endElsewhere } from "./tabs.js";
import { before, messages, stamp } from "./tree.js";

const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "max_tokens",
  "seed",
];
export const running = new Map(); // turn id -> AbortController, of this tab's answers
let leaving = false; // the page goes, and its connections with it: no fault of theirs

for (const name of ["beforeunload", "pagehide"]) {
  addEventListener(name, () => {
    leaving = true;
    setTimeout(() => (leaving = false), 1000);
  });
}

export const isRunning = (node) => running.has(node.id) || elsewhere(node);
export const stop = (node) =>
  running.has(node.id) ? running.get(node.id).abort() : endElsewhere(node);
export const anyRunning = () => running.size > 0;

/** The tools in the user's JSON: OpenAI's list, or bare functions. Throws what is wrong. */
export function parseTools(text) {
  if (!text.trim()) return [];
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`Not JSON: ${error.message}`);
  }
  return (Array.isArray(value) ? value : [value]).map((tool, number) => {
    const definition = tool?.type === "function" ? tool.function : tool;
    const where = `Tool ${number + 1}`;
    if (typeof definition?.name !== "string") throw new Error(`${where} has no name.`);
    if (!/^[\w.-]{1,64}$/.test(definition.name))
      throw new Error(`${where}: a name is letters, digits, _ . - and at most 64 long.`);
    const { parameters } = definition;
    if (
      parameters !== undefined &&
      (typeof parameters !== "object" || parameters === null || Array.isArray(parameters))
    ) {
      throw new Error(`${where} (${definition.name}): "parameters" must be a JSON schema object.`);
    }
    return { type: "function", function: definition };
  });
}

/** The body of a request that asks for what follows `turns`. */
export function request(settings, turns, model) {
  const body = {
    ...(model && { model }),
    messages: messages(settings, turns),
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS)
    if (String(settings[name]).trim() !== "") body[name] = Number(settings[name]);
  const stops = settings.stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  const tools = parseTools(settings.tools);
  if (tools.length) body.tools = tools;
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

/** Fill `node` with the answer to the turns above it; `onchange` is called for each piece. */
export async function answer(conversation, node, onchange) {
  const control = new AbortController();
  running.set(node.id, control);
  Object.assign(node, { content: "", done: false, updated: stamp() });
  for (const name of ["calls", "tokens", "error", "finish", "stats"]) delete node[name];
  const clock = { start: performance.now(), first: 0, last: 0, pieces: 0 };
  onchange();
  try {
    const where = api.base(node.base ?? "");
    const body = request(conversation.settings, before(conversation, node), node.model);
    for await (const chunk of api.chat(where, body, control.signal)) {
      take(node, chunk, clock);
      onchange();
    }
    node.finish ??= "stop";
  } catch (error) {
    node.finish = leaving ? "interrupted" : error.name === "AbortError" ? "stopped" : "error";
    if (node.finish === "error") {
      const {
        message,
        advice = "Change the settings.",
        status = 0,
        retry = null,
        long = false,
      } = error;
      node.error = { message, advice, status, retry, long };
    }
  } finally {
    running.delete(node.id);
    Object.assign(node, { done: true, updated: stamp() });
    onchange();
  }
}

function take(node, chunk, clock) {
  node.updated = stamp();
  if (chunk.usage) count(node, chunk.usage, clock);
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { delta = {}, logprobs } = choice;
  if (delta.content || delta.tool_calls) {
    clock.last = performance.now();
    clock.first ||= clock.last;
    clock.pieces += 1;
    count(node, null, clock);
  }
  if (delta.content) node.content += delta.content;
  for (const piece of delta.tool_calls ?? []) {
    node.calls ??= [];
    const call = (node.calls[piece.index ?? 0] ??= { id: "", name: "", text: "" });
    if (piece.id) call.id = piece.id;
    if (piece.function?.name) call.name += piece.function.name;
    call.text += piece.function?.arguments ?? "";
  }
  if (logprobs?.content) {
    node.tokens ??= [];
    for (const { token, logprob, top_logprobs: top = [] } of logprobs.content) {
      node.tokens.push({ token, logprob, top: top.map((other) => [other.token, other.logprob]) });
    }
  }
  if (choice.finish_reason) node.finish = choice.finish_reason;
}

/**
 * Counts and speed: tokens after the first over the time since the first.
 * Pieces are counted as tokens until the usage arrives.
 */
function count(node, usage, clock) {
  const tokens = usage?.completion_tokens ?? clock.pieces;
  const seconds = (clock.last - clock.first) / 1000;
  node.stats = { tokens, first: (clock.first - clock.start) / 1000 };
  if (tokens > 1 && seconds > 0) node.stats.rate = (tokens - 1) / seconds;
  if (usage) node.stats.prompt = usage.prompt_tokens;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) node.stats.cached = cached;
}
