// What the session's own stream does not tell, or not yet: a single run's log, and messages where there is no log left.

import { Expired, events, getJson } from "./api.js";

// The first events of a run's log, up to a seq; none where it is not kept any more.
export async function firstEvents(runId, seq, signal) {
  try {
    return await read(runId, seq, signal);
  } catch (error) {
    if (error instanceof Expired) return [];
    throw error;
  }
}

// Whether a run's log is older than what is kept.
export async function isGone(runId, signal) {
  try {
    await read(runId, 1, signal);
    return false;
  } catch (error) {
    if (error instanceof Expired) return true;
    throw error;
  }
}

async function read(runId, seq, signal) {
  const reading = new AbortController();
  const found = [];
  try {
    const both = AbortSignal.any([reading.signal, signal]);
    for await (const event of events(`/v1/runs/${runId}/events`, { signal: both })) {
      found.push(event);
      if (event.seq >= seq) break;
    }
    return found;
  } finally {
    reading.abort();
  }
}

// The messages of some runs of a session, by run. Runs come in the order in which they were.
export async function messagesOf(sessionId, runIds, signal) {
  const wanted = new Map(runIds.map((runId) => [runId, []]));
  let token = "";
  let found = false;
  do {
    const path = `/v1/sessions/${sessionId}/messages?page_size=500&page_token=${encodeURIComponent(token)}`;
    const page = await getJson(path, { signal });
    for (const message of page.messages) wanted.get(message.run_id)?.push(message);
    found ||= page.messages.some((message) => wanted.has(message.run_id));
    // Past the last one of them there are no more.
    const past = found && page.messages.length && !wanted.has(page.messages[page.messages.length - 1].run_id);
    token = past ? "" : page.next_page_token;
  } while (token);
  return wanted;
}
