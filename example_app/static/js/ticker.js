import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const REST = $("demo").dataset.rest * 1000, READING = REST / 2, LOOK = 250; // milliseconds
const CHANGE = new Intl.NumberFormat("en", {
  style: "percent",
  signDisplay: "exceptZero",
  minimumFractionDigits: 1,
});
const quotes = new Map(); // What each row shows.
const source = new EventSource("/ticker/prices");
let count = 0;
let slow; // The slow reader, if there is one.

source.addEventListener("snapshot", (event) => {
  for (const { symbol, trade, past } of JSON.parse(event.data)) {
    const first = quotes.get(symbol)?.first ?? past.at(-1);
    quotes.set(symbol, { trade, past, first });
    draw(symbol);
  }
});

source.onmessage = (event) => {
  const { symbol, trade, price } = JSON.parse(event.data);
  const quote = quotes.get(symbol);
  $("count").textContent = ++count;
  if (trade <= quote.trade) return; // The snapshot had it already.
  quote.trade = trade;
  quote.past = [...quote.past.slice(1), price];
  draw(symbol);
};

source.onopen = source.onerror = () => {
  const state = ["connecting", "open", "closed"][source.readyState];
  show("state", state);
};

function draw(symbol) {
  const { past, first } = quotes.get(symbol);
  const [before, now] = past.slice(-2);
  const row = $(symbol);
  row.dataset.trend = now < before ? "down" : "up";
  fill(row, "price", `${now < before ? "▼" : "▲"} ${now.toFixed(2)}`);
  fill(row, "change", CHANGE.format(now / first - 1));
  const low = Math.min(...past), height = Math.max(...past) - low || 1;
  const points = past.map((price, x) => `${x},${19 - (18 * (price - low)) / height}`);
  row.querySelector("polyline").setAttribute("points", points.join(" "));
}

/** Read in rounds: for a while, then not at all, and then until nothing is stale any more. */
async function readSlowly() {
  const reader = (slow = { controller: new AbortController(), published: 0, received: 0 });
  try {
    while (reader === slow) await readOneRound(reader);
  } catch (error) {
    if (reader !== slow) return;
    $("problem").textContent = error.message;
    $("slow").click();
  }
}

/** Each round has a connection of its own: one that was quick is given more and more room. */
async function readOneRound(reader) {
  begin(reader, "connecting");
  const response = await fetch("/ticker/heavy", { signal: reader.controller.signal });
  if (!response.ok) throw new Error(await response.text());
  begin(reader, "reading");
  for await (const { data } of readEvents(response.body)) {
    take(reader, JSON.parse(data));
    if (!reader.hasRested && performance.now() > reader.since + READING) await rest(reader);
    if (reader.isOver) return;
  }
  throw new Error("The stream broke off.");
}

function begin(reader, state) {
  const since = performance.now();
  Object.assign(reader, { since, seen: new Map(), expected: trades(), before: null });
  reader.hasRested = reader.isOver = false;
  if (reader === slow) show("slow-state", state);
}

/** Count what came, and what was published: the trades of a symbol are numbered without a gap. */
function take(reader, { symbol, trade, price }) {
  const before = reader.seen.get(symbol)?.trade ?? trade - 1;
  if (trade <= before) return; // Two machines have fed the same.
  reader.seen.set(symbol, { trade, price });
  reader.published += trade - before;
  reader.received += 1;
}

async function rest(reader) {
  const { published, received } = reader;
  reader.hasRested = true;
  show("slow-state", "not reading");
  await new Promise((resolve) => setTimeout(resolve, REST));
  reader.before = { published, received };
  reader.since = performance.now();
  if (reader === slow) show("slow-state", "reading");
}

/** Compare what the slow reader has with what the rows have shown at the last look. */
function look() {
  if (!slow) return;
  let stale = 0;
  for (const [symbol, { trade, price }] of slow.seen) {
    const behind = Math.max(0, slow.expected.get(symbol) - trade);
    const words = behind ? `${behind} behind` : price.toFixed(2);
    fill($(symbol), "slow", words).classList.toggle("stale", behind);
    if (behind) stale += 1;
  }
  for (const name of ["published", "received"]) $(name).textContent = slow[name];
  $("replaced").textContent = slow.published - slow.received;
  $("stale").textContent = stale;
  if (!stale && slow.before && !slow.isOver) report(slow);
  slow.expected = trades();
}

function report(reader) {
  const seconds = ((performance.now() - reader.since) / 1000).toFixed(1);
  const published = reader.published - reader.before.published;
  const received = reader.received - reader.before.received;
  $("report").textContent = [
    `Of ${published} events since it stopped to read, ${received} came`,
    `and ${published - received} were replaced by newer ones.`,
    `${seconds} s after its rest no price was stale.`,
  ].join(" ");
  reader.isOver = true;
}

function trades() {
  return new Map([...quotes].map(([symbol, { trade }]) => [symbol, trade]));
}

function fill(row, name, text) {
  const cell = row.querySelector(`.${name}`);
  cell.textContent = text;
  return cell;
}

function show(id, state) {
  $(id).textContent = $(id).dataset.state = state;
}

$("slow").addEventListener("change", ({ target }) => {
  slow?.controller.abort();
  slow = null;
  $("demo").classList.toggle("with-slow", target.checked);
  $("slow-reader").hidden = !target.checked;
  $("problem").textContent = "";
  if (target.checked) readSlowly();
});
$("slow").disabled = false;
setInterval(look, LOOK);
