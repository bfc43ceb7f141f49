// What a run shows is a fold of its events: the same function for a reply that streams in, for one that was read
// after a reload, and in every tab. Nothing here knows of the page; tests call it with events and look at the result.
//
// A run: {runId, ordinal, status, input, items, lastSeq, started, attempt, reason, usage, whole}. `status` is sending, unsure,
// queued, running, completed, failed or cancelled. `items` are {kind, seq, ...} in the order in which they are shown:
// text and reasoning {pieces: [[seq, text]]}, tool, action, memories, notice, failed, usage, step.

export const FINISHED = new Set(["completed", "failed", "cancelled"]);
const TERMINAL = { "run.completed": "completed", "run.failed": "failed", "run.cancelled": "cancelled" };

export function newRun(runId = "", ordinal = Infinity) {
  return {
    runId, ordinal, status: runId ? "queued" : "sending", input: [], items: [], lastSeq: 0, started: false, attempt: 0,
    reason: "", whole: true,
  };
}

export const isFinished = (run) => FINISHED.has(run.status);

// Takes one event into a run; true if it was the next one, false if it is known. Throws at a gap.
export function fold(run, event) {
  if (event.seq <= run.lastSeq) return false;
  if (event.seq !== run.lastSeq + 1) throw new Error(`event ${event.seq} after ${run.lastSeq}`);
  run.lastSeq = event.seq;
  run.runId = event.run_id;
  apply(run, event);
  return true;
}

function apply(run, { seq, type, data, time }) {
  const { items } = run;
  const last = items[items.length - 1];
  const tool = (id) => items.find((item) => item.kind === "tool" && item.callId === id);
  switch (type) {
    case "run.created":
      run.input = data.input || [];
      run.ordinal = data.ordinal ?? run.ordinal;
      if (!run.started && !isFinished(run)) run.status = "queued";
      break;
    case "run.started":
      run.attempt = data.attempt;
      begin(run);
      break;
    case "step.started":
      begin(run);
      items.push({ seq, kind: "step" });
      break;
    case "text.delta":
    case "reasoning.delta": {
      begin(run);
      const kind = type === "text.delta" ? "text" : "reasoning";
      if (last && last.kind === kind) last.pieces.push([seq, data.text]);
      else items.push({ seq, kind, pieces: [[seq, data.text]] });
      break;
    }
    case "message.completed": {
      // The whole text of the step; it is shown from the deltas unless none came.
      begin(run);
      let step = items.length;
      while (step > 0 && items[step - 1].kind !== "step") step--;
      if (data.content && !items.slice(step).some((item) => item.kind === "text")) {
        items.push({ seq, kind: "text", pieces: [[seq, data.content]] });
      }
      break;
    }
    case "tool.call":
      begin(run);
      items.push({
        seq, kind: "tool", callId: data.call_id, name: data.name, arguments: asText(data.arguments), progress: [],
        results: [], decisions: [],
      });
      break;
    case "tool.progress": tool(data.call_id)?.progress.push([seq, data.text]); break;
    case "tool.result":
      tool(data.call_id)?.results.push({ ...data, seq });
      break;
    case "tool.reconciled": {
      const call = tool(data.call_id);
      if (call && data.finding === "not_done") {
        call.results.push({ seq, status: "again" });
        call.progress.push([seq, "It had not taken effect and runs again.\n"]);
      }
      break;
    }
    case "action.required": {
      begin(run);
      const open = items.some((item) => item.kind === "action" && item.callId === data.call_id && !item.decision);
      if (open) break;
      items.push({
        seq, kind: "action", callId: data.call_id, asks: data.kind === "approval" ? "approval" : "unknown",
        name: data.name, arguments: asText(data.arguments),
      });
      break;
    }
    case "action.resolved": {
      // A person's word always has a content; without one the tool itself found out what became of the call.
      const decision = { seq, word: data.decision, content: data.content || "", person: "content" in data, time };
      tool(data.call_id)?.decisions.push(decision);
      const asked = items.filter((item) => item.kind === "action" && item.callId === data.call_id && !item.decision);
      for (const item of asked) item.decision = decision;
      break;
    }
    case "memory.recalled": items.push({ seq, kind: "memories", memories: data.memories || [] }); break;
    case "context.degraded":
      items.push({ seq, kind: "notice", text: `Without ${data.part}: ${data.detail || ""}` });
      break;
    case "attempt.reset": reset(run, data.from_seq); break;
    case "usage": items.push({ ...data, seq, kind: "usage" }); break;
    case "run.completed": run.status = TERMINAL[type]; break;
    case "run.failed":
      run.status = TERMINAL[type];
      items.push({ ...data, seq, kind: "failed" });
      break;
    case "run.cancelled":
      run.status = TERMINAL[type];
      run.reason = data.reason || "";
      if (run.started) items.push({ seq, kind: "notice", text: stoppedText(run.reason) });
      break;
    default: break; // a newer server's event
  }
}

function begin(run) {
  run.started = true;
  if (!isFinished(run)) run.status = "running";
}

const stoppedText = (reason) => (/interrupted/.test(reason) ? "Stopped: newer input came." : "Stopped.");

// Arguments come as text (see json.js); tests and older servers may hand over the value.
const asText = (value) => (value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value));

// Discards what came from a seq on: the replica that wrote it was lost, and another one says it anew.
function reset(run, from) {
  const early = (list) => list.filter((one) => (Array.isArray(one) ? one[0] : one.seq) < from);
  run.items = early(run.items);
  for (const item of run.items) {
    for (const name of ["pieces", "progress", "results", "decisions"]) if (item[name]) item[name] = early(item[name]);
    if (item.decision && item.decision.seq >= from) delete item.decision;
  }
}

// What is known of a call, in a word: called, working, waiting, completed, failed, denied, unknown, again, lost, answered.
export function callState(run, call) {
  const result = lastResult(call);
  const word = call.decisions[call.decisions.length - 1]?.word;
  if (result) {
    if (result.status === "failed" && word === "deny") return "denied";
    return result.status || "answered";
  }
  if (isFinished(run)) return word === "deny" ? "denied" : "lost";
  if (run.items.some((item) => item.kind === "action" && item.callId === call.callId && !item.decision)) return "waiting";
  return call.progress.length ? "working" : "called";
}

export function lastResult(call) {
  const result = call.results[call.results.length - 1];
  return result && result.status !== "again" ? result : null;
}

const WORDS = {
  called: "called", working: "working", waiting: "waits for a decision", completed: "completed", failed: "failed",
  denied: "denied, it did not run", unknown: "unknown: it may have taken effect", lost: "no result: the run ended before it",
  // Of a run whose log is not kept any more: its messages do not say how a call ended.
  answered: "answered",
};
export const callWords = (run, call) => WORDS[callState(run, call)] || callState(run, call);

const DECISIONS = {
  approve: "approved", deny: "denied", completed: "it was done", failed: "it was not done", retry: "it runs again",
  abandon: "given up",
};

// The trace of what was asked and decided, as it is kept; empty while it is still to be decided.
export function decisionWords(run, action) {
  const { decision } = action;
  if (!decision) return isFinished(run) ? `${action.name}: nobody decided before the run ended.` : "";
  const word = DECISIONS[decision.word] || decision.word;
  const by = decision.person ? "by a person" : "as its tool found out";
  const at = decision.time ? ` on ${new Date(decision.time).toLocaleString()}` : "";
  return `${action.name}: ${word}, ${by}${at}.`;
}

// The events that messages stand for, of a run whose log is older than what is kept. `row` is the run as the API
// lists it, `messages` are those that it wrote.
export function eventsOfMessages(row, messages) {
  const made = [];
  const add = (type, data) => made.push({ run_id: row.run_id, seq: made.length + 1, type, data, time: row.create_time_ms });
  const inputs = [];
  const rest = [...messages];
  while (rest.length && (rest[0].role === "user" || rest[0].role === "system")) inputs.push(rest.shift());
  add("run.created", { ordinal: row.ordinal, input: inputs.map(({ role, content }) => ({ role, content })) });
  if (row.attempt || rest.length) add("run.started", { attempt: row.attempt });
  for (const message of rest) {
    if (message.role === "tool") {
      add("tool.result", { call_id: message.tool_call_id, status: "", content: message.content });
      continue;
    }
    add("step.started", {});
    add("message.completed", { content: message.content });
    for (const call of message.tool_calls || []) add("tool.call", call);
  }
  if (row.usage) add("usage", row.usage);
  if (row.status === "failed") add("run.failed", row.error || { message: "unknown" });
  else if (row.status === "cancelled") add("run.cancelled", { reason: "" });
  else add("run.completed", {});
  return made;
}
