import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
const url = location.origin + $("demo").dataset.url;
const FATES = { finished: "ran to its end", closed: "was closed", failed: "failed" };
const IN_ONE_PIECE = "print(answer.choices[0].message.content)";
const IN_CHUNKS = `for chunk in answer:
    print(chunk.choices[0].delta.content or "", end="", flush=True)`;
let controller, report;

function question() {
  return {
    model: $("model").value,
    messages: [{ role: "user", content: $("prompt").value }],
    stream: $("stream").checked,
  };
}

async function ask() {
  const asked = question();
  controller = new AbortController();
  const { signal } = controller;
  $("answer").replaceChildren();
  $("report").textContent = "The model is at work.";
  show("writing");
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal,
    });
    await write(response);
    show("finished");
  } catch (error) {
    if (!signal.aborted) return show("failed", error.message);
    show("stopped");
    if (!asked.stream) $("report").textContent = "It goes on, and answers nobody.";
  }
}

async function write(response) {
  const type = response.headers.get("Content-Type");
  if (type.startsWith("text/event-stream")) return writeChunks(response.body);
  const { id, choices, error } = await response.json();
  if (error) {
    $("report").textContent = `It has answered with ${response.status}.`;
    throw new Error(error.message);
  }
  $("answer").append(choices[0].message.content);
  watch(id);
}

async function writeChunks(body) {
  let isFirst = true;
  for await (const { data } of readEvents(body)) {
    if (data === "[DONE]") return;
    const { id, choices, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    if (isFirst) watch(id);
    isFirst = false;
    $("answer").append(choices[0].delta.content ?? "");
  }
  throw new Error("The stream broke off.");
}

/** Show what becomes of the generator, which clients of OpenAI's are not told. */
function watch(id) {
  report?.close();
  report = new EventSource(`${url}/${id}/report`);
  report.addEventListener("ended", (event) => {
    report.close();
    const { tokens, outcome } = JSON.parse(event.data);
    $("report").textContent = `The generator ${FATES[outcome]}, after ${tokens} tokens.`;
  });
}

function showCommands() {
  const { model, messages, stream } = question();
  const json = JSON.stringify(question(), null, 2);
  $("curl").textContent = `curl --no-buffer ${url} \\
  -H 'Content-Type: application/json' \\
  -d '${json.replaceAll("'", "'\\''")}'`;
  // What is text in JSON is text in Python.
  const prompt = JSON.stringify(messages[0].content);
  $("python").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="any")
answer = client.chat.completions.create(
    model="${model}",
    messages=[{"role": "user", "content": ${prompt}}],
    stream=${stream ? "True" : "False"},
)
${stream ? IN_CHUNKS : IN_ONE_PIECE}`;
}

async function copy({ target }) {
  await navigator.clipboard.writeText($(target.dataset.of).textContent);
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = "Copy"), 1500);
}

function show(state, problem = "") {
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = problem;
  $("ask").disabled = state === "writing";
  $("stop").disabled = state !== "writing";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("form").addEventListener("input", showCommands);
$("stop").addEventListener("click", () => controller.abort());
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard; // There is none on plain HTTP.
  button.addEventListener("click", copy);
}
showCommands();
show("ready");
