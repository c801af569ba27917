import { readEvents } from "./read-events.js";

const $ = (id) => document.getElementById(id);
let controller;

async function count(query) {
  controller = new AbortController();
  const { signal } = controller;
  $("numbers").replaceChildren();
  show("counting");
  try {
    const response = await fetch(`/examples/numbers?${query}`, { signal });
    if (!response.ok) throw new Error(await response.text());
    for await (const { type, data } of readEvents(response.body)) {
      if (type === "message") add(data);
      if (type === "end") return show("finished");
    }
    throw new Error("The stream broke off.");
  } catch (error) {
    if (signal.aborted) show("stopped");
    else show("failed", error.message);
  }
}

function add(number) {
  const item = document.createElement("li");
  item.textContent = number;
  $("numbers").append(item);
}

function show(state, problem = "") {
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = problem;
  $("count").disabled = state === "counting";
  $("stop").disabled = state !== "counting";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  count(new URLSearchParams(new FormData(event.target)));
});
$("stop").addEventListener("click", () => controller.abort());
