/** Requests to the server. A request that changes something carries the session's CSRF token. */

import { newKey } from "./outbox.js";
import { known, t } from "./texts.js";

/** What is wrong. status 0: no response. */
export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

let csrf = "";

async function send(method, path, body = {}, again = true) {
  const headers = { "X-CSRF-Token": csrf };
  const request = { method, headers, cache: "no-store", credentials: "same-origin" };
  if (body instanceof Blob) headers["Content-Type"] = "application/octet-stream";
  else if (method !== "GET") headers["Content-Type"] = "application/json";
  if (method !== "GET") request.body = body instanceof Blob ? body : JSON.stringify(body);
  let response;
  try {
    response = await fetch(`api/${path}`, request);
  } catch {
    throw new Refusal(0, t("error.offline"));
  }
  const found = await response.json().catch(() => null);
  if (response.ok && found !== null) return found;
  const { code, message } = found?.error ?? {};
  if (code === "csrf" && again && (await me())) return send(method, path, body, false);
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
export const password = (old, fresh) => post("password", { old, new: fresh });
export const invitation = (token) => get(`invitations/${part(token)}`);
export const accept = (token, name, password) =>
  post(`invitations/${part(token)}/accept`, { name, password });

export const next = () => post("next");
export const mine = () => get("mine?limit=100");
export const reopen = (task) => post(`tasks/${part(task)}/reopen`, { key: newKey() });
export const saveDraft = ({ id, lease }, answer, seconds) =>
  send("PUT", `tasks/${part(id)}/draft`, { lease: lease.id, answer, seconds });

/** What the outbox keeps of an answer or a skip. */
export function entry(kind, { id, lease }, body) {
  const key = newKey();
  return { key, task: id, kind, body: { ...body, lease: lease.id, key } };
}
export const deliver = ({ task, kind, body }) => post(`tasks/${part(task)}/${kind}`, body);

export const tasks = (query) => get(`tasks?${new URLSearchParams(query)}`);
export const task = (id) => get(`tasks/${part(id)}`);
export const judge = (task, answer, accepted, comment) => {
  const verdict = { accepted, comment, key: newKey() };
  return post(`tasks/${part(task)}/answers/${part(answer)}/verdict`, verdict);
};
export const settings = (task, body) => post(`tasks/${part(task)}/settings`, body);
export const quality = () => get("quality");
export const invitations = () => get("invitations");
export const invite = (role, days) => post("invitations", { role, days });
export const revoke = (id) => send("DELETE", `invitations/${part(id)}`);
export const people = () => get("people");
export const change = (person, body) => post(`people/${part(person)}`, body);
export const reset = (person) => post(`people/${part(person)}/reset`);
export const upload = (file) => post(`import?name=${part(file.name)}`, file);
