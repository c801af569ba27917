const $ = (id) => document.getElementById(id);
const source = new EventSource("/progress/jobs");

source.onopen = source.onerror = () => {
  const state = ["connecting", "open", "closed"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
};
source.addEventListener("job", (event) => show(JSON.parse(event.data)));
// Something is gone, and what the server still has follows.
source.addEventListener("reset", () => $("jobs").replaceChildren());

/** Each event tells everything about a job, so that it does not matter which ones came before. */
function show({ id, limit, process, state, words, percent }) {
  const row = $(id) ?? newRow(id, limit);
  row.dataset.state = state;
  const badge = row.querySelector(".badge");
  badge.textContent = badge.dataset.state = state;
  row.querySelector(".words").textContent = words;
  if (percent !== null) row.querySelector("progress").value = percent;
  if (state !== "failed") row.querySelector(".where").textContent = `Process ${process}.`;
  row.querySelector(".cancel").disabled = state !== "running";
}

function newRow(id, limit) {
  const row = $("job").content.firstElementChild.cloneNode(true);
  row.id = id;
  const name = `Primes below ${limit.toLocaleString("en")}`;
  row.querySelector(".name").textContent = name;
  row.querySelector("progress").setAttribute("aria-label", name);
  row.querySelector("a").href = `/progress/jobs/${id}`;
  row.querySelector(".cancel").addEventListener("click", () => post(`jobs/${id}/cancel`));
  $("jobs").prepend(row);
  return row;
}

async function post(what, body) {
  try {
    const response = await fetch(`/progress/${what}`, { method: "POST", body });
    $("problem").textContent = response.ok ? "" : await response.text();
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  post("jobs", new FormData(event.target));
});
