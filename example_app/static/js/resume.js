import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const { url } = $("demo").dataset;
const ENDS = {
  end: "complete",
  cancelled: "cancelled",
  lost: "lost",
  "stream-error": "failed",
};
const WORDS = {
  idle: "Nothing has been asked here, or its answer has expired.",
  connecting: "This tab has no connection. It tries again and again.",
  writing: "The server writes, with or without this tab.",
  complete: "The answer is complete.",
  cancelled: "The answer was stopped, in this tab or in another one.",
  lost: "The rest is lost: the server that wrote this is gone, or keeps it no more.",
  failed: "This has failed.",
};
let connection, wake = () => {};
let run = "", cursor = "", retry = 1000;

function ask() {
  cursor = "";
  enter("");
  follow({
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt: $("prompt").value }),
  });
}

/** Read an answer to its end, over as many connections as it takes. */
async function follow(request) {
  show("connecting");
  let state = await read(request);
  while (!state) {
    show("connecting");
    await pause();
    add("reconnects");
    state = await read({ headers: { "Last-Event-ID": cursor } });
  }
  show(state);
}

/** Read one response; return the state it has ended in, "" if it broke off. */
async function read(request) {
  connection = new AbortController();
  try {
    const response = await fetch(url, { ...request, signal: connection.signal });
    if (response.status !== 200) return await refused(response, request);
    const id = response.headers.get("X-Run-Id");
    if (!id) return ""; // The server cannot reach its broker.
    enter(id);
    $("reader").textContent = response.headers.get("X-Process");
    show("writing");
    for await (const event of readEvents(response.body)) {
      take(event);
      if (event.type in ENDS) return ENDS[event.type];
    }
  } catch (error) {
    // If it has begun, asking again joins it and does not begin another one.
    if (!run && request.method) return failed(error.message);
  }
  return "";
}

async function refused(response, request) {
  if (request.method) return failed(await response.text());
  const isGone = response.status === 204 || response.status === 404;
  if (isGone && !cursor) return run ? "lost" : "idle";
  if (isGone) cursor = ""; // There may be another run by now.
  return ""; // As is a server that restarts, it is asked again.
}

function take({ type, data, lastEventId, retry: milliseconds }) {
  cursor = lastEventId || cursor;
  retry = milliseconds ?? retry;
  $("cursor").textContent = cursor;
  add("events");
  if (type === "message") $("answer").append(data);
  if (type === "started") {
    const { prompt, process } = JSON.parse(data);
    $("prompt").value = prompt;
    $("writer").textContent = process;
  }
  if (type === "reset") {
    $("answer").replaceChildren();
    $("problem").textContent = "The beginning of this answer is kept no more.";
  }
}

/** Clear the page, unless what comes continues what it shows. */
function enter(id) {
  if (cursor && run === id) return;
  run = id;
  cursor = "";
  for (const name of ["answer", "problem"]) $(name).replaceChildren();
  for (const name of ["cursor", "writer", "reader"]) $(name).textContent = "–";
  for (const name of ["events", "reconnects"]) $(name).textContent = 0;
}

async function stop() {
  try {
    const query = new URLSearchParams({ run });
    const response = await fetch(`${url}?${query}`, { method: "DELETE" });
    $("problem").textContent = response.ok ? "" : await response.text();
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

function reconnect() {
  connection.abort();
  wake();
}

function pause() {
  return new Promise((resolve) => {
    wake = resolve;
    setTimeout(resolve, retry);
  });
}

function failed(problem) {
  $("problem").textContent = problem;
  return "failed";
}

function add(name) {
  $(name).textContent = Number($(name).textContent) + 1;
}

function show(state) {
  $("state").textContent = $("state").dataset.state = state;
  $("words").textContent = WORDS[state];
  const isBusy = state === "connecting" || state === "writing";
  $("ask").textContent = state === "lost" ? "Ask again" : "Ask";
  $("ask").disabled = isBusy;
  $("stop").disabled = !isBusy || !run;
  $("kill").disabled = state !== "writing";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("kill").addEventListener("click", () => connection.abort());
$("stop").addEventListener("click", stop);
// A connection may be dead, and nobody says so.
addEventListener("offline", reconnect);
addEventListener("online", reconnect);
// A reload finds the same conversation.
history.replaceState(null, "", $("here").href);
follow({});
