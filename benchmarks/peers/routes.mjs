// What the peers on Node share: the routes, around a way to subscribe and a way to publish.

import http from "node:http";
import { text } from "node:stream/consumers";

export function serve(subscribe, publish) {
  const server = http.createServer(async (request, response) => {
    const url = new URL(request.url, "http://localhost");
    if (request.method === "GET") {
      await subscribe(request, response);
      return;
    }
    const data = await text(request);
    if (url.pathname === "/burst") {
      const count = Number(url.searchParams.get("n"));
      for (let number = 0; number < count; number++) publish(`${number}@${data}`);
    } else {
      publish(data);
    }
    response.writeHead(204).end();
  });
  server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
}
