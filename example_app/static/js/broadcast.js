const $ = (id) => document.getElementById(id);
const { cursor, tab } = $("demo").dataset;
let lastEventId = cursor; // of the page's making
let cameOnline = 0; // by the server's clock
let source;

function connect() {
  source = new EventSource(`/messages/${tab}?${new URLSearchParams({ lastEventId })}`);
  source.onopen = source.onerror = showState;
  source.onmessage = (event) => {
    const { message, at } = JSON.parse(event.data);
    if (at < cameOnline) add(message, event, "missed while offline", "missed");
    else add(message, event);
  };
  source.addEventListener("served", (event) => {
    $("process").textContent = JSON.parse(event.data).process;
    keepId(event);
  });
  source.addEventListener("reset", (event) => {
    const { requested } = JSON.parse(event.data);
    const text = `Something is gone: what came after ${requested}.`;
    add(text, event, "What the server still has follows.", "reset");
  });
  showState();
}

async function goOnline() {
  $("online").disabled = true;
  try {
    const response = await fetch("/now");
    cameOnline = (await response.json()).now;
  } finally {
    connect(); // Should the server be away, it tries again and again.
  }
}

function goOffline() {
  source.close();
  showState();
}

async function send(form) {
  const request = { method: "POST", body: new FormData(form) };
  const response = await fetch("/send_message", request);
  $("problem").textContent = response.ok ? "" : await response.text();
  if (response.ok) form.reset();
}

function add(text, event, note = "", kind = "") {
  const row = document.createElement("li");
  row.className = kind;
  row.append(text, document.createElement("small"));
  row.lastChild.textContent = note;
  $("messages").append(row);
  $("messages").scrollTop = $("messages").scrollHeight;
  keepId(event);
}

function keepId(event) {
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
