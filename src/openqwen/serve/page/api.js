/** The server: OpenAI's protocol, its streams and its errors. */

export const HOME = new URL("v1", document.baseURI).pathname;
const KEY = "openqwen.key";

/** What is wrong, and what to do. status 0: no response. long: the conversation is too long. */
export class ApiError extends Error {
  constructor(message, { status = 0, retry = null, advice = "", long = false } = {}) {
    super(message);
    Object.assign(this, { status, retry, advice, long });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  remembered: () => localStorage.getItem(KEY) !== null,
  set(value, remember) {
    sessionStorage.setItem(KEY, value);
    if (remember) localStorage.setItem(KEY, value);
    else localStorage.removeItem(KEY);
  },
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

/** A path such as `/reference/v1` on the server of this page; throws for any other address. */
export function base(text) {
  if (!text) return HOME;
  const url = new URL(text, location.origin);
  if (url.origin !== location.origin)
    throw new ApiError(`${url.origin} is another server.`, {
      advice: "Give a path on this one, such as /reference/v1.",
    });
  return url.pathname.replace(/\/+$/, "");
}

async function ask(path, body = null, signal = null) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const request = { headers, signal, cache: "no-store" };
  if (body)
    Object.assign(
      request,
      { method: "POST", body: JSON.stringify(body) },
      { headers: { ...headers, "Content-Type": "application/json" } },
    );
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", {
      advice: "Check that it is still running, then try again.",
    });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let said = "",
    code = "";
  try {
    const { error } = JSON.parse(text);
    said = typeof error === "string" ? error : error?.message;
    code = error?.code;
  } catch {
    /* not JSON: a proxy's page, which is of no use to a reader */
  }
  const { status } = response;
  const seconds = Number(response.headers.get("Retry-After"));
  const long = status === 413 || code === "context_length_exceeded";
  const advice = long
    ? "Shorten the message, or begin a new conversation."
    : ({
        400: "Change the message or the settings.",
        401: "Give the server's key below.",
        403: "This key may not do that.",
        404: "Choose another model in the settings, or check the server's address.",
        429: "The server is busy.",
        503: "The server is starting or stopping; try again.",
      }[status] ?? (status >= 500 ? "See the server's log, then try again." : "Try again."));
  return new ApiError(said || `The server said ${status} ${response.statusText}.`, {
    status,
    advice,
    long,
    retry: status === 429 ? seconds || 5 : null,
  });
}

/** Ids and context lengths of the models at a base. */
export async function models(where = HOME) {
  const { data } = await (await ask(`${where}/models`)).json();
  return data.map((model) => ({
    id: model.id,
    context: model.max_model_len ?? model.meta?.n_ctx_train ?? null,
  }));
}

/** The prompt as the chat template renders it: {prompt, tokens}. llama.cpp has both routes too. */
export async function render(where, body) {
  const root = where.replace(/\/v1$/, "");
  const { prompt } = await (await ask(`${root}/apply-template`, body)).json();
  const { count, tokens } = await (
    await ask(`${root}/tokenize`, { content: prompt, parse_special: true })
  ).json();
  return { prompt, tokens: count ?? tokens.length };
}

/** Data of server-sent events out of pieces of bytes, however they are cut. */
export async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "",
    data = [];
  for (;;) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
    if (done) return;
  }
}

/** The chunks of one streamed answer. A stream that ends before it says so is an error. */
export async function* chat(where, body, signal) {
  const response = await ask(`${where}/chat/completions`, body, signal);
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error)
        throw new ApiError(chunk.error.message ?? String(chunk.error), {
          status: Number(chunk.error.code) || 500,
          advice: "What had come is kept. Try again.",
        });
      finished ||= chunk.choices?.some((choice) => choice.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.", {
      advice: "What had come is kept. Try again.",
    });
  }
  if (!finished)
    throw new ApiError("The answer broke off.", { advice: "What had come is kept. Try again." });
}
