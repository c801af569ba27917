// Usage: node eventsource.mjs URL TOKEN
import { EventSource } from "eventsource";

const [url, token] = process.argv.slice(2);

const source = new EventSource(url, {
  fetch: (input, init) =>
    fetch(input, { ...init, headers: { ...init.headers, Authorization: `Bearer ${token}` } }),
});
source.addEventListener("message", (event) => console.log(event.lastEventId, event.data));
source.addEventListener("end", () => source.close());
source.addEventListener("stream-error", () => source.close());
source.addEventListener("error", (event) => console.error(event.code, event.message));
