const $ = (id) => document.getElementById(id);
let lastEventId = $("demo").dataset.cursor; // of the moment at which the page was made
let cameOnline = 0; // by the server's clock
let source;

function connect() {
  source = new EventSource(`/stream?lastEventId=${encodeURIComponent(lastEventId)}`);
  source.onopen = source.onerror = showState;
  source.onmessage = (event) => {
    const { message, at } = JSON.parse(event.data);
    const isMissed = at < cameOnline;
    add(message, event, isMissed ? "missed while offline" : "", isMissed ? "missed" : "");
  };
  source.addEventListener("reset", (event) => {
    const { requested } = JSON.parse(event.data);
    const text = `Something is gone: the server no longer knows what came after ${requested}.`;
    add(text, event, "What it still has follows.", "reset");
  });
  showState();
}

async function goOnline() {
  const response = await fetch("/now");
  cameOnline = (await response.json()).now;
  connect();
}

function goOffline() {
  source.close();
  showState();
}

async function send(form) {
  const response = await fetch("/send_message", { method: "POST", body: new FormData(form) });
  $("problem").textContent = response.ok ? "" : await response.text();
  if (response.ok) form.reset();
}

function add(text, event, note, kind) {
  const row = document.createElement("li");
  row.className = kind;
  row.append(text, document.createElement("small"));
  row.lastChild.textContent = note;
  $("messages").prepend(row);
  $("last-event-id").textContent = lastEventId = event.lastEventId;
}

function showState() {
  const state = ["connecting", "online", "offline"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
  $("online").disabled = source.readyState !== EventSource.CLOSED;
  $("offline").disabled = source.readyState === EventSource.CLOSED;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target);
});
$("online").addEventListener("click", goOnline);
$("offline").addEventListener("click", goOffline);
$("last-event-id").textContent = lastEventId;
connect();
