// One conversation: its runs, read from the session's log, page by page from the newest, and followed live. The log is
// one stream for what is stored and for what comes, whoever sent it; so a reload and another tab show the same.

import { ApiError, Expired, events, getJson, json, request, sleep, uniqueKey } from "./api.js";
import { eventsOfMessages, fold, isFinished, newRun } from "./fold.js";
import { firstEvents, isGone, messagesOf } from "./history.js";

const BACKOFF = { first: 300, most: 5000 };
// How much of the log is read at once: enough for a screen, and no more than a moment's work.
const PAGE = { runs: 20, events: 5000 };
const LISTED = 50;
// What is not read by then is shown as it comes.
const PATIENCE_MS = 2000;
// What others queue is no event before its turn: it is looked for while a run is under way.
const LOOK_MS = 3000;
// How long input is tried again without an answer before it is left to the person.
const SEND_MS = 60_000;

const cursorOf = (run) => (run ? `${run.run_id}:${run.last_seq}` : "");
const unfinished = (row) => !["completed", "failed", "cancelled"].includes(row.status);

export class Conversation {
  // `page` is told {shown(), changed(run), removed(run), ended(run), gone(), lost(error), status(text, bad)}.
  constructor(sessionId, page) {
    this.sessionId = sessionId;
    this.page = page;
    this.runs = []; // in order; what is being sent at the end
    this.shown = false;
    this.hasOlder = false;
    this.stopped = new AbortController();
    this.cursor = ""; // of the live stream
    this.rest = []; // rows of runs that are not shown yet, newest first
    this.token = null; // of the next page of rows; null before the first
    this.reconnecting = false;
  }

  get busy() {
    return this.runs.some((run) => !isFinished(run) && run.status !== "unsure");
  }

  get left() {
    return this.stopped.signal.aborted;
  }

  leave() {
    this.stopped.abort();
  }

  // Reads the newest page and follows what comes. Ends when the conversation is left.
  async open() {
    const batch = await this.nextBatch();
    if (this.left) return;
    this.cursor = cursorOf(this.rest[0]);
    const reached = batch.findLast((row) => row.status !== "queued");
    if (!reached) this.show();
    else setTimeout(() => { if (!this.left) this.show(); }, PATIENCE_MS);
    this.target = reached;
    this.lookAround(batch).catch(() => {});
    this.keepLooking();
    await this.follow(batch);
  }

  show() {
    if (this.shown) return;
    this.shown = true;
    this.page.shown();
  }

  // ---- the log ----

  async follow(batch) {
    let wait = BACKOFF.first;
    while (!this.left) {
      await this.attention();
      const before = this.cursor;
      let pause = 0;
      this.reading = new AbortController();
      try {
        const stream = events(`/v1/sessions/${this.sessionId}/events`, {
          signal: AbortSignal.any([this.reading.signal, this.stopped.signal]), cursor: this.cursor, opened: () => this.connected(),
        });
        for (;;) {
          const { value, done } = await stream.next();
          if (done) { pause = value; break; }
          this.take(value);
        }
      } catch (error) {
        if (this.left) return;
        if (this.reading.signal.aborted) continue;
        if (error instanceof Expired) {
          const passed = await this.passExpired(batch).catch(() => false);
          if (passed) continue;
        } else if (error instanceof ApiError && !error.passing) {
          if (error.status === 404) this.page.gone();
          else this.page.lost(error);
          return;
        }
        pause = error.retryAfter || 0;
      }
      if (this.left) return;
      const moved = this.cursor !== before;
      wait = moved ? BACKOFF.first : Math.min(wait * 2, BACKOFF.most);
      if (this.busy || !this.shown) this.disconnected();
      await sleep(Math.max(pause, moved ? 50 : wait * (0.5 + Math.random() / 2)));
    }
  }

  // A browser has six connections for a host, for all its tabs: one that nobody looks at, and in which nothing is
  // under way, gives its own up, and reads on from its cursor when somebody looks again.
  get unattended() {
    return document.visibilityState === "hidden" && this.shown && !this.busy;
  }

  async attention() {
    while (!this.left && this.unattended) {
      await new Promise((looked) => document.addEventListener("visibilitychange", looked, { once: true }));
    }
  }

  connected() {
    if (!this.reconnecting) return;
    this.reconnecting = false;
    this.page.status("");
  }

  disconnected(text = "Reconnecting…") {
    this.reconnecting = true;
    this.page.status(text);
  }

  // Takes an event of the live stream.
  take(event) {
    const run = this.runOf(event);
    this.cursor = `${event.run_id}:${event.seq}`;
    this.foldInto(run, event);
    const { target } = this;
    if (target && event.run_id === target.run_id && event.seq >= target.last_seq) this.show();
  }

  foldInto(run, event) {
    const before = isFinished(run);
    if (!fold(run, event)) return;
    this.changed(run);
    if (isFinished(run) && !before) {
      this.count();
      this.page.ended(run);
    }
  }

  changed(run) {
    this.count();
    this.page.changed(run);
  }

  // Each run knows how many are before it, as long as it waits.
  count() {
    let ahead = 0;
    for (const run of this.runs) {
      const before = run.ahead;
      run.ahead = ahead;
      if (before !== ahead && !run.started && !isFinished(run)) this.page.changed(run);
      if (!isFinished(run) && run.status !== "unsure") ahead += 1;
    }
  }

  find(runId) {
    return this.runs.find((run) => run.runId === runId);
  }

  runOf(event) {
    const known = this.find(event.run_id);
    if (known) return known;
    // Its answer may still be on the way.
    const input = event.type === "run.created" ? JSON.stringify(event.data.input) : null;
    const sent = this.runs.find((run) => !run.runId && JSON.stringify(run.input) === input);
    if (sent) return this.named(sent, event.run_id, event.data.ordinal);
    return this.insert(newRun(event.run_id, event.data.ordinal));
  }

  named(run, runId, ordinal) {
    run.runId = runId;
    run.ordinal = ordinal;
    if (run.status === "sending" || run.status === "unsure") run.status = "queued";
    this.insert(run);
    return run;
  }

  // Puts a run in its place, by its ordinal; what has none yet is last.
  insert(run) {
    this.runs = this.runs.filter((other) => other !== run);
    const at = this.runs.findIndex((other) => other.ordinal > run.ordinal);
    this.runs.splice(at < 0 ? this.runs.length : at, 0, run);
    this.count();
    return run;
  }

  // ---- page by page ----

  // The rows of the next runs to show, oldest first. All that are not finished are among the first ones.
  async nextBatch() {
    const chosen = [];
    let size = 0;
    for (;;) {
      while (this.rest.length) {
        const [row] = this.rest;
        const full = chosen.length >= PAGE.runs || (chosen.length > 0 && size + row.last_seq > PAGE.events);
        if (full && !this.rest.some(unfinished)) break;
        size += row.last_seq;
        chosen.push(this.rest.shift());
      }
      if (this.rest.length || this.token === "") break;
      const token = this.token ? `&page_token=${encodeURIComponent(this.token)}` : "";
      const page = await getJson(`/v1/sessions/${this.sessionId}/runs?page_size=${LISTED}${token}`, {
        signal: this.stopped.signal,
      });
      this.rest.push(...page.runs);
      this.token = page.next_page_token;
    }
    this.hasOlder = this.rest.length > 0;
    return chosen.reverse();
  }

  // Reads the page before what is shown; returns its runs, oldest first.
  async older() {
    const batch = await this.nextBatch();
    const last = batch[batch.length - 1];
    if (!last) return [];
    const runs = batch.map((row) => newRun(row.run_id, row.ordinal));
    const byId = new Map(runs.map((run) => [run.runId, run]));
    let cursor = cursorOf(this.rest[0]);
    let tries = 0;
    while (!isFinished(byId.get(last.run_id))) {
      const reading = new AbortController();
      try {
        const signal = AbortSignal.any([reading.signal, this.stopped.signal]);
        for await (const event of events(`/v1/sessions/${this.sessionId}/events`, { signal, cursor })) {
          const run = byId.get(event.run_id);
          if (!run) break;
          fold(run, event);
          cursor = `${event.run_id}:${event.seq}`;
          tries = 0;
          if (event.run_id === last.run_id && isFinished(run)) break;
        }
      } catch (error) {
        if (this.left) throw error;
        if (error instanceof Expired) cursor = await this.fromMessages(batch, (row) => byId.get(row.run_id)) || cursor;
        else if (error instanceof ApiError && !error.passing) throw error;
      } finally {
        reading.abort();
      }
      if ((tries += 1) > 5) throw new Error("the gateway does not answer");
      if (tries > 1) await sleep(BACKOFF.first * tries);
    }
    for (const run of runs) this.insert(run);
    return runs;
  }

  // ---- what is older than what is kept of the log: its messages ----

  async passExpired(batch) {
    const cursor = await this.fromMessages(batch, (row) => this.find(row.run_id) || this.insert(newRun(row.run_id, row.ordinal)));
    if (!cursor) return false;
    this.cursor = cursor;
    for (const row of batch) {
      const run = this.find(row.run_id);
      if (run && !run.whole) this.changed(run);
    }
    const { target } = this;
    if (target && isFinished(this.find(target.run_id) || {})) this.show();
    return true;
  }

  // Folds the runs at the batch's beginning whose log is gone; returns the cursor after them, or "" if there are none.
  async fromMessages(batch, runOf) {
    const { signal } = this.stopped;
    const gone = [];
    for (const row of batch) {
      if (unfinished(row) || !(await isGone(row.run_id, signal))) break;
      gone.push(row);
    }
    if (!gone.length) return "";
    const messages = await messagesOf(this.sessionId, gone.map((row) => row.run_id), signal);
    for (const row of gone) {
      const run = runOf(row);
      run.whole = false;
      for (const event of eventsOfMessages(row, messages.get(row.run_id))) fold(run, event);
      run.lastSeq = Math.max(run.lastSeq, row.last_seq);
    }
    return cursorOf(gone[gone.length - 1]);
  }

  // ---- what waits for its turn ----

  async keepLooking() {
    while (!this.left) {
      await sleep(LOOK_MS);
      if (this.unattended) this.reading?.abort();
      if (this.left || !this.busy || document.visibilityState !== "visible") continue;
      await this.look().catch(() => {}); // the stream says what is wrong
    }
  }

  async look() {
    const page = await getJson(`/v1/sessions/${this.sessionId}/runs?page_size=${LISTED}`, { signal: this.stopped.signal });
    await this.lookAround(page.runs.reverse());
  }

  // The log of a run begins for the live stream when its turn comes; what is queued, and what was stopped while it
  // was, is read from its own.
  async lookAround(rows) {
    for (const row of rows) {
      const known = this.find(row.run_id);
      const waits = row.status === "queued" && !known?.lastSeq;
      const ended = row.status === "cancelled" && row.attempt === 0 && (known?.lastSeq || 0) < row.last_seq;
      if (!waits && !ended) continue;
      const last = waits ? 1 : row.last_seq;
      for (const event of await firstEvents(row.run_id, last, this.stopped.signal)) this.foldInto(this.runOf(event), event);
    }
  }

  // ---- sending ----

  // Sends input. Throws what the gateway says when it was refused; it is no part of the conversation then.
  async send(input, model) {
    const run = newRun();
    run.input = typeof input === "string" ? [{ role: "user", content: input }] : input;
    run.key = uniqueKey();
    run.body = { input, stream: false, ...(model ? { model } : {}) };
    this.insert(run);
    this.changed(run);
    // One after the other: they are to be accepted in the order in which they were written.
    const before = this.sending;
    this.sending = (async () => {
      await before?.catch(() => {});
      await this.deliver(run);
    })();
    await this.sending;
  }

  // One key for all tries: however often it is sent, it is one message.
  async deliver(run) {
    const began = Date.now();
    let wait = BACKOFF.first;
    let row = null;
    let reached = false; // whether some try may have been accepted without an answer
    run.status = "sending";
    while (!row) {
      try {
        const options = { headers: { "Idempotency-Key": run.key } };
        row = await json("POST", `/v1/sessions/${this.sessionId}/runs`, run.body, options);
      } catch (error) {
        const busy = error.status === 429;
        const refused = error instanceof ApiError && !error.passing;
        if (!refused && !busy) reached = true;
        if (refused || (!reached && Date.now() - began > SEND_MS)) {
          this.remove(run);
          throw error;
        }
        if (Date.now() - began > SEND_MS) {
          run.status = "unsure";
          this.changed(run);
          return;
        }
        if (!this.left) this.disconnected(busy ? "There is much to do now. Trying again…" : undefined);
        await sleep(Math.max(error.retryAfter || 0, wait * (0.5 + Math.random() / 2)));
        wait = Math.min(wait * 2, BACKOFF.most);
      }
    }
    if (!this.left) this.connected();
    if (run.runId && run.runId !== row.run_id) {
      // Somebody else sent the same words at the same time.
      if (!this.find(row.run_id)) {
        const own = newRun(row.run_id, row.ordinal);
        own.input = run.input;
        this.changed(this.insert(own));
      }
      return;
    }
    const known = this.find(row.run_id);
    if (known && known !== run) this.remove(run);
    else if (!run.runId) this.changed(this.named(run, row.run_id, row.ordinal));
  }

  remove(run) {
    this.runs = this.runs.filter((other) => other !== run);
    this.count();
    this.page.removed(run);
  }

  // Cancels all that is not finished, what waits first: it must not begin in between.
  async stop() {
    const open = this.runs.filter((run) => run.runId && !isFinished(run)).reverse();
    for (const run of open) await this.cancel(run);
  }

  async cancel(run) {
    await request("POST", `/v1/runs/${run.runId}/cancel`, { reason: "stopped at the chat page" });
    if (!run.started) await this.look();
  }
}
