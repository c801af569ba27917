import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const url = $("demo").dataset.url;
let stop = () => {};

// A channel of this page's own tells what the server's generator does.
const report = new EventSource(`${url}/report`);
let started = 0;
report.addEventListener("open", () => show("ready"), { once: true });
report.addEventListener("started", () => ($("started").textContent = ++started));
report.addEventListener("ended", (event) => {
  const { tokens, outcome } = JSON.parse(event.data);
  $("report").textContent = outcome === "closed"
    ? `The server closed the generator after ${tokens} tokens.`
    : `The generator ran to its end, after ${tokens} tokens.`;
});

async function askWithFetch() {
  const controller = new AbortController();
  begin(() => controller.abort());
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt: $("prompt").value }),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await response.text());
    for await (const { type, data } of readEvents(response.body)) {
      if (type === "message") $("answer").append(data);
      if (type === "end") return show("finished");
    }
    throw new Error("The stream broke off.");
  } catch (error) {
    show(controller.signal.aborted ? "stopped" : "failed", error.message);
  }
}

function askWithEventSource() {
  const query = new URLSearchParams({ prompt: $("prompt").value });
  const source = new EventSource(`${url}?${query}`);
  let isComplete = false;
  begin(() => {
    source.close();
    show("stopped");
  });
  source.onopen = () => $("answer").replaceChildren();
  source.onmessage = (event) => $("answer").append(event.data);
  source.addEventListener("end", () => {
    isComplete = true;
    show("complete");
  });
  // After the end the browser connects once more; a 204 tells it to stop.
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return;
    show(isComplete ? "finished" : "failed");
  };
}

function begin(stopIt) {
  stop = stopIt;
  $("answer").replaceChildren();
  $("report").textContent = "The generator is at work.";
  show("writing");
}

function show(state, problem = "") {
  const isBusy = state === "writing" || state === "complete";
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = state === "failed" ? problem || "Refused." : "";
  $("fetch").disabled = $("eventsource").disabled = isBusy;
  $("stop").disabled = !isBusy;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askWithFetch();
});
$("eventsource").addEventListener("click", askWithEventSource);
$("stop").addEventListener("click", () => stop());
