// Reads a stream with a client from npm and prints what that client tells its user, a line each.
// Usage: node read.mjs eventsource|fetch-event-source|fetch-event-source-post URL SECONDS
import { createRequire } from "node:module";

const [client, url, seconds] = process.argv.slice(2);
const print = (what, event = {}) => {
  const { data = null, lastEventId, id, type } = event;
  console.log(JSON.stringify({ what, data, id: lastEventId ?? id ?? null, type: type ?? null }));
};

const TYPES = ["end", "reset", "stream-error", "cancelled", "lost"];

async function readWithEventSource() {
  const { EventSource } = await import("eventsource");
  const source = new EventSource(url);
  source.onopen = () => print("open");
  source.onmessage = (event) => print("message", event);
  source.onerror = (event) => print(source.readyState === EventSource.CLOSED ? "closed" : "error");
  for (const type of TYPES) source.addEventListener(type, (event) => print(type, event));
}

async function readWithFetchEventSource(options) {
  const { fetchEventSource } = createRequire(import.meta.url)("@microsoft/fetch-event-source");
  // It was written for pages, and looks whether the page is visible.
  globalThis.window = globalThis;
  globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
  await fetchEventSource(url, {
    async onopen(response) { print(response.status === 204 ? "closed" : "open"); },
    onmessage(event) { print(event.event || "message", event); },
    onclose() { print("end of body"); },
    onerror(error) { throw error; },
    ...options,
  });
}

async function postWithFetchEventSource() {
  const leaving = new AbortController();
  await readWithFetchEventSource({
    method: "POST",
    signal: leaving.signal,
    async onopen(response) {
      print(response.status === 204 ? "closed" : "open");
      // It knows no status that ends it, and would ask again and again.
      if (response.status === 204) leaving.abort();
    },
    onerror() { print("error"); },
  });
  print("done");
}

const clients = {
  "eventsource": readWithEventSource,
  "fetch-event-source": readWithFetchEventSource,
  "fetch-event-source-post": postWithFetchEventSource,
};
setTimeout(() => process.exit(0), Number(seconds) * 1000);
await clients[client]();
