// Node's bare http module.

import { serve } from "./routes.mjs";

const HEADERS = {
  "Content-Type": "text/event-stream; charset=utf-8",
  "Cache-Control": "no-cache, no-transform",
  "X-Accel-Buffering": "no",
};

const subscribers = new Set();
let sequence = 0;

function subscribe(request, response) {
  response.writeHead(200, HEADERS);
  response.write(":\nretry: 3000\n");
  subscribers.add(response);
  response.on("close", () => subscribers.delete(response));
}

function publish(data) {
  sequence += 1;
  const event = `id: ${sequence}\ndata: ${data}\n\n`;
  for (const response of subscribers) response.write(event);
}

serve(subscribe, publish);
