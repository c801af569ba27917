/** Yield the events of a fetch response's body (WHATWG HTML, section 9.2.6). Each line is shown
    to onLine first: comments, which are no events, are seen there. */
export async function* readEvents(body, onLine = () => {}) {
  let data = [], type = "", lastEventId = "", retry = null;
  for await (const line of readLines(body)) {
    onLine(line);
    // "field: value", where the colon, one space and the value may be missing.
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (line === "") {
      if (data.length) {
        yield { type: type || "message", data: data.join("\n"), lastEventId, retry };
      }
      data = [];
      type = "";
    } else if (field === "data") {
      data.push(value);
    } else if (field === "event") {
      type = value;
    } else if (field === "id" && !value.includes("\0")) {
      lastEventId = value;
    } else if (field === "retry" && /^[0-9]+$/.test(value)) {
      retry = Number(value);
    } // All else is a comment (no field name, so a heartbeat too), or unknown.
  }
}

/** Yield the lines of a body: they end with CR, LF or CRLF, wherever it was cut into chunks. */
async function* readLines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "", afterCR = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // What has no end yet is no line.
      let text = decoder.decode(value, { stream: true });
      if (!text) continue; // A part of one character.
      if (afterCR && text[0] === "\n") text = text.slice(1);
      afterCR = text.endsWith("\r");
      const lines = (rest + text).split(/\r\n|\r|\n/);
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {}); // Who stops to read ends the request.
  }
}
