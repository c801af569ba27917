// Usage: node ai-sdk.mjs URL TEXT URL_OF_A_STREAM_THAT_ONLY_STOPS
import { DefaultChatTransport, readUIMessageStream } from "ai";

const [url, text, cutOff] = process.argv.slice(2);

// [transport]
const transport = new DefaultChatTransport({
  headers: { Authorization: "Bearer secret" },
  prepareSendMessagesRequest: ({ id, messages }) => ({
    api: `${url}/stream/chat/${id}`,
    body: { messages },
  }),
  prepareReconnectToStreamRequest: ({ id }) => ({ api: `${url}/stream/chat/${id}` }),
});
// [end]

async function read(stream) {
  let message = null;
  const errors = [];
  const onError = (error) => errors.push(error.message);
  for await (message of readUIMessageStream({ stream, onError }));
  return { message, errors };
}

const parts = text ? [{ type: "text", text }] : [];
const messages = [{ id: "1", role: "user", parts }];
const chatId = text || "nothing";
console.log(JSON.stringify({
  sent: await read(await transport.sendMessages({ chatId, messages })),
  resumed: await read(await transport.reconnectToStream({ chatId })),
  none: await transport.reconnectToStream({ chatId: "none" }),
  cutOff: await read(await new DefaultChatTransport({ api: cutOff }).sendMessages({ chatId, messages })),
}));
