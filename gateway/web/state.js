// What the page knows, and its line for what is to be said.

export const $ = (id) => document.getElementById(id);

export const state = {
  sessions: [],
  nextPage: "",
  pages: 1, // how many pages of the list were loaded
  sessionId: null,
  conversation: null, // of sessionId, once that is open
  views: new Map(), // of the runs that are shown, by run
  creating: null, // the session that is being made
};

export function setStatus(text, bad = false) {
  const status = $("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("bad", bad);
}
