/** Requests to the server, with the key where it wants one. */

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem("openqwen.key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer. Start `openqwen inspect` again.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refusal(response.status, body.error?.message ?? `Status ${response.status}.`);
}

export const ask = async (path, signal) => (await send(path, { signal })).json();

export const post = async (path) => {
  const headers = { "Content-Type": "application/json" };
  return (await send(path, { method: "POST", body: "{}", headers })).json();
};

export const text = async (path) => (await send(path)).text();
