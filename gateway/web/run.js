// How one run looks: its input, and an article that is its reply. Everything shown is in run, a fold (see fold.js).

import { request, uniqueKey } from "./api.js";
import { callState, callWords, decisionWords, isFinished, lastResult } from "./fold.js";
import { indent } from "./json.js";
import { element, markdown } from "./markdown.js";

const joined = (pieces) => pieces.map(([, text]) => text).join("");

// What a person typed, to be sent again: a text, or messages where it was more than that.
export function inputOf(run) {
  return run.input.length === 1 && run.input[0].role === "user" ? run.input[0].content : run.input;
}

export class RunView {
  // `page` says {submit(input), write(text), cancel(run), again(run), status(text, bad), stick(draw)}.
  constructor(run, page) {
    this.run = run;
    this.page = page;
    this.keys = new Map(); // of decisions that were sent
    this.decided = new Set(); // calls whose decision was taken, and is not in the log yet
    this.pending = false;
    this.input = element("div", { class: "input" });
    this.reply = element("article", { class: "message assistant", "aria-label": "Assistant" });
    this.note = element("div", { class: "note" });
    this.element = element("section", { class: "run" }, this.input, this.reply, this.note);
    this.draw();
  }

  drawSoon() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.page.stick(() => this.draw());
    });
  }

  draw() {
    const { run } = this;
    this.drawInput();
    this.drawNote();
    const busy = !isFinished(run) && run.status !== "unsure" && !this.behind();
    const parts = this.parts();
    const shown = run.items.some((item) => item.kind === "text" || item.kind === "tool");
    if (busy && !shown) parts.push(element("p", { class: "thinking" }, run.started ? "Thinking…" : "Waiting…"));
    this.reply.replaceChildren(...parts);
    this.reply.hidden = !parts.length;
    this.reply.classList.toggle("streaming", busy);
    this.reply.setAttribute("aria-busy", String(busy));
  }

  // Whether it waits for its turn, behind another one of this conversation.
  behind() {
    return !this.run.started && !isFinished(this.run) && this.run.ahead > 0;
  }

  drawInput() {
    const drawn = JSON.stringify(this.run.input);
    if (drawn === this.drawnInput) return;
    this.drawnInput = drawn;
    this.input.replaceChildren(...this.run.input.map(({ role, content }) =>
      element("article", { class: `message ${role}`, "aria-label": role === "user" ? "You" : role },
        element("div", { class: "body" }, content))));
  }

  // What became of the input itself, where it has no reply.
  drawNote() {
    const { run, page } = this;
    const button = (label, onclick) => element("button", { type: "button", onclick }, label);
    const writable = run.input.length === 1 && run.input[0].role === "user";
    const edit = writable ? button("Edit and send again", () => page.write(run.input[0].content)) : null;
    const notice = (text, ...buttons) => element("p", { class: "notice" }, text, element("br"), ...buttons);
    let note = null;
    if (run.status === "unsure") {
      note = notice("It is not known whether this was sent. Sent again it counts once.",
        button("Send it again", () => page.again(run)));
    } else if (this.behind()) {
      note = run.status === "sending" ? element("p", { class: "waits" }, "Sending…")
        : element("p", { class: "waits" }, "Waits for its turn. ", button("Cancel it", () => page.cancel(run)));
    } else if (run.status === "cancelled" && !run.started) {
      note = notice("Stopped before its turn: it got no reply.", edit);
    } else if (run.status === "failed" && !run.started) {
      note = null; // the reply says why
    }
    const drawn = note ? note.textContent : "";
    if (drawn === this.drawnNote) return;
    this.drawnNote = drawn;
    this.note.replaceChildren(...(note ? [note] : []));
  }

  parts() {
    const open = new Set([...this.reply.querySelectorAll("details[open]")].map((one) => one.dataset.key));
    const parts = [];
    for (const item of this.run.items) {
      const part = this.part(item);
      if (!part) continue;
      if (part.localName === "details") {
        part.dataset.key = `${item.kind}-${item.seq}`;
        part.open = open.has(part.dataset.key);
      }
      parts.push(part);
    }
    if (!this.run.whole) {
      parts.push(element("p", { class: "notice" }, "Older than what is kept of each step: only the messages are left."));
    }
    return parts;
  }

  part(item) {
    switch (item.kind) {
      case "text": {
        const text = joined(item.pieces);
        return text.trim() ? element("div", { class: "text" }, ...markdown(text)) : null;
      }
      case "reasoning":
        return element("details", { class: "details reasoning" }, element("summary", {}, "Reasoning"),
          element("div", { class: "text" }, ...markdown(joined(item.pieces))));
      case "tool": return this.toolPart(item);
      case "memories": {
        const count = item.memories.length;
        return element("details", { class: "details memories" },
          element("summary", {}, `Remembered ${count} ${count === 1 ? "thing" : "things"}`),
          element("ul", {}, ...item.memories.map((memory) => element("li", {}, memory.text))));
      }
      case "action": return this.actionPart(item);
      case "notice": return element("p", { class: "notice" }, item.text);
      case "failed":
        return element("div", { class: "notice bad", role: "alert" }, `This did not work: ${item.message}`,
          element("br"),
          element("button", { type: "button", onclick: () => this.page.submit(inputOf(this.run)) }, "Try again"));
      case "usage": {
        const bits = [`${item.input_tokens} tokens read`, `${item.output_tokens} written`];
        if (item.ttft_ms) bits.push(`first one after ${item.ttft_ms} ms`);
        return element("p", { class: "usage" }, bits.join(" · "));
      }
      default: return null;
    }
  }

  toolPart(call) {
    const { run } = this;
    const result = lastResult(call);
    const made = element("details", { class: `details tool ${callState(run, call)}` },
      element("summary", {}, element("b", {}, call.name), ` ${callWords(run, call)}`));
    made.append(element("pre", { "aria-label": "Arguments" }, indent(call.arguments)));
    if (call.progress.length && !result) made.append(element("pre", { "aria-label": "Progress" }, joined(call.progress)));
    if (result) made.append(element("pre", { "aria-label": "Result" }, indent(result.content ?? "")));
    if (result?.content_ref) {
      const href = `/v1/runs/${run.runId}/tool-calls/${encodeURIComponent(call.callId)}/content`;
      made.append(element("a", { href, download: `${call.name}.txt` }, "The whole result"));
    }
    return made;
  }

  actionPart(item) {
    const said = decisionWords(this.run, item);
    if (said) {
      const content = item.decision?.person && item.decision.content ? element("q", {}, item.decision.content) : null;
      return element("p", { class: "notice decided" }, said, content && " ", content);
    }
    if (this.decided.has(item.callId)) return element("p", { class: "notice" }, `${item.name}: decided.`);
    const unknown = item.asks === "unknown";
    const question = unknown
      ? `It is not known whether ${item.name} ran. It will not be run again by itself. What happened?`
      : `${item.name} is about to run. Shall it?`;
    const choices = unknown
      ? [["It was done", "completed"], ["It was not done", "failed"], ["Run it again", "retry"]]
      : [["Run it", "approve"], ["Do not run it", "deny"]];
    const buttons = [...choices, ["Give up", "abandon", "Given up by a person."]].map(([label, decision, content = ""]) => {
      const button = element("button", { type: "button" }, label);
      button.addEventListener("click", () => this.decide(item, decision, content, button));
      return button;
    });
    return element("div", { class: "notice warn", role: "group", "aria-label": "A decision is needed" },
      question, element("pre", {}, indent(item.arguments || "{}")), ...buttons);
  }

  async decide(item, decision, content, button) {
    button.disabled = true;
    // One key for each word: sent again after an answer that was lost it is the same word.
    const word = `${item.callId} ${decision}`;
    if (!this.keys.has(word)) this.keys.set(word, uniqueKey());
    try {
      await request("POST", `/v1/runs/${this.run.runId}/actions/${encodeURIComponent(item.callId)}`,
        { decision, content }, { headers: { "Idempotency-Key": this.keys.get(word) } });
      // The log says so only when the run has nothing else to do.
      this.decided.add(item.callId);
      this.drawSoon();
      this.page.status("");
    } catch (error) {
      button.disabled = false;
      this.page.status(error.message, true);
    }
  }
}
