/** Requests to the server. A request that changes something carries the session's CSRF token. */

import { known, t } from "./texts.js";

/** What is wrong. status 0: no response. */
export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

let csrf = "";

async function send(method, path, body, type = "application/json") {
  const headers = { "X-CSRF-Token": csrf };
  const request = { method, headers, cache: "no-store", credentials: "same-origin" };
  if (method !== "GET") {
    headers["Content-Type"] = type;
    request.body = type === "application/json" ? JSON.stringify(body ?? {}) : body;
  }
  let response;
  try {
    response = await fetch(`api/${path}`, request);
  } catch {
    throw new Refusal(0, t("error.offline"));
  }
  const found = await response.json().catch(() => null);
  if (response.ok && found !== null) return found;
  const { code, message } = found?.error ?? {};
  const said = known(`error.${code}`) ? t(`error.${code}`) : message;
  throw new Refusal(response.status, said ?? t("error.status", { status: response.status }), code);
}

const get = (path) => send("GET", path);
const post = (path, body) => send("POST", path, body);
const part = encodeURIComponent;

/** Who is logged in, and the project; null where nobody is. */
export async function me() {
  try {
    const found = await get("me");
    csrf = found.csrf;
    return found;
  } catch (error) {
    if (error.status === 401) return null;
    throw error;
  }
}

export const login = (name, password) => post("login", { name, password });
export const logout = () => post("logout");
export const invitation = (token) => get(`invitations/${part(token)}`);
export const accept = (token, name, password) =>
  post(`invitations/${part(token)}/accept`, { name, password });

export const next = () => post("next");
export const mine = () => get("mine");
export const reopen = (task) => post(`tasks/${part(task)}/reopen`);
export const saveDraft = ({ id, lease }, answer, seconds) =>
  send("PUT", `tasks/${part(id)}/draft`, { lease: lease.id, answer, seconds });

/** A random name that nothing else has; also where the page is not in a secure context. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What the outbox keeps of an answer or a skip. */
export function entry(kind, { id, lease }, body) {
  const key = newKey();
  return { key, task: id, kind, body: { ...body, lease: lease.id, key } };
}
export const deliver = ({ task, kind, body }) => post(`tasks/${part(task)}/${kind}`, body);

export const quality = () => get("quality");
export const tasks = (query) => get(`tasks?${new URLSearchParams(query)}`);
export const task = (id) => get(`tasks/${part(id)}`);
export const invitations = () => get("invitations");
export const invite = (role, days) => post("invitations", { role, days });
export const revoke = (id) => send("DELETE", `invitations/${part(id)}`);
export const change = (person, body) => post(`people/${part(person)}`, body);
export const upload = (file) => send("POST", "import", file, "application/octet-stream");
