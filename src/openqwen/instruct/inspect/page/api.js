/** Requests of the data page. */

import { posted, send } from "./request.js";

const OFFLINE = "The server does not answer. Start `openqwen inspect` again.";

export const ask = async (path, signal) => (await send(path, OFFLINE, { signal })).json();
export const post = async (path) => (await send(path, OFFLINE, posted({}))).json();
export const text = async (path) => (await send(path, OFFLINE)).text();
