// The chat page. No framework and no foreign code: a small client of the gateway's own HTTP API.
//
// fold.js makes of events what is shown, conversation.js reads and follows a session's log, run.js draws, sidebar.js lists
// the conversations. This file has the one that is open, signing in, and what a person does at the page.

import { getJson, json, request, session as signedIn, uniqueKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { element } from "./markdown.js";
import { RunView, inputOf } from "./run.js";
import {
  closeSidebar, drawHeader, drawSessions, endRename, listChanged, loadMore, loadSessions, openSidebar, remember, remove,
  rename, sidebar, startRename, tabs,
} from "./sidebar.js";
import { $, setStatus, state } from "./state.js";

// ---- the conversation --------------------------------------------------------------------------------

const log = $("log");
const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const toBottom = () => { log.scrollTop = log.scrollHeight; };

function stick(draw) {
  const stays = atBottom();
  draw();
  if (stays) toBottom();
}

function showEmpty() {
  log.replaceChildren(element("div", { class: "empty" },
    element("img", { src: "/favicon.svg", alt: "", width: "56", height: "56" }),
    element("p", {}, "What would you like to talk about?")));
}

function drawBusy() {
  const busy = Boolean(state.conversation?.busy);
  $("stop").hidden = !busy;
  document.body.classList.toggle("busy", busy);
}

function leave() {
  state.conversation?.leave();
  state.conversation = null;
  state.views.clear();
  log.removeAttribute("aria-busy");
  drawBusy();
}

// A conversation, and what it tells. Once another one is open it tells nobody.
function newConversation(sessionId) {
  const when = (act) => (...args) => { if (made === state.conversation) act(...args); };
  const made = new Conversation(sessionId, {
    shown: when(drawRuns),
    changed: when(drawRun),
    removed: when((run) => {
      state.views.get(run)?.element.remove();
      state.views.delete(run);
      if (!made.runs.length) showEmpty();
      drawBusy();
    }),
    ended: () => listChanged(),
    gone: when(() => {
      setStatus("This conversation is gone.", true);
      state.sessions = state.sessions.filter((one) => one.session_id !== sessionId);
      drawSessions();
    }),
    lost: when((error) => cannotLoad(sessionId, error)),
    status: when(setStatus),
  });
  return made;
}

// What the runs of a conversation ask of the page.
function handlersOf(conversation) {
  const told = (done) => done.catch((error) => setStatus(error.message, true));
  return {
    submit: (input) => submit(input),
    write,
    again: async (run) => {
      try {
        await conversation.deliver(run);
      } catch (error) {
        notSent(inputOf(run), error);
      }
    },
    cancel: (run) => told(conversation.cancel(run)),
    status: setStatus,
    stick,
  };
}

function viewOf(run) {
  let view = state.views.get(run);
  if (!view) {
    view = new RunView(run, handlersOf(state.conversation));
    state.views.set(run, view);
  }
  return view;
}

function drawRuns() {
  const { conversation } = state;
  log.removeAttribute("aria-busy");
  if (!conversation.runs.length) showEmpty();
  else log.replaceChildren(...olderButton(), ...conversation.runs.map((run) => viewOf(run).element));
  toBottom();
  drawBusy();
}

function drawRun(run) {
  const { conversation } = state;
  drawBusy();
  if (!conversation.shown) return;
  const view = viewOf(run);
  const later = conversation.runs.slice(conversation.runs.indexOf(run) + 1);
  const next = later.map((other) => state.views.get(other)?.element).find((other) => other?.isConnected) || null;
  if (!view.element.isConnected || view.element.nextElementSibling !== next) {
    log.querySelector(".empty")?.remove();
    const sent = run.status === "sending";
    stick(() => log.insertBefore(view.element, next));
    if (sent) toBottom();
  }
  view.drawSoon();
}

function olderButton() {
  if (!state.conversation.hasOlder) return [];
  return [element("div", { class: "older" },
    element("button", { type: "button", class: "quiet", onclick: showOlder }, "Earlier messages"))];
}

async function showOlder(event) {
  const { conversation } = state;
  const button = event.target;
  button.disabled = true;
  try {
    const runs = await conversation.older();
    if (conversation !== state.conversation) return;
    const fromEnd = log.scrollHeight - log.scrollTop;
    const first = runs[0] && viewOf(runs[0]).element;
    log.querySelector(".older")?.remove();
    log.prepend(...olderButton(), ...runs.map((run) => viewOf(run).element));
    // What is read stays where it is.
    log.scrollTop = log.scrollHeight - fromEnd;
    first?.querySelector(".message")?.setAttribute("tabindex", "-1");
    first?.querySelector(".message")?.focus({ preventScroll: true });
  } catch (error) {
    if (conversation !== state.conversation) return;
    button.disabled = false;
    setStatus(`Earlier messages cannot be loaded: ${error.message}`, true);
  }
}

async function openSession(sessionId, { push = true } = {}) {
  leave();
  endRename();
  state.sessionId = sessionId;
  if (push) history.pushState(null, "", sessionId ? `#/s/${sessionId}` : "#/");
  drawSessions();
  drawHeader();
  closeSidebar();
  setStatus("");
  $("input").focus();
  if (!sessionId) {
    showEmpty();
    return;
  }
  log.replaceChildren();
  log.setAttribute("aria-busy", "true");
  const conversation = newConversation(sessionId);
  state.conversation = conversation;
  follow(conversation);
  try {
    const session = await getJson(`/v1/sessions/${sessionId}`);
    if (conversation === state.conversation) remember(session);
  } catch { /* the log says what is wrong */ }
}

async function follow(conversation) {
  try {
    await conversation.open();
  } catch (error) {
    if (conversation.left) return;
    if (error.status === 404) openSession(null);
    else cannotLoad(conversation.sessionId, error);
  }
}

function cannotLoad(sessionId, error) {
  setStatus(`The conversation cannot be loaded: ${error.message}`, true);
  const again = () => openSession(sessionId, { push: false });
  log.replaceChildren(element("div", { class: "empty" },
    element("button", { type: "button", onclick: again }, "Try again")));
}

// Makes the session of a conversation that begins, once however often input is sent meanwhile.
async function begunConversation() {
  if (state.conversation) return state.conversation;
  state.creating ??= (async () => {
    try {
      const made = await json("POST", "/v1/sessions", {}, { headers: { "Idempotency-Key": uniqueKey() } });
      remember(made);
      const conversation = newConversation(made.session_id);
      // Somebody who went elsewhere meanwhile stays there; what was written is sent all the same.
      if (state.sessionId === null && !state.conversation) {
        state.sessionId = made.session_id;
        state.conversation = conversation;
        history.pushState(null, "", `#/s/${made.session_id}`);
        log.replaceChildren();
        conversation.show();
        follow(conversation);
        drawSessions();
        drawHeader();
      }
      return conversation;
    } finally {
      state.creating = null;
    }
  })();
  return state.creating;
}

// Sends input. What is refused is no part of the conversation: a text is the person's again.
async function submit(input) {
  try {
    const conversation = await begunConversation();
    const sent = conversation.send(input, $("model").value);
    if (conversation === state.conversation) setStatus("");
    await sent;
    listChanged();
  } catch (error) {
    notSent(input, error);
  }
}

function notSent(input, error) {
  if (typeof input === "string") write(input);
  setStatus(`It was not sent: ${error.message}`, true);
}

async function stop() {
  setStatus("Stopping…");
  try {
    await state.conversation?.stop();
    setStatus("");
  } catch (error) {
    setStatus(`It could not be stopped: ${error.message}`, true);
  }
}

// ---- signing in ---------------------------------------------------------------------------------------

function showSignIn(message = "") {
  leave();
  $("chat").hidden = true;
  $("signin").hidden = false;
  $("signin-error").textContent = message;
  $("api-key").focus();
}

async function signIn(key) {
  // The header is for what stands before several meshes: it reads the key's tag there, as in any other request.
  const headers = /^[\x21-\x7e]+$/.test(key.trim()) ? { Authorization: `Bearer ${key.trim()}` } : {};
  await request("POST", "/auth/login", { api_key: key.trim() }, { headers });
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
sidebar.open = openSession;
signedIn.ended = () => showSignIn("The sign-in has ended.");

function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// Puts a text into the box, after what is there.
function write(text) {
  input.value = input.value.trim() ? `${input.value}\n\n${text}` : text;
  fit();
  input.focus();
}

function send() {
  const text = input.value;
  if (!text.trim()) return;
  input.value = "";
  fit();
  input.focus();
  submit(text);
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
    else if (state.conversation?.busy && !$("delete-dialog").open) stop();
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
const refresh = () => { if (!$("chat").hidden && document.visibilityState === "visible") loadSessions().catch(() => {}); };
tabs.addEventListener("message", refresh);
document.addEventListener("visibilitychange", refresh);
window.addEventListener("focus", refresh);
// What has not reached the gateway yet is nowhere else.
window.addEventListener("beforeunload", (event) => {
  if (state.conversation?.runs.some((run) => run.status === "sending" || run.status === "unsure")) event.preventDefault();
});
window.addEventListener("online", () => setStatus(""));
window.addEventListener("offline", () => setStatus("This device is offline.", true));

begin();
