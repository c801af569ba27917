// Asks a chat API all that can become of a question, with the official client from npm, and prints
// what that client tells its user as one line of JSON.
// Usage: node openai.mjs URL URL_OF_A_SLOW_ONE PROMPT
import OpenAI from "openai";

const [url, slowUrl, prompt] = process.argv.slice(2);
const messages = [{ role: "user", content: prompt }];

const ask = (options, baseURL = url) =>
  new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 }).chat.completions.create({
    model: "local", messages, ...options,
  });

async function readStream() {
  const stream = await ask({ stream: true, stream_options: { include_usage: true } });
  const told = { text: "", reasons: [], usage: null };
  for await (const { choices, usage } of stream) {
    for (const { delta, finish_reason } of choices) {
      told.text += delta.content ?? "";
      if (finish_reason) told.reasons.push(finish_reason);
    }
    told.usage = usage;
  }
  return told;
}

async function readInOnePiece() {
  const { choices, usage } = await ask({});
  return { text: choices[0].message.content, reasons: [choices[0].finish_reason], usage };
}

async function readUntilAnError(options) {
  let text = "";
  try {
    for await (const { choices } of await ask({ stream: true, ...options })) {
      text += choices[0].delta.content ?? "";
    }
  } catch (error) {
    const { status = null, code, message } = error;
    return { text, class: error.constructor.name, status, code, message };
  }
}

async function cancel() {
  const stream = await ask({ stream: true }, slowUrl);
  let text = "";
  for await (const { id, choices } of stream) {
    text += choices[0].delta.content ?? "";
    if (text.includes(" ")) return { id, text }; // Which aborts the request.
  }
}

const answers = {
  stream: readStream(),
  "in one piece": readInOnePiece(),
  "unknown model": readUntilAnError({ model: "unknown" }),
  "bad request": readUntilAnError({ messages: [] }),
  "error in the middle": readUntilAnError({ model: "local-broken" }),
  cancelled: cancel(),
};
for (const name in answers) answers[name] = await answers[name];
console.log(JSON.stringify(answers));
