// The list of conversations, and what is done to one of them as a whole.

import { getJson, json, request } from "./api.js";
import { element } from "./markdown.js";
import { $, setStatus, state } from "./state.js";

// Opens a conversation; the page says how.
export const sidebar = { open: () => {} };

// Other tabs of this browser hear at once when the list has changed.
export const tabs = new BroadcastChannel("hermesh");

const titleOf = (session) => session?.title || "New conversation";

export function remember(session) {
  const at = state.sessions.findIndex((other) => other.session_id === session.session_id);
  if (at >= 0) state.sessions[at] = session;
  else state.sessions.unshift(session);
  drawSessions();
  drawHeader();
}

export function listChanged() {
  tabs.postMessage("list");
  loadSessions().catch(() => {});
}

export async function loadSessions() {
  const page = await getJson("/v1/sessions?page_size=50");
  const fresh = new Set(page.sessions.map((session) => session.session_id));
  const older = state.pages > 1 ? state.sessions.filter((session) => !fresh.has(session.session_id)) : [];
  state.sessions = [...page.sessions, ...older];
  if (state.pages === 1) state.nextPage = page.next_page_token;
  drawSessions();
  drawHeader();
}

export async function loadMore() {
  const page = await getJson(`/v1/sessions?page_size=50&page_token=${encodeURIComponent(state.nextPage)}`);
  const known = new Set(state.sessions.map((session) => session.session_id));
  state.sessions.push(...page.sessions.filter((session) => !known.has(session.session_id)));
  state.nextPage = page.next_page_token;
  state.pages += 1;
  drawSessions();
}

export function drawSessions() {
  $("sessions").replaceChildren(...state.sessions.map((session) => element("li", {}, element("a", {
    href: `#/s/${session.session_id}`,
    class: session.active_run_id ? "running" : "",
    "aria-current": session.session_id === state.sessionId ? "page" : undefined,
    title: titleOf(session),
  }, titleOf(session)))));
  $("more-sessions").hidden = !state.nextPage;
}

export function drawHeader() {
  const session = state.sessions.find((one) => one.session_id === state.sessionId);
  $("title").textContent = titleOf(session);
  document.title = session ? `${titleOf(session)} – Hermesh` : "Hermesh";
  $("rename-button").hidden = $("delete-button").hidden = !state.sessionId;
}

export function startRename() {
  const { sessionId } = state;
  $("rename").value = state.sessions.find((one) => one.session_id === sessionId)?.title || "";
  // It is that one which is renamed, whatever is open by the time the title is there.
  $("rename-form").dataset.sessionId = sessionId;
  $("rename-form").hidden = false;
  $("title").hidden = true;
  $("rename").select();
}

export function endRename() {
  $("rename-form").hidden = true;
  $("title").hidden = false;
}

export async function rename(event) {
  event.preventDefault();
  const { sessionId } = event.target.dataset;
  try {
    remember(await json("PATCH", `/v1/sessions/${sessionId}`, { title: $("rename").value.trim() }));
    tabs.postMessage("list");
    if (sessionId !== state.sessionId) return;
    endRename();
    $("input").focus();
  } catch (error) {
    setStatus(`It could not be renamed: ${error.message}`, true);
  }
}

export async function remove() {
  const { sessionId } = state;
  const dialog = $("delete-dialog");
  const answer = await new Promise((done) => {
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
    dialog.showModal();
  });
  if (answer !== "yes") return;
  try {
    await request("DELETE", `/v1/sessions/${sessionId}`);
    tabs.postMessage("list");
    state.sessions = state.sessions.filter((one) => one.session_id !== sessionId);
    if (sessionId === state.sessionId) await sidebar.open(null);
    else drawSessions();
  } catch (error) {
    setStatus(`It could not be deleted: ${error.message}`, true);
  }
}

export function openSidebar() {
  $("sidebar").classList.add("open");
  $("shade").hidden = false;
  $("open-sidebar").setAttribute("aria-expanded", "true");
  $("close-sidebar").focus();
}

export function closeSidebar() {
  $("sidebar").classList.remove("open");
  $("shade").hidden = true;
  $("open-sidebar").setAttribute("aria-expanded", "false");
}
