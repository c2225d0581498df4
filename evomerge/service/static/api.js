// The service: requests with the token, its stream of events, and files taken away.

const TOKEN = "evomerge-token";
const BASE = "/api/v1";

let refused = () => {};

/** Call this when the service does not take the token. */
export function onRefused(handler) {
  refused = handler;
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/** An answer that says what went wrong. */
export class ServiceError extends Error {
  constructor(status, { kind, message, key, others }) {
    super(message);
    this.status = status;
    this.kind = kind;
    this.key = key ?? null;
    this.others = others ?? [];
  }
}

async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers, authorization: `Bearer ${token.get()}` };
  if (body !== undefined) sent["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(BASE + path, {
      method, signal, headers: sent, body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, { kind: "unreachable", message: "The service does not answer." });
  }
  if (answer.ok) return answer;
  const told = await answer.json().then((data) => data.error, () => null);
  if (answer.status === 401) refused();
  throw new ServiceError(answer.status, told ?? { kind: "http", message: `The service answered ${answer.status}.` });
}

/** Return the JSON of a route. */
export const get = async (path, signal) => (await call(path, { signal })).json();

/** Send JSON and return `[answer, status]`. */
export async function post(path, body = {}, { headers, signal } = {}) {
  const answer = await call(path, { method: "POST", body, headers, signal });
  return [await answer.json(), answer.status];
}

/** Return the path of a run, whatever its name. */
export const at = (name, rest = "") => `/runs/${encodeURIComponent(name)}${rest}`;

/** Take a file away under a name. */
export async function download(path, name) {
  const blob = await (await call(path)).blob();
  save(blob, name);
}

/** Let the browser save what the page has. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

const pause = (seconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/**
 * Follow a run's events until it has ended; connects again where the connection is lost.
 *
 * @param take Called with the event's name and data.
 * @param lost Called with whether the connection is lost at the moment.
 */
export async function follow(name, after, signal, take, lost) {
  let place = after;
  let wait = 1;
  while (!signal.aborted) {
    try {
      const answer = await call(at(name, `/events?after=${place}`), { signal });
      lost(false);
      wait = 1;
      for await (const message of messages(answer.body.getReader())) {
        if (message.id !== null) place = Number(message.id);
        if (message.event) take(message.event, JSON.parse(message.data));
        if (message.event === "end") return;
      }
    } catch (error) {
      if (signal.aborted || error.status === 401 || error.status === 404) return;
    }
    if (signal.aborted) return;
    lost(true);
    await pause(wait, signal);
    wait = Math.min(15, 2 * wait);
  }
}

/** Yield server-sent events. */
async function* messages(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield parsed(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(text) {
  const found = { id: null, event: "", data: "" };
  for (const line of text.split("\n")) {
    const colon = line.indexOf(":");
    const field = line.slice(0, colon);
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (field === "id") found.id = value;
    else if (field === "event") found.event = value;
    else if (field === "data") found.data += value;
  }
  return found;
}

/**
 * Return a function that asks for `work`, which is done soon, never twice at once, and the more seldom
 * the longer it takes.
 */
export function seldom(work, signal, least = 1.0) {
  let busy = false;
  let again = false;
  return async function wanted() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    do {
      again = false;
      const began = performance.now();
      await work();
      const took = (performance.now() - began) / 1000;
      await pause(Math.min(60, Math.max(least, 5 * took)), signal);
    } while (again && !signal.aborted);
    busy = false;
  };
}

/** Do something now and every so many seconds while the page is looked at. */
export async function repeat(work, seconds, signal) {
  while (!signal.aborted) {
    if (!document.hidden) await work();
    await pause(seconds, signal);
  }
}
