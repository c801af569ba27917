import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 500;
const RETRY = 1000;
let connection, isScrolling = false;
let cursor = "", first = 0, last = 0;

/** Read the log until Pause, over as many connections as it takes. */
async function follow() {
  connection = new AbortController();
  const { signal } = connection;
  while (!signal.aborted) {
    show("connecting");
    try {
      await read(signal);
    } catch (error) {
      if (!signal.aborted) $("problem").textContent = error.message;
    }
    if (!signal.aborted) await wait(RETRY);
  }
}

async function read(signal) {
  const headers = cursor ? { "Last-Event-ID": cursor } : {};
  const response = await fetch("/log/lines", { headers, signal });
  if (!response.ok) throw new Error(await response.text());
  show("open");
  for await (const event of readEvents(response.body)) {
    if (signal.aborted) return; // What is left will come again.
    take(event);
    if ($("slow").checked) await wait(300);
  }
}

function take({ type, data, lastEventId }) {
  if (type === "reset") return startAnew();
  cursor = lastEventId;
  check(Number.parseInt(data));
  add("count");
  $("cursor").textContent = cursor;
  const behind = Date.now() - Date.parse(data.split(" ")[1]);
  $("behind").textContent = `${(Math.max(0, behind) / 1000).toFixed(1)} s`;
  write(data, / (\w+) [A-Z]+ \//.exec(data)?.[1]);
}

/** The lines are numbered: whatever is wrong shows. */
function check(number) {
  first ||= number;
  if (last && number > last + 1) add("lost", number - last - 1);
  if (number <= last) add("twice");
  last = Math.max(last, number);
  $("range").textContent = `${first} to ${last}`;
}

function startAnew() {
  first = last = 0;
  write("The file has been replaced meanwhile. The new one follows.", "reset");
}

function write(text, kind) {
  scrollSoon();
  const row = document.createElement("li");
  row.className = kind;
  row.textContent = text;
  row.hidden = !isShown(row);
  $("lines").append(row);
  if ($("lines").children.length > SHOWN) $("lines").firstChild.remove();
}

/** Stay at the end, unless somebody has scrolled up. To look costs a layout: once a frame. */
function scrollSoon() {
  if (isScrolling) return;
  isScrolling = true;
  const { scrollHeight, scrollTop, clientHeight } = $("lines");
  const isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
  requestAnimationFrame(() => {
    isScrolling = false;
    if (isAtEnd) $("lines").scrollTop = $("lines").scrollHeight;
  });
}

function isShown(row) {
  return row.textContent.toLowerCase().includes($("filter").value.toLowerCase());
}

function pauseOrResume() {
  if (connection.signal.aborted) return follow();
  connection.abort();
  show("paused");
}

async function burst() {
  const response = await fetch("/log/burst", { method: "POST" });
  if (!response.ok) $("problem").textContent = await response.text();
}

function wait(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function add(name, number = 1) {
  $(name).textContent = Number($(name).textContent) + number;
}

function show(state) {
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = "";
  $("pause").textContent = state === "paused" ? "Resume" : "Pause";
  $("pause").disabled = false;
}

$("filter").addEventListener("input", () => {
  for (const row of $("lines").children) row.hidden = !isShown(row);
  $("lines").scrollTop = $("lines").scrollHeight;
});
$("pause").addEventListener("click", pauseOrResume);
$("burst").addEventListener("click", burst);
follow();
