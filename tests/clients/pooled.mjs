// POSTs with a pool of connections of Node's own, several at once, and prints the answers as JSON.
// Usage: node pooled.mjs URL AT_ONCE; the paths and bodies come as JSON on stdin.
import http from "node:http";
import { text } from "node:stream/consumers";

const [url, atOnce] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true, maxSockets: Number(atOnce) });

const ask = (path, body) => new Promise((resolve, reject) => {
  const answered = async (answer) => `${answer.statusCode} ${await text(answer)}`;
  const asked = http.request(url + path, { method: "POST", agent }, (answer) => {
    answered(answer).then(resolve, reject);
  });
  asked.on("error", reject);
  asked.end(body);
});

const asked = JSON.parse(await text(process.stdin));
const left = asked.entries();
const answers = [];
const work = async () => {
  for (const [number, [path, body]] of left) {
    answers[number] = await ask(path, body).catch(String);
  }
};
await Promise.all(Array.from({ length: Number(atOnce) }, work));
agent.destroy();
console.log(JSON.stringify(answers));
