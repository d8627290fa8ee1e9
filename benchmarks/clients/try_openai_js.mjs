// openai-js, as node runs it, against a server.

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { strict as assert } from "node:assert";
import { z } from "zod";
import {
  Choice, CITIES, full, HELLO, main, metric, strict, TOO_LONG, tooSlow, until, url, WEATHER,
} from "./checks.mjs";

const client = (base, options = {}) =>
  new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", timeout: 120_000, ...options });
const model = "local";
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES } },
  required: ["city"],
};
const weather = { name: "get_weather", description: "The weather in a city.", parameters };
const tools = [{ type: "function", function: weather }];
const Place = z.object({ city: z.enum(CITIES), capital: z.boolean() });
const said = (content) => [{ role: "user", content }];

/** A chat of a few tokens. */
const ask = (base, options = {}, settings = {}) =>
  client(base, settings).chat.completions.create({
    model, messages: said(HELLO), max_tokens: 8, temperature: 0, ...options,
  });

async function refused(promise, kind) {
  const unrefused = (answer) => assert.fail(JSON.stringify(answer));
  const error = await promise.then(unrefused, (error) => error);
  if (!(error instanceof kind)) throw error;
  return error;
}

await main({
  async chat() {
    const answer = await ask(url);
    assert(answer.choices[0].message.content && answer.usage.completion_tokens <= 8);
  },
  async stream() {
    const expected = (await ask(url)).choices[0].message.content;
    let [text, usage] = ["", null];
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await ask(url, options)) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, expected);
    assert(usage.total_tokens);
  },
  async "tool required"() {
    const forced = { tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 64 };
    const { choices } = await ask(url, { messages: said(WEATHER), ...forced });
    assert.equal(choices[0].finish_reason, "tool_calls");
    const { city } = JSON.parse(choices[0].message.tool_calls[0].function.arguments);
    assert(CITIES.includes(city));
  },
  async "tools in a stream"() {
    const forced = { tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 64 };
    const stream = client(url).chat.completions.stream({
      model, messages: said(WEATHER), temperature: 0, ...forced,
    });
    const message = await stream.finalMessage();
    assert(CITIES.includes(JSON.parse(message.tool_calls[0].function.arguments).city));
  },
  async "tool round trip"() {
    const messages = said(WEATHER);
    const { message } = (await ask(url, { messages, tools, max_tokens: 64 })).choices[0];
    if (!message.tool_calls) throw new Choice(`it called nothing: ${message.content}`);
    const [{ id }] = message.tool_calls;
    messages.push(message, { role: "tool", tool_call_id: id, content: "Snow, -5 degrees." });
    const last = await ask(url, { messages, tools, max_tokens: 32 });
    assert(last.choices[0].message.content);
  },
  async structured() {
    const answer = await client(url).chat.completions.parse({
      model, messages: said("Oslo is Norway's capital. JSON."), max_tokens: 64,
      response_format: zodResponseFormat(Place, "place"),
    });
    assert.equal(typeof answer.choices[0].message.parsed.capital, "boolean");
  },
  async embeddings() {
    const { data } = await client(url).embeddings.create({ model, input: ["a b", "c d"] });
    assert(data[0].embedding.length > 1 && data[0].embedding.length === data[1].embedding.length);
  },
  async responses() {
    const flat = [{ type: "function", ...weather }];
    const responses = client(url).responses;
    const first = await responses.create({
      model, input: WEATHER, tools: flat, tool_choice: "required", parallel_tool_calls: false,
      max_output_tokens: 64,
    });
    const [call] = first.output;
    assert(CITIES.includes(JSON.parse(call.arguments).city));
    const second = await responses.create({
      model, previous_response_id: first.id, max_output_tokens: 16,
      input: [{ type: "function_call_output", call_id: call.call_id, output: "Snow." }],
    });
    assert(second.output_text);
  },
  async "responses, stream"() {
    const stream = client(url).responses.stream({
      model, input: "Oslo is Norway's capital. JSON.", max_output_tokens: 64,
      text: { format: zodTextFormat(Place, "place") },
    });
    let text = "";
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    const final = await stream.finalResponse();
    assert.deepEqual(final.output_parsed, JSON.parse(text));
  },
  async files() {
    const file = new File([new Uint8Array([0, 13, 10, 255])], "é.jsonl");
    const kept = await client(url).files.create({ file, purpose: "batch" });
    assert.deepEqual([kept.bytes, kept.filename], [4, "é.jsonl"]);
    const content = await (await client(url).files.content(kept.id)).arrayBuffer();
    assert.deepEqual([...new Uint8Array(content)], [0, 13, 10, 255]);
    assert((await client(url).files.delete(kept.id)).deleted);
  },
  async "too long"() {
    const error = await refused(ask(url, { messages: said(TOO_LONG) }), OpenAI.BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
  },
  async "busy (429)"() {
    const once = () => ask(strict, { max_tokens: 1 }, { maxRetries: 0 });
    await full(() => refused(once(), OpenAI.RateLimitError));
    await full(() => ask(strict, { max_tokens: 1 }), 500);
  },
  async "late (408)"() {
    await tooSlow(async () => {
      assert.equal((await refused(ask(strict), OpenAI.APIError)).status, 408);
    });
  },
  async abort() {
    const before = await metric(url, "request_success_total", "abort");
    const long = { max_tokens: 2000, messages: said("Count to 999.") };
    const stream = await ask(url, { stream: true, ...long });
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break;
    stream.controller.abort();
    await until(async () => !(await metric(url, "num_requests_running")));
    assert.equal((await metric(url, "request_success_total", "abort")) - before, 1);
  },
});
