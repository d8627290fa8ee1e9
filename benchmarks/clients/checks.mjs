// What the JavaScript clients' scripts share; checks.py in JavaScript.

import { strict as assert } from "node:assert";

export const [url, strict, ...named] = process.argv.slice(2);
export const HELLO = "Say hello.";
export const WEATHER = "What is the weather in Oslo? Use the tool.";
export const CITIES = ["Oslo", "Paris"];
export const TOO_LONG = "word ".repeat(20000);
export class Choice extends Error {} // the model chose otherwise: no fault of server or client

export async function metric(base, name, label = "") {
  const text = await (await fetch(`${base}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(`vllm:${name}{`));
  const labelled = lines.filter((line) => line.includes(label));
  return labelled.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

export async function post(path, body = {}) {
  const headers = { "content-type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body) };
  return (await fetch(strict + path, options)).text();
}

export async function until(condition) {
  while (!(await condition())) await new Promise((done) => setTimeout(done, 20));
}

/** Call `work` while the strict server has no place free, for some time or until work ends. */
export async function full(work, milliseconds = null) {
  await post("/pause");
  const messages = [{ role: "user", content: HELLO }];
  const held = post("/v1/chat/completions", { messages, max_tokens: 1 });
  await until(() => metric(strict, "num_requests_waiting"));
  if (milliseconds !== null) setTimeout(() => post("/resume"), milliseconds);
  try {
    return await work();
  } finally {
    await post("/resume");
    await held;
  }
}

/** Call `work` while the strict server ends each answer at its time limit; it may ask only once. */
export async function tooSlow(work) {
  await post("/pause");
  const before = await metric(strict, "request_success_total", "abort");
  try {
    await work();
    const times = (await metric(strict, "request_success_total", "abort")) - before;
    assert.equal(times, 1, `asked ${times} times`);
  } finally {
    await post("/resume");
  }
}

/** Run the checks that are named, or all; prints one line of JSON for each. */
export async function main(checks) {
  for (const what of named.length ? named : Object.keys(checks)) {
    let [outcome, why] = ["passed", ""];
    try {
      await checks[what]();
    } catch (error) {
      if (!(error instanceof Choice)) console.error(error);
      outcome = error instanceof Choice ? "model" : "failed";
      why = error.message;
    }
    console.log(JSON.stringify({ what, outcome, why: why.slice(0, 500) }));
  }
  process.exit(0);
}
