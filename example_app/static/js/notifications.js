const $ = (id) => document.getElementById(id);
const { user, cursor } = $("demo").dataset;
let lastEventId = cursor; // of the moment of logging in
let since = 0; // by the server's clock: what is older was missed, or seen before
let source;

async function connect() {
  show("connecting");
  const response = await post("token", { user });
  if (!response) return setTimeout(connect, 3000); // The server is away.
  if (!response.ok) return show("logged out", await response.text());
  const { token, now } = await response.json();
  since = now;
  add("tokens");
  open(new URLSearchParams({ channel: `user:${user}`, token, lastEventId }));
}

function open(query) {
  source = new EventSource(`/stream?${query}`);
  source.onopen = () => show("online");
  source.onerror = () => {
    show("connecting");
    // Refused: the token has expired, or is revoked. Only the server knows whether there is another.
    if (source.readyState === EventSource.CLOSED) connect();
  };
  source.addEventListener("notification", (event) => receive(event, JSON.parse(event.data)));
  source.addEventListener("read", (event) => read(event, JSON.parse(event.data).until));
  source.addEventListener("reset", (event) => {
    $("inbox").replaceChildren();
    write("Older notifications are gone.", event, "The server keeps no more of them.", "reset");
  });
}

function receive(event, { from, text, at }) {
  const when = new Date(at * 1000).toLocaleTimeString();
  const note = `${from}, ${when}${at < since ? ", before you were here" : ""}`;
  write(text, event, note, "unread");
  if (at >= since) toast(`${from}: ${text}`);
}

function write(text, event, note, kind) {
  const row = document.createElement("li");
  row.className = kind;
  row.dataset.id = event.lastEventId;
  row.append(text, document.createElement("small"));
  row.lastChild.textContent = note;
  $("inbox").prepend(row);
  keepId(event);
}

/** All up to that one are read: what has come meanwhile is not. */
function read(event, until) {
  let isRead = false;
  for (const row of $("inbox").children) {
    isRead ||= row.dataset.id === until;
    if (isRead) row.classList.remove("unread");
  }
  keepId(event);
}

function keepId(event) {
  $("last-event-id").textContent = lastEventId = event.lastEventId;
  const count = $("inbox").querySelectorAll(".unread").length;
  $("unread").textContent = `${count} unread`;
  $("unread").dataset.count = count;
  $("read").disabled = count === 0;
  document.title = document.title.replace(/^(\(\d+\) )?/, count ? `(${count}) ` : "");
}

function toast(text) {
  const box = document.createElement("p");
  box.textContent = text;
  $("toasts").append(box);
  setTimeout(() => box.remove(), 5000);
}

async function send(form) {
  const response = await post("send", new FormData(form));
  $("problem").textContent = response?.ok ? "" : (await response?.text()) ?? "The server is away.";
  if (!response?.ok) return;
  const { tabs } = await response.json();
  $("sent").textContent = `Sent. ${$("to").value} has ${tabs} tab${tabs === 1 ? "" : "s"} open.`;
  $("text").value = "";
}

async function post(what, fields) {
  try {
    const body = fields instanceof FormData ? fields : new URLSearchParams(fields);
    return await fetch(`/notifications/${what}`, { method: "POST", body });
  } catch {
    return null; // There was no answer.
  }
}

function show(state, problem = "") {
  $("state").textContent = $("state").dataset.state = state;
  $("problem").textContent = problem;
  $("offline").disabled = state !== "online";
  $("online").disabled = state !== "offline";
}

function add(name) {
  $(name).textContent = Number($(name).textContent) + 1;
}

if (user) {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send(event.target);
  });
  $("read").addEventListener("click", () => {
    post("read", { until: $("inbox").querySelector(".unread").dataset.id });
  });
  $("offline").addEventListener("click", () => {
    source.close();
    show("offline");
  });
  $("online").addEventListener("click", connect);
  connect();
}
