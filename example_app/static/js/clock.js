const $ = (id) => document.getElementById(id);
const STATES = ["CONNECTING", "OPEN", "CLOSED"];
let source;

function connect() {
  source = new EventSource("/examples/clock");
  source.onopen = source.onerror = showState;
  source.addEventListener("customEvent", (event) => {
    const time = new Date(JSON.parse(event.data).milliseconds);
    $("time").textContent = time.toLocaleTimeString();
    $("id").textContent = event.lastEventId;
  });
  showState();
}

function disconnect() {
  source.close(); // Fires no event, and the browser does not reconnect.
  showState();
}

function showState() {
  const state = STATES[source.readyState];
  $("state").textContent = `${state} (${source.readyState})`;
  $("state").dataset.state = state;
  $("transitions").append(state, " ");
  $("connect").disabled = source.readyState !== EventSource.CLOSED;
  $("disconnect").disabled = source.readyState === EventSource.CLOSED;
}

$("connect").addEventListener("click", connect);
$("disconnect").addEventListener("click", disconnect);
connect();
