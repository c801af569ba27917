import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 100;
const encoder = new TextEncoder();
let stop, cut;
let cursor, retry, offset, block, latencies;

/** Read a stream to its end or until Stop, over as many connections as it takes. */
async function inspect(url) {
  stop = new AbortController();
  const { signal } = stop;
  forget();
  try {
    await compareClocks();
  } catch (error) {
    return show("failed", error.message);
  }
  while (!signal.aborted && !(await read(url, signal))) {
    if (signal.aborted) return;
    show("connecting");
    await new Promise((resolve) => setTimeout(resolve, retry));
    add("reconnects");
  }
}

/** Read one response; tell whether the stream has ended for good. */
async function read(url, signal) {
  cut = new AbortController();
  show("connecting");
  block = [];
  try {
    const response = await fetch(url, {
      headers: cursor ? { "Last-Event-ID": cursor } : {},
      signal: AbortSignal.any([signal, cut.signal]),
    });
    if (!response.ok) return end("failed", await response.text());
    if (response.status === 204) return end("finished");
    show("open");
    for await (const event of readEvents(response.body, takeLine)) {
      takeEvent(event);
      if (event.type === "end") return end("finished");
    }
  } catch {
    // It was cut, or broke: there will be another one.
  }
  return false;
}

function end(state, problem) {
  show(state, problem);
  return true;
}

function takeLine(line) {
  if (!line.startsWith(":")) return block.push(line);
  add("comments");
  addRow({ type: "comment", data: line.slice(1).trim() }, `${line}\n`);
}

function takeEvent(event) {
  const wire = `${block.join("\n")}\n`;
  block = [];
  add("events");
  cursor = event.lastEventId || cursor;
  $("cursor").textContent = cursor ?? "–";
  retry = event.retry ?? retry;
  if (event.retry !== null) $("retry").textContent = `${retry} ms`;
  addRow({ ...event, lastEventId: /^id/m.test(wire) ? event.lastEventId : "" }, wire);
}

function addRow({ type, data, lastEventId = "" }, wire) {
  const bytes = encoder.encode(wire);
  add("bytes", bytes.length);
  const latency = latencyOf(data);
  const row = document.createElement("tr");
  row.className = type === "comment" ? "comment" : "";
  for (const text of [type, lastEventId, bytes.length, latency, data.slice(0, 120)]) {
    row.insertCell().textContent = text;
  }
  const button = document.createElement("button");
  button.textContent = new Date().toISOString().slice(11, 23);
  button.addEventListener("click", () => {
    $("follow").checked = false;
    showBytes(bytes);
  });
  row.insertCell(0).append(button);
  $("rows").prepend(row);
  if ($("rows").children.length > SHOWN) $("rows").lastChild.remove();
  if ($("follow").checked) showBytes(bytes);
}

/** Ask for the server's time. It was that in the middle of the request, give or take the half:
    the fastest of some requests tells most. */
async function compareClocks() {
  let least = Infinity;
  for (let tries = 0; tries < 5; tries++) {
    const asked = now();
    const response = await fetch("/inspector/now", { cache: "no-store" });
    const half = (now() - asked) / 2;
    const difference = (await response.json()).now - (asked + half);
    if (half < least) [least, offset] = [half, difference];
  }
  $("offset").textContent = `${offset.toFixed(1)} ± ${least.toFixed(1)} ms`;
}

function latencyOf(data) {
  const sent = /"(?:sent|milliseconds)": ?([0-9]+)/.exec(data.slice(0, 1000))?.[1];
  if (!sent) return "";
  const latency = now() + offset - Number(sent);
  latencies.push(latency);
  if (latencies.length > SHOWN) latencies.shift();
  const sorted = latencies.toSorted((one, other) => one - other);
  $("median").textContent = `${sorted[sorted.length >> 1].toFixed(1)} ms`;
  return `${latency.toFixed(1)} ms`;
}

/** Show bytes as hexadecimal numbers, and beside them as ASCII. */
function showBytes(bytes) {
  const lines = [];
  for (let at = 0; at < Math.min(bytes.length, 1024); at += 16) {
    const part = Array.from(bytes.subarray(at, at + 16));
    const hex = part.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const text = part.map((byte) => (byte > 31 && byte < 127 ? String.fromCharCode(byte) : "."));
    lines.push(`${at.toString(16).padStart(4, "0")}  ${hex.padEnd(47)}  ${text.join("")}`);
  }
  if (bytes.length > 1024) lines.push(`and ${bytes.length - 1024} bytes more`);
  $("raw").textContent = lines.join("\n");
}

function now() {
  return performance.timeOrigin + performance.now();
}

function forget() {
  [cursor, retry, latencies] = [undefined, 3000, []];
  for (const name of ["rows", "raw"]) $(name).replaceChildren();
  for (const name of ["events", "comments", "bytes", "reconnects"]) $(name).textContent = 0;
  for (const name of ["cursor", "retry", "median", "offset"]) $(name).textContent = "–";
}

function add(name, number = 1) {
  $(name).textContent = Number($(name).textContent) + number;
}

function show(state, problem = "") {
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = problem;
  $("connect").disabled = false;
  $("cut").disabled = state !== "open";
  $("stop").disabled = state !== "open" && state !== "connecting";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  stop?.abort();
  inspect($("stream").value);
});
$("cut").addEventListener("click", () => cut.abort());
$("stop").addEventListener("click", () => {
  stop.abort();
  show("stopped");
});
show("ready");
inspect($("stream").value);
