// Vercel's ai, as node runs it, against a server.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, streamText } from "ai";
import { Output, RetryError, stepCountIs, tool } from "ai";
import { strict as assert } from "node:assert";
import { z } from "zod";
import {
  Choice, CITIES, full, HELLO, main, strict, TOO_LONG, tooSlow, url, WEATHER,
} from "./checks.mjs";

const city = z.enum(CITIES);
const parameters = { description: "The weather in a city.", inputSchema: z.object({ city }) };

const provider = (base) =>
  createOpenAICompatible({
    name: "openqwen", baseURL: `${base}/v1`, apiKey: "none", supportsStructuredOutputs: true,
  });
const short = { prompt: HELLO, maxOutputTokens: 8, temperature: 0 };
const asked = (base, options = {}) => ({ model: provider(base)("local"), ...short, ...options });

async function refused(promise) {
  const unrefused = (answer) => assert.fail(JSON.stringify(answer));
  const error = await promise.then(unrefused, (error) => error);
  const last = RetryError.isInstance(error) ? error.lastError : error;
  if (!APICallError.isInstance(last)) throw error;
  return last;
}

await main({
  async chat() {
    const answer = await generateText(asked(url));
    assert(answer.text && answer.usage.outputTokens <= 8);
  },
  async stream() {
    const whole = (await generateText(asked(url))).text;
    let text = "";
    for await (const part of streamText(asked(url)).textStream) text += part;
    assert.equal(text, whole);
  },
  async "tool required"() {
    const tools = { get_weather: tool(parameters) };
    const options = { prompt: WEATHER, tools, toolChoice: "required", maxOutputTokens: 64 };
    const answer = await generateText(asked(url, options));
    assert(CITIES.includes(answer.toolCalls[0].input.city));
  },
  async "tool round trip"() {
    const tools = { get_weather: tool({ ...parameters, execute: () => "Snow, -5 degrees." }) };
    const options = { prompt: WEATHER, tools, stopWhen: stepCountIs(2), maxOutputTokens: 64 };
    const answer = await generateText(asked(url, options));
    if (!answer.steps[0].toolCalls.length) throw new Choice(`it called nothing: ${answer.text}`);
    assert(answer.text);
  },
  async structured() {
    const output = Output.object({ schema: z.object({ city, capital: z.boolean() }) });
    const options = { prompt: "Oslo is Norway's capital. JSON.", output, maxOutputTokens: 64 };
    const answer = await generateText(asked(url, options));
    assert.equal(typeof answer.output.capital, "boolean");
  },
  async embeddings() {
    const model = provider(url).textEmbeddingModel("local");
    const { embeddings } = await embedMany({ model, values: ["a b", "c d"] });
    assert(embeddings[0].length > 1 && embeddings[0].length === embeddings[1].length);
  },
  async "too long"() {
    const error = await refused(generateText(asked(url, { prompt: TOO_LONG })));
    assert(!error.isRetryable && error.data.error.code === "context_length_exceeded");
  },
  async "busy (429)"() {
    const once = asked(strict, { maxRetries: 0 });
    const error = await full(() => refused(generateText(once)));
    assert.equal(error.statusCode, 429);
    await full(() => generateText(asked(strict)), 500);
  },
  async "late (408)"() {
    await tooSlow(async () => {
      assert.equal((await refused(generateText(asked(strict)))).statusCode, 408);
    });
  },
});
