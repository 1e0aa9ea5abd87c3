// Talks to the server that the page came from: the key, errors in OpenAI's shape, server-sent events. No elements here
// but the key's dialog, which any request may need.

import { byId } from "./dom.js";

const STORED = "t2ray-key";

/** What the server, or the way to it, refused. `status` is 0 where no answer came at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, requestId });
  }
}

export const hasKey = () => sessionStorage.getItem(STORED) !== null;

let asking = null; // the promise of the open dialog: requests that fail together ask once

/** Opens the key's dialog; true when a key was given. */
export function askKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key-input");
    byId("key-note").textContent = reason;
    byId("key-forget").hidden = !hasKey();
    input.value = "";
    dialog.returnValue = "";
    const close = (given) => {
      listeners.abort();
      dialog.close();
      asking = null;
      resolve(given);
    };
    const listeners = new AbortController();
    const on = (id, event, listener) => byId(id).addEventListener(event, listener, { signal: listeners.signal });
    on("key-form", "submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(STORED, input.value.trim());
      close(true);
    });
    on("key-forget", "click", () => {
      sessionStorage.removeItem(STORED);
      close(false);
    });
    on("key-cancel", "click", () => close(false));
    on("key-dialog", "cancel", () => close(false));
    dialog.showModal();
    input.focus();
  });
  return asking;
}

/** A request. On 401 it asks for a key and tries again, unless `ask` is false (what polls must not interrupt). */
export async function request(path, { ask = true, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(STORED);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      // relative to the page, so that it also works behind a path prefix
      response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. It may have stopped, or the network is down.");
    }
    if (response.ok) return response;
    const error = await refusal(response);
    if (response.status !== 401 || !ask) throw error;
    if (key !== sessionStorage.getItem(STORED)) continue; // a request beside this one has just been given a key
    if (!(await askKey(key ? `The key was refused: ${error.message}` : error.message))) throw error;
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = text.slice(0, 500).trim(); // a proxy's own page, say
  }
  return new ApiError(message || `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    retryAfter: Number(response.headers.get("retry-after")) || null,
    requestId: response.headers.get("x-request-id"),
  });
}

/**
 * The events of a streamed chat completion, parsed. Ends at `[DONE]`; a stream that ends before it, or sends an error,
 * throws an `ApiError`.
 */
export async function* chatStream(body, signal, onOpen) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const requestId = response.headers.get("x-request-id");
  onOpen(requestId);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const lost = (error) => {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete.", { requestId });
  };
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost);
      if (done) break;
      const events = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (!lines.length) continue; // a comment that keeps the connection open
        const data = lines.map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { requestId });
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader that has failed already has nothing left to cancel
  }
  throw new ApiError("The answer broke off: the server closed the connection before its end.", { requestId });
}
