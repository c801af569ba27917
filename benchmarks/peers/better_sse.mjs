// better-sse: a session for each subscriber, registered with one channel.

import { createChannel, createSession } from "better-sse";

import { serve } from "./routes.mjs";

const channel = createChannel();

async function subscribe(request, response) {
  channel.register(await createSession(request, response));
}

serve(subscribe, (data) => channel.broadcast(data));
