// Calls of the gateway. The key is kept for this tab alone.

const KEY = "qaq.key";

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(text) {
  sessionStorage.setItem(KEY, text.trim());
}

/** An answer that is an error, with its HTTP status; 0: no answer came. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The gateway does not answer.");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Refused(response.status, told?.error?.message ?? `The gateway answered ${response.status}.`);
  }
  return response;
}

export const call = async (path, options) => (await ask(path, options)).json();

/** The objects of a stream of server-sent events. */
export async function* stream(path, options) {
  const response = await ask(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const told = JSON.parse(data);
        if (told.error) throw new Refused(500, told.error.message);
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const session = (id) => `/v1/sessions/${encodeURIComponent(id)}`;
