const $ = (id) => document.getElementById(id);
const { room } = $("demo").dataset;
const members = new Set();
let name = $("name").value;
let lastEventId = "";
let source;

function enter() {
  const query = lastEventId ? `?${new URLSearchParams({ lastEventId })}` : "";
  source = new EventSource(`/chat-room/${room}/events${query}`);
  source.onopen = source.onerror = showState;
  on("message", ({ member, text, at }) => {
    const time = new Date(at * 1000).toLocaleTimeString();
    add(text, `${member}, ${time}`, member === name ? "own" : "");
  });
  on("join", ({ member, count }) => {
    members.add(member);
    showMembers(count);
    add(`${member} is here.`, "", "event");
  });
  on("leave", ({ member, count }) => {
    members.delete(member);
    showMembers(count);
    add(`${member} has left.`, "", "event");
  });
  on("present", (present) => {
    members.clear();
    for (const member of present.members) members.add(member);
    showMembers(present.count);
  });
  on("reset", () => {
    $("messages").replaceChildren();
    add("Something is gone. What the server still has follows.", "", "reset");
  });
  showState();
}

function on(type, take) {
  source.addEventListener(type, (event) => {
    lastEventId = event.lastEventId || lastEventId; // `present` has none.
    take(JSON.parse(event.data));
  });
}

/** What others have said and how they call themselves is text, and never HTML. */
function add(text, about, kind) {
  const row = document.createElement("li");
  row.className = kind;
  row.append(document.createElement("small"), text);
  row.firstChild.textContent = about;
  const list = $("messages");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.append(row);
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

function showMembers(count) {
  const rows = [...members].sort().map((member) => {
    const row = document.createElement("li");
    row.textContent = member === name ? `${member} (you)` : member;
    return row;
  });
  $("members").replaceChildren(...rows);
  $("count").textContent = count;
}

async function post(path, form) {
  const request = { method: "POST", body: new FormData(form) };
  const response = await fetch(`/chat-room/${path}`, request);
  $("problem").textContent = response.ok ? "" : await response.text();
  return response.ok ? response.json() : null;
}

/** Come in once more, under the new name, from where the old one was. */
async function rename(form) {
  const changed = await post("name", form);
  if (!changed) return;
  $("name").value = name = changed.name;
  source.close();
  enter();
}

function showState() {
  const state = ["connecting", "online", "offline"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
  $("online").disabled = source.readyState !== EventSource.CLOSED;
  $("offline").disabled = source.readyState === EventSource.CLOSED;
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await post(`${room}/say`, event.target)) $("text").value = "";
});
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rename(event.target);
});
$("offline").addEventListener("click", () => {
  source.close();
  showState();
});
$("online").addEventListener("click", enter);
enter();
