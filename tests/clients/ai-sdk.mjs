// Usage: node ai-sdk.mjs URL TEXT
import { DefaultChatTransport, readUIMessageStream } from "ai";

const [url, text] = process.argv.slice(2);

// [transport]
const transport = new DefaultChatTransport({
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

const messages = [{ id: "1", role: "user", parts: [{ type: "text", text }] }];
const chatId = text;
console.log(JSON.stringify({
  sent: await read(await transport.sendMessages({ chatId, messages })),
  resumed: await read(await transport.reconnectToStream({ chatId })),
  none: await transport.reconnectToStream({ chatId: "none" }),
}));
