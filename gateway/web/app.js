// The chat page. No framework and no foreign code: a small client of the gateway's own HTTP API.
//
// What a run shows is a fold of its event log, so that a reload, a broken stream or another gateway changes
// nothing: the page asks for the events after the last one it has and goes on. All text gets into the page
// as text nodes, never as HTML.

const $ = (id) => document.getElementById(id);
const TERMINAL = new Set(["run.completed", "run.failed", "run.cancelled"]);
const BACKOFF = { first: 300, most: 5000 };

const state = {
  sessions: [],
  nextPage: "",
  pages: 1, // how many pages of the list were loaded
  sessionId: null,
  runs: [], // views of runs that are not finished, oldest first
  opening: 0,
};

// ---- talking to the gateway ------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || `the gateway answered ${status}`);
    this.status = status;
    this.reason = problem.reason || "";
    this.retryAfter = retryAfter;
  }
}

async function request(method, path, body, options = {}) {
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
    if (answer.status === 401 && !path.startsWith("/auth/")) showSignIn("The sign-in has ended.");
    throw error;
  }
  return answer;
}

const getJson = async (path) => (await request("GET", path)).json();

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

function uniqueKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Yields {id, event, data} of an SSE response, as the standard says.
async function* frames(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let frame = { id: "", event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
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

// ---- elements --------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Markdown, a small safe part of it: fences, headings, lists, inline code, bold, italics, http(s) links.
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^*\s](?:[\s\S]*?[^*\s])?)\*\*|\*([^*\s](?:[^*]*[^*\s])?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"')\]]+[^\s<>"')\].,;:!?])/g;

function inline(text, into) {
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) into.append(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (match[2] !== undefined) into.append(element("code", {}, match[2]));
    else if (match[3] !== undefined) into.append(inline(match[3], element("strong")));
    else if (match[4] !== undefined) into.append(inline(match[4], element("em")));
    else into.append(link(match[6] || match[7], match[5] || match[7]));
  }
  if (at < text.length) into.append(text.slice(at));
  return into;
}

function link(href, label) {
  let url;
  try { url = new URL(href); } catch { return label; }
  if (url.protocol !== "http:" && url.protocol !== "https:") return label;
  return element("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, label);
}

function markdown(text) {
  const blocks = [];
  let paragraph = [];
  let list = null;
  const endParagraph = () => {
    if (!paragraph.length) return;
    const made = element("p");
    paragraph.forEach((line, index) => {
      if (index) made.append(element("br"));
      inline(line, made);
    });
    blocks.push(made);
    paragraph = [];
  };
  const end = () => { endParagraph(); list = null; };
  const lines = text.split("\n");
  for (let n = 0; n < lines.length; n++) {
    const line = lines[n];
    const fence = line.match(/^\s*(```+|~~~+)/);
    if (fence) {
      end();
      const code = [];
      for (n++; n < lines.length && !lines[n].trimStart().startsWith(fence[1]); n++) code.push(lines[n]);
      blocks.push(element("pre", {}, element("code", {}, code.join("\n"))));
      continue;
    }
    const heading = line.match(/^#{1,6}\s+(.*)$/);
    const item = line.match(/^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/);
    if (heading) {
      end();
      blocks.push(inline(heading[1], element("h3")));
    } else if (item) {
      endParagraph();
      const kind = item[1] ? "ul" : "ol";
      if (!list || list.localName !== kind) {
        list = element(kind, kind === "ol" && item[2] !== "1" ? { start: item[2] } : {});
        blocks.push(list);
      }
      list.append(inline(item[3], element("li")));
    } else if (line.trim() === "") {
      // A blank line inside of a list does not end it if another item follows.
      endParagraph();
      if (!(lines[n + 1] || "").match(/^\s*([-*+]|\d{1,9}[.)])\s/)) list = null;
    } else if (list && /^\s{2,}/.test(line)) {
      const last = list.lastElementChild;
      last.append(element("br"));
      inline(line.trim(), last);
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  end();
  return blocks;
}

const pretty = (value) => {
  if (typeof value !== "string") return JSON.stringify(value, null, 2);
  try { return JSON.stringify(JSON.parse(value), null, 2); } catch { return value; }
};

function toolCard(name, callArguments, result, progress) {
  const status = result ? result.status : progress ? "working" : "called";
  const made = element("details", { class: "details tool" },
    element("summary", {}, element("b", {}, name), ` ${status}`));
  made.append(element("pre", { "aria-label": "Arguments" }, pretty(callArguments)));
  if (progress && !result) made.append(element("pre", { "aria-label": "Progress" }, progress));
  if (result) made.append(element("pre", { "aria-label": "Result" }, pretty(result.content ?? "")));
  if (result?.content_ref) {
    const [runId] = result.call_id.split(":");
    const href = `/v1/runs/${runId}/tool-calls/${encodeURIComponent(result.call_id)}/content`;
    made.append(element("a", { href, download: `${name}.txt` }, "The whole result"));
  }
  return made;
}

function userMessage(text, role = "user") {
  return element("article", { class: `message ${role}`, "aria-label": role === "user" ? "You" : role },
    element("div", { class: "body" }, text));
}

// ---- one run: a fold of its events -------------------------------------------------------------------

class RunView {
  constructor(runId = "") {
    this.runId = runId;
    this.lastSeq = 0;
    this.items = []; // {seq, kind, ...} in the order they are shown
    this.finished = false;
    this.input = [];
    this.attempt = 0;
    this.stopped = new AbortController();
    this.element = element("article", { class: "message assistant", "aria-label": "Assistant", "aria-busy": "true" });
    this.pending = false;
    this.waiting = "Waiting…";
    this.draw();
  }

  // Takes one event; true if it was the next one.
  take(event) {
    if (this.finished || event.seq <= this.lastSeq) return false;
    if (event.seq !== this.lastSeq + 1) throw new Error(`event ${event.seq} after ${this.lastSeq}`);
    this.lastSeq = event.seq;
    this.runId = event.run_id;
    this.fold(event);
    this.drawSoon();
    return true;
  }

  fold({ seq, type, data }) {
    const items = this.items;
    const last = items[items.length - 1];
    const tool = (id) => items.find((item) => item.kind === "tool" && item.callId === id);
    switch (type) {
      case "run.created": this.input = data.input || []; break;
      case "run.started":
        this.attempt = data.attempt;
        this.waiting = "Thinking…";
        break;
      case "step.started": items.push({ seq, kind: "step" }); break;
      case "text.delta":
      case "reasoning.delta": {
        const kind = type === "text.delta" ? "text" : "reasoning";
        if (last && last.kind === kind) last.pieces.push([seq, data.text]);
        else items.push({ seq, kind, pieces: [[seq, data.text]] });
        break;
      }
      case "message.completed": {
        // The whole text of the step; it is shown from the deltas unless none came.
        let step = items.length;
        while (step > 0 && items[step - 1].kind !== "step") step--;
        if (data.content && !items.slice(step).some((item) => item.kind === "text")) {
          items.push({ seq, kind: "text", pieces: [[seq, data.content]] });
        }
        break;
      }
      case "tool.call":
        items.push({ seq, kind: "tool", callId: data.call_id, name: data.name, arguments: data.arguments, progress: [] });
        break;
      case "tool.progress": tool(data.call_id)?.progress.push([seq, data.text]); break;
      case "tool.result": {
        const call = tool(data.call_id);
        if (call) { call.result = data; call.resultSeq = seq; }
        break;
      }
      case "tool.reconciled": {
        const call = tool(data.call_id);
        if (call && data.finding === "not_done") {
          delete call.result;
          call.progress.push([seq, "It had not taken effect and runs again.\n"]);
        }
        break;
      }
      case "action.required": {
        const open = items.some((item) => item.kind === "action" && item.call_id === data.call_id && !item.resolved);
        if (!open) items.push({ ...data, seq, kind: "action", kindOfAction: data.kind, keys: {} });
        break;
      }
      case "action.resolved":
        for (const item of items) if (item.kind === "action" && item.call_id === data.call_id) item.resolved = true;
        break;
      case "memory.recalled": items.push({ seq, kind: "memories", memories: data.memories || [] }); break;
      case "context.degraded": items.push({ seq, kind: "notice", text: `Without ${data.part}: ${data.detail || ""}` }); break;
      case "attempt.reset": this.reset(data.from_seq); break;
      case "usage": items.push({ ...data, seq, kind: "usage" }); break;
      case "run.completed": this.finished = true; break;
      case "run.failed":
        this.finished = true;
        items.push({ ...data, seq, kind: "failed" });
        break;
      case "run.cancelled":
        this.finished = true;
        items.push({ seq, kind: "notice", text: "Stopped." });
        break;
      default: break; // a newer server's event
    }
  }

  // Discards what came from a seq on: the replica that wrote it was lost, and another one says it anew.
  reset(from) {
    this.items = this.items.filter((item) => item.seq < from);
    for (const item of this.items) {
      if (item.pieces) item.pieces = item.pieces.filter(([seq]) => seq < from);
      if (item.progress) item.progress = item.progress.filter(([seq]) => seq < from);
      if (item.resultSeq >= from) { delete item.result; delete item.resultSeq; }
    }
  }

  drawSoon() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  draw() {
    const stick = atBottom();
    const open = new Set([...this.element.querySelectorAll("details[open]")].map((one) => one.dataset.key));
    const parts = [];
    for (const item of this.items) {
      const part = this.part(item);
      if (!part) continue;
      const key = `${item.kind}-${item.seq}`;
      if (part.localName === "details") {
        part.dataset.key = key;
        part.open = open.has(key);
      }
      parts.push(part);
    }
    const shown = this.items.some((item) => item.kind === "text" || item.kind === "tool");
    if (!this.finished && !shown) parts.push(element("p", { class: "thinking" }, this.waiting));
    this.element.replaceChildren(...parts);
    this.element.classList.toggle("streaming", !this.finished);
    this.element.setAttribute("aria-busy", String(!this.finished));
    if (stick) toBottom();
  }

  part(item) {
    switch (item.kind) {
      case "text": {
        const text = item.pieces.map(([, piece]) => piece).join("");
        return text.trim() ? element("div", { class: "text" }, ...markdown(text)) : null;
      }
      case "reasoning":
        return element("details", { class: "details" }, element("summary", {}, "Reasoning"),
          element("div", { class: "text" }, ...markdown(item.pieces.map(([, piece]) => piece).join(""))));
      case "tool":
        return toolCard(item.name, item.arguments, item.result, item.progress.map(([, text]) => text).join(""));
      case "memories": {
        const count = item.memories.length;
        return element("details", { class: "details memories" },
          element("summary", {}, `Remembered ${count} ${count === 1 ? "thing" : "things"}`),
          element("ul", {}, ...item.memories.map((memory) => element("li", {}, memory.text))));
      }
      case "action": return this.actionPart(item);
      case "notice": return element("p", { class: "notice" }, item.text);
      case "failed": {
        const notice = element("div", { class: "notice bad", role: "alert" }, `This did not work: ${item.message}`);
        notice.append(element("br"), element("button", { type: "button", onclick: () => submit(this.text()) }, "Try again"));
        return notice;
      }
      case "usage": {
        const bits = [`${item.input_tokens} tokens read`, `${item.output_tokens} written`];
        if (item.ttft_ms) bits.push(`first one after ${item.ttft_ms} ms`);
        return element("p", { class: "usage" }, bits.join(" · "));
      }
      default: return null;
    }
  }

  actionPart(item) {
    if (item.resolved || this.finished) return element("p", { class: "notice" }, `${item.name}: decided.`);
    const decide = async (decision, content, button) => {
      button.disabled = true;
      try {
        // One key for each word: sent again after an answer that was lost it is the same word.
        item.keys[decision] ??= uniqueKey();
        await request("POST", `/v1/runs/${this.runId}/actions/${encodeURIComponent(item.call_id)}`,
          { decision, content }, { headers: { "Idempotency-Key": item.keys[decision] } });
        // The log says so only when the run has nothing else to do.
        item.resolved = true;
        this.drawSoon();
        setStatus("");
      } catch (error) {
        button.disabled = false;
        setStatus(error.message, true);
      }
    };
    const choice = (label, decision, content = "") => {
      const button = element("button", { type: "button" }, label);
      button.addEventListener("click", () => decide(decision, content, button));
      return button;
    };
    const unknown = item.kindOfAction !== "approval";
    const question = unknown
      ? `It is not known whether ${item.name} ran. It will not be run again by itself. What happened?`
      : `${item.name} is about to run. Shall it?`;
    const choices = unknown
      ? [choice("It was done", "completed"), choice("It was not done", "failed"), choice("Run it again", "retry")]
      : [choice("Run it", "approve"), choice("Do not run it", "deny")];
    return element("div", { class: "notice warn", role: "group", "aria-label": "A decision is needed" },
      question, element("pre", {}, pretty(item.arguments ?? {})), ...choices,
      choice("Give up", "abandon", "Given up by a person."));
  }

  text() {
    return this.input.length === 1 && this.input[0].role === "user" ? this.input[0].content : this.input;
  }

  // Takes a response's events. True: the log is complete. A number: come back after so many ms.
  async read(answer) {
    for await (const frame of frames(answer)) {
      if (frame.event === "reconnect") return JSON.parse(frame.data).after_ms || 0;
      if (!frame.id) continue;
      if (this.take(JSON.parse(frame.data)) && this.lastSeq === 1) this.onCreated?.();
      if (!this.finished) setStatus("");
      if (this.finished) return true;
    }
    return this.finished || 0;
  }

  // Follows the run to its end over as many connections as it takes. `first` opens the first one.
  async follow(first) {
    let open = first || (() => this.watch());
    let wait = BACKOFF.first;
    while (!this.finished && !this.stopped.signal.aborted) {
      const before = this.lastSeq;
      let pause = null;
      try {
        const answer = await open();
        if (answer.status === 204) break;
        const result = await this.read(answer);
        if (result === true) break;
        pause = result;
      } catch (error) {
        if (this.stopped.signal.aborted) return;
        if (error instanceof ApiError && error.status < 500 && error.status !== 429 && error.status !== 408) throw error;
        if (error instanceof ApiError && error.retryAfter) pause = error.retryAfter;
      }
      if (this.runId) open = () => this.watch();
      wait = this.lastSeq > before ? BACKOFF.first : Math.min(wait * 2, BACKOFF.most);
      setStatus("Reconnecting…");
      await sleep(Math.max(pause ?? 0, this.lastSeq > before ? 50 : wait * (0.5 + Math.random() / 2)));
    }
    this.finished = true;
    this.draw();
    setStatus("");
  }

  watch() {
    return request("GET", `/v1/runs/${this.runId}/events`, undefined, {
      signal: this.stopped.signal,
      headers: this.lastSeq ? { "Last-Event-ID": `${this.runId}:${this.lastSeq}` } : {},
    });
  }
}

// ---- the conversation --------------------------------------------------------------------------------

const log = $("log");
const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const toBottom = () => { log.scrollTop = log.scrollHeight; };

function setStatus(text, bad = false) {
  const status = $("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("bad", bad);
}

function showEmpty() {
  log.replaceChildren(element("div", { class: "empty" },
    element("img", { src: "/favicon.svg", alt: "", width: "56", height: "56" }),
    element("p", {}, "What would you like to talk about?")));
}

function drawBusy() {
  $("stop").hidden = !state.runs.length;
  document.body.classList.toggle("busy", state.runs.length > 0);
}

function leaveRuns() {
  for (const view of state.runs) view.stopped.abort();
  state.runs = [];
  drawBusy();
}

async function openSession(sessionId, { push = true } = {}) {
  const ticket = ++state.opening;
  leaveRuns();
  state.sessionId = sessionId;
  if (push) history.pushState(null, "", sessionId ? `#/s/${sessionId}` : "#/");
  drawSessions();
  drawHeader();
  closeSidebar();
  setStatus("");
  if (!sessionId) {
    showEmpty();
    $("input").focus();
    return;
  }
  log.replaceChildren();
  try {
    const [session, messages, runs] = await Promise.all([
      getJson(`/v1/sessions/${sessionId}`),
      allMessages(sessionId),
      getJson(`/v1/sessions/${sessionId}/runs?page_size=50`),
    ]);
    if (ticket !== state.opening) return;
    remember(session);
    drawHistory(messages, runs.runs.reverse());
  } catch (error) {
    if (ticket !== state.opening) return;
    if (error.status === 404) return openSession(null);
    setStatus(`The conversation cannot be loaded: ${error.message}`, true);
    log.replaceChildren(element("div", { class: "empty" },
      element("button", { type: "button", onclick: () => openSession(sessionId, { push: false }) }, "Try again")));
  }
  $("input").focus();
}

async function allMessages(sessionId) {
  const found = [];
  let token = "";
  do {
    const page = await getJson(`/v1/sessions/${sessionId}/messages?page_size=500&page_token=${encodeURIComponent(token)}`);
    found.push(...page.messages);
    token = page.next_page_token;
  } while (token);
  return found;
}

function drawHistory(messages, runs) {
  const active = new Map(runs.filter((run) => !["completed", "failed", "cancelled"].includes(run.status)).map((run) => [run.run_id, run]));
  const results = new Map(messages.filter((message) => message.role === "tool").map((message) => [message.tool_call_id, message]));
  const ended = new Map(runs.map((run) => [run.run_id, run]));
  const inputs = new Map();
  let of = null;
  const closeRun = () => {
    const run = ended.get(of);
    if (!run) return;
    if (active.has(of)) startView(new RunView(of));
    else if (run.status === "failed") log.append(failedNotice(run, inputs.get(of)));
    else if (run.status === "cancelled") log.append(element("p", { class: "notice" }, "Stopped."));
  };
  for (const message of messages) {
    if (message.run_id !== of) {
      closeRun();
      of = message.run_id;
    }
    if (message.role === "user" || message.role === "system") {
      inputs.set(of, [...(inputs.get(of) || []), { role: message.role, content: message.content }]);
      log.append(userMessage(message.content, message.role));
    } else if (message.role === "assistant" && !active.has(of)) {
      const body = element("article", { class: "message assistant", "aria-label": "Assistant" });
      if (message.content.trim()) body.append(element("div", { class: "text" }, ...markdown(message.content)));
      for (const call of message.tool_calls || []) {
        const result = results.get(call.call_id);
        body.append(toolCard(call.name, call.arguments, result && { status: "completed", content: result.content }));
      }
      log.append(body);
    }
  }
  closeRun();
  // Runs whose input is not among the messages yet.
  for (const [runId] of active) if (!state.runs.some((view) => view.runId === runId)) startView(new RunView(runId));
  if (!log.childElementCount) showEmpty();
  toBottom();
}

function failedNotice(run, input) {
  const notice = element("div", { class: "notice bad" }, `This did not work: ${run.error?.message || "unknown"}`);
  if (input) {
    const again = input.length === 1 ? input[0].content : input;
    notice.append(element("br"), element("button", { type: "button", onclick: () => submit(again) }, "Try again"));
  }
  return notice;
}

// Shows a run and follows it to its end.
async function startView(view, first) {
  state.runs.push(view);
  log.append(view.element);
  drawBusy();
  toBottom();
  try {
    await view.follow(first);
  } catch (error) {
    view.finished = true;
    view.draw();
    view.element.append(element("div", { class: "notice bad", role: "alert" }, error.message));
    if (error.status === 404) setStatus("This conversation is gone.", true);
    throw error;
  } finally {
    state.runs = state.runs.filter((other) => other !== view);
    drawBusy();
    if (!view.stopped.signal.aborted) loadSessions().catch(() => {});
  }
}

async function submit(input) {
  try {
    if (!state.sessionId) {
      const made = await (await request("POST", "/v1/sessions", {}, { headers: { "Idempotency-Key": uniqueKey() } })).json();
      remember(made);
      state.sessionId = made.session_id;
      history.pushState(null, "", `#/s/${made.session_id}`);
      log.replaceChildren();
    }
  } catch (error) {
    setStatus(`It was not sent: ${error.message}`, true);
    return false;
  }
  const sessionId = state.sessionId;
  log.querySelector(".empty")?.remove();
  const shown = typeof input === "string" ? [userMessage(input)] : input.map((one) => userMessage(one.content, one.role));
  log.append(...shown);
  const view = new RunView();
  view.input = typeof input === "string" ? [{ role: "user", content: input }] : input;
  view.onCreated = () => loadSessions().catch(() => {});
  const key = uniqueKey();
  const model = $("model").value;
  const body = { input, stream: true, ...(model ? { model } : {}) };
  // One key for all tries: however often it is sent, it is one message.
  startView(view, () => request("POST", `/v1/sessions/${sessionId}/runs`, body,
    { headers: { "Idempotency-Key": key }, signal: view.stopped.signal }))
    .catch((error) => {
      if (view.lastSeq) return;
      // It was refused, so it is no part of the conversation: give the text back.
      for (const one of shown) one.remove();
      view.element.remove();
      if (typeof input === "string" && !$("input").value) $("input").value = input;
      setStatus(`It was not sent: ${error.message}`, true);
    });
  return true;
}

async function stop() {
  const running = state.runs.filter((view) => view.runId);
  setStatus("Stopping…");
  await Promise.all(running.map((view) =>
    request("POST", `/v1/runs/${view.runId}/cancel`, { reason: "stopped at the chat page" })
      .catch((error) => setStatus(`It could not be stopped: ${error.message}`, true))));
}

// ---- the list of conversations ------------------------------------------------------------------------

const titleOf = (session) => session?.title || "New conversation";

function remember(session) {
  const at = state.sessions.findIndex((other) => other.session_id === session.session_id);
  if (at >= 0) state.sessions[at] = session;
  else state.sessions.unshift(session);
  drawSessions();
  drawHeader();
}

async function loadSessions() {
  const page = await getJson("/v1/sessions?page_size=50");
  const fresh = new Set(page.sessions.map((session) => session.session_id));
  const older = state.pages > 1 ? state.sessions.filter((session) => !fresh.has(session.session_id)) : [];
  state.sessions = [...page.sessions, ...older];
  if (state.pages === 1) state.nextPage = page.next_page_token;
  drawSessions();
  drawHeader();
}

async function loadMore() {
  const page = await getJson(`/v1/sessions?page_size=50&page_token=${encodeURIComponent(state.nextPage)}`);
  const known = new Set(state.sessions.map((session) => session.session_id));
  state.sessions.push(...page.sessions.filter((session) => !known.has(session.session_id)));
  state.nextPage = page.next_page_token;
  state.pages += 1;
  drawSessions();
}

function drawSessions() {
  $("sessions").replaceChildren(...state.sessions.map((session) => element("li", {}, element("a", {
    href: `#/s/${session.session_id}`,
    class: session.active_run_id ? "running" : "",
    "aria-current": session.session_id === state.sessionId ? "page" : undefined,
    title: titleOf(session),
  }, titleOf(session)))));
  $("more-sessions").hidden = !state.nextPage;
}

function drawHeader() {
  const session = state.sessions.find((one) => one.session_id === state.sessionId);
  $("title").textContent = titleOf(session);
  document.title = session ? `${titleOf(session)} – Hermesh` : "Hermesh";
  $("rename-button").hidden = $("delete-button").hidden = !state.sessionId;
}

function startRename() {
  $("rename").value = state.sessions.find((one) => one.session_id === state.sessionId)?.title || "";
  $("rename-form").hidden = false;
  $("title").hidden = true;
  $("rename").select();
}

function endRename() {
  $("rename-form").hidden = true;
  $("title").hidden = false;
}

async function rename(event) {
  event.preventDefault();
  try {
    remember(await (await request("PATCH", `/v1/sessions/${state.sessionId}`, { title: $("rename").value.trim() })).json());
    endRename();
    $("input").focus();
  } catch (error) {
    setStatus(`It could not be renamed: ${error.message}`, true);
  }
}

async function remove() {
  const dialog = $("delete-dialog");
  const answer = await new Promise((done) => {
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
    dialog.showModal();
  });
  if (answer !== "yes") return;
  try {
    await request("DELETE", `/v1/sessions/${state.sessionId}`);
    state.sessions = state.sessions.filter((one) => one.session_id !== state.sessionId);
    await openSession(null);
  } catch (error) {
    setStatus(`It could not be deleted: ${error.message}`, true);
  }
}

function openSidebar() {
  $("sidebar").classList.add("open");
  $("shade").hidden = false;
  $("open-sidebar").setAttribute("aria-expanded", "true");
  $("close-sidebar").focus();
}

function closeSidebar() {
  $("sidebar").classList.remove("open");
  $("shade").hidden = true;
  $("open-sidebar").setAttribute("aria-expanded", "false");
}

// ---- signing in ---------------------------------------------------------------------------------------

function showSignIn(message = "") {
  leaveRuns();
  $("chat").hidden = true;
  $("signin").hidden = false;
  $("signin-error").textContent = message;
  $("api-key").focus();
}

async function signIn(key) {
  await request("POST", "/auth/login", { api_key: key.trim() });
  await showChat();
}

async function showChat() {
  $("signin").hidden = true;
  $("chat").hidden = false;
  await Promise.all([loadSessions(), loadModels()]);
  await openSession(sessionOfAddress(), { push: false });
}

async function loadModels() {
  try {
    const models = (await getJson("/v1/models")).data;
    const chosen = localStorage.getItem("hermesh.model");
    $("model").replaceChildren(...models.map((model, index) =>
      element("option", { value: index ? model.id : "", selected: model.id === chosen }, model.id)));
    $("model-choice").hidden = models.length < 2;
  } catch { /* no agent answers now; the default model is used */ }
}

const sessionOfAddress = () => location.hash.match(/^#\/s\/([0-9a-f-]{36})$/)?.[1] ?? null;

async function begin() {
  // A key in the fragment never left the browser. It is taken out of the address before anything else.
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key) {
    history.replaceState(null, "", location.pathname);
    try {
      await signIn(key);
      return;
    } catch (error) {
      showSignIn(error.message);
      return;
    }
  }
  try {
    const { signed_in: signedIn } = await getJson("/auth/session");
    if (signedIn) await showChat();
    else showSignIn();
  } catch (error) {
    showSignIn(`The gateway does not answer: ${error.message}`);
  }
}

// ---- events of the page ---------------------------------------------------------------------------------

const input = $("input");

function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

async function send() {
  const text = input.value;
  if (!text.trim()) return;
  input.value = "";
  fit();
  if (!(await submit(text))) {
    input.value = text;
    fit();
  }
  input.focus();
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if ($("sidebar").classList.contains("open")) closeSidebar();
    else if (!$("rename-form").hidden) endRename();
    else if (state.runs.length && !$("delete-dialog").open) stop();
  } else if (event.altKey && event.key.toLowerCase() === "n") {
    event.preventDefault();
    openSession(null);
  }
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", () => openSession(null));
$("more-sessions").addEventListener("click", () => loadMore().catch((error) => setStatus(error.message, true)));
$("rename-button").addEventListener("click", startRename);
$("rename-form").addEventListener("submit", rename);
$("delete-button").addEventListener("click", remove);
$("open-sidebar").addEventListener("click", openSidebar);
$("close-sidebar").addEventListener("click", closeSidebar);
$("shade").addEventListener("click", closeSidebar);
$("model").addEventListener("change", () => {
  const select = $("model");
  localStorage.setItem("hermesh.model", select.selectedOptions[0].textContent);
});
$("signout").addEventListener("click", async () => {
  try { await request("POST", "/auth/logout", {}); } catch { /* the cookie may be gone already */ }
  state.sessions = [];
  state.sessionId = null;
  history.replaceState(null, "", location.pathname);
  showSignIn();
});
$("signin-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = $("api-key");
  try {
    await signIn(field.value);
    field.value = "";
  } catch (error) {
    $("signin-error").textContent = error.message;
    field.select();
  }
});
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#key=")) {
    begin();
    return;
  }
  const sessionId = sessionOfAddress();
  if (!$("chat").hidden && sessionId !== state.sessionId) openSession(sessionId, { push: false });
});
window.addEventListener("online", () => setStatus(""));
window.addEventListener("offline", () => setStatus("This device is offline.", true));

begin();
