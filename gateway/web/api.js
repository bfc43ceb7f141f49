// Talking to the gateway.

import { parse } from "./json.js";

// Longer than the heartbeats of a stream are apart: what is silent for so long is dead.
const SILENT_MS = 50_000;

export class ApiError extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || `the gateway answered ${status}`);
    this.status = status;
    this.reason = problem.reason || "";
    this.retryAfter = retryAfter;
  }

  // Whether the same request may succeed a little later.
  get passing() {
    return this.status >= 500 || this.status === 429 || this.status === 408;
  }
}

export const session = { ended: () => {} };

export async function request(method, path, body, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: options.signal,
    credentials: "same-origin",
    cache: "no-store",
  });
  if (!answer.ok) {
    let problem = {};
    try { problem = await answer.json(); } catch { /* not ours: a proxy's page */ }
    const error = new ApiError(answer.status, problem, Number(answer.headers.get("retry-after-ms")) || 0);
    if (answer.status === 401 && !path.startsWith("/auth/")) session.ended();
    throw error;
  }
  return answer;
}

export const json = async (method, path, body, options) => parse(await (await request(method, path, body, options)).text());
export const getJson = (path, options) => json("GET", path, undefined, options);

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export function uniqueKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Yields {id, event, data} of an SSE response, as the standard says. Throws when it is silent for too long.
export async function* frames(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let frame = { id: "", event: "message", data: [] };
  let timer;
  const silent = () => new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error("the stream fell silent")), SILENT_MS);
  });
  try {
    for (;;) {
      const read = reader.read();
      const { value, done } = await Promise.race([read, silent()]).finally(() => clearTimeout(timer));
      if (done) return;
      rest += value;
      const lines = rest.split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (frame.data.length) yield { ...frame, data: frame.data.join("\n") };
          frame = { id: "", event: "message", data: [] };
          continue;
        }
        const colon = line.indexOf(":");
        if (colon === 0) continue;
        const field = colon < 0 ? line : line.slice(0, colon);
        const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (field === "data") frame.data.push(text);
        else if (field === "event") frame.event = text;
        else if (field === "id") frame.id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The log is older than what is kept.
export class Expired extends Error {}

// Yields the events of a stream up to where it breaks off. Returns for how many ms to stay away.
// `headers` holds a cursor; `opened` is called once the gateway has answered.
export async function* events(path, { signal, cursor = "", opened = () => {} } = {}) {
  let answer;
  try {
    answer = await request("GET", path, undefined, { signal, headers: cursor ? { "Last-Event-ID": cursor } : {} });
  } catch (error) {
    if (error instanceof ApiError && error.reason === "CURSOR_EXPIRED") throw new Expired();
    throw error;
  }
  opened();
  if (answer.status === 204) return 0;
  for await (const frame of frames(answer)) {
    if (frame.event === "reconnect") {
      const notice = JSON.parse(frame.data);
      if (notice.reason === "cursor_expired") throw new Expired();
      return notice.after_ms || 0;
    }
    if (frame.id) yield parse(frame.data);
  }
  return 0;
}
