const $ = (id) => document.getElementById(id);
const { secret, me, now, ...about } = $("demo").dataset;
const WIDTH = Number(about.width), NEAR = Number(about.near);
const DOT = about.dotSeconds * 1000, POINT = about.pointSeconds * 1000; // milliseconds
const PACE = 50, ALIVE = 2000, GONE = 6000, SMOOTH = 60; // milliseconds
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const players = new Map();
const caught = new Map(); // The event of each dot that somebody has.
const source = new EventSource("/game/events");
const pen = $("field").getContext("2d");
let offset = now * 1000 - Date.now(), quickest = Infinity; // To the server's clock.
let place = null; // Where our cursor is, once it was moved.
let isHere = true, isSending = false, hasMoved = false, received = 0, drawnAt = 0;
let high = 0; // How many pixels of the page the field is high.

function serverTime() {
  return Date.now() + offset;
}

// What comes

on("move", (move) => {
  const { shown = move } = players.get(move.player) ?? {};
  players.set(move.player, { ...move, shown: { x: shown.x, y: shown.y } });
  if (move.player === me) $("latency").textContent = `${Math.round(performance.now() - move.sent)} ms`;
});

on("caught", (event) => {
  if (caught.has(event.dot)) return; // Somebody was faster.
  caught.set(event.dot, event);
  const who = event.player === me ? "You have" : `${event.name} has`;
  $("news").textContent = `${who} caught the dot.`;
  showPlayers();
});

on("leave", ({ player }) => {
  players.delete(player);
  showPlayers();
});

function on(type, take) {
  source.addEventListener(type, (event) => {
    received += 1;
    take(JSON.parse(event.data));
  });
}

source.onopen = source.onerror = () => {
  const state = ["connecting", "open", "closed"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
};

// What goes: one request at a time, with the newest place, twenty times a second at most

function moveTo(x, y) {
  place = { x: Math.min(WIDTH, Math.max(0, x)), y: Math.min(1, Math.max(0, y)) };
  hasMoved = true;
  send();
}

async function send() {
  if (isSending || !place || !isHere) return;
  isSending = true;
  hasMoved = false;
  const sent = performance.now();
  try {
    const { now } = await post("move", { ...place, dot: currentDot(), sent });
    setClock(now * 1000, performance.now() - sent);
    $("problem").textContent = "";
  } catch (error) {
    $("problem").textContent = error.message;
  }
  const pause = $("problem").textContent ? ALIVE : PACE;
  await new Promise((resolve) => setTimeout(resolve, sent + pause - performance.now()));
  isSending = false;
  if (hasMoved) send();
}

async function post(what, about) {
  const response = await fetch(`/game/${what}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ secret, ...about }),
    keepalive: true, // The last one goes while the page does.
  });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

/** Trust the answer that was the quickest: the server has read its clock in the middle of it. */
function setClock(time, took) {
  if (took > quickest) return;
  quickest = took;
  offset = time + took / 2 - Date.now();
}

// What is drawn

function currentDot() {
  return Math.floor(serverTime() / DOT);
}

function draw(time) {
  const colours = getComputedStyle($("field"));
  fit();
  drawDot(colours.getPropertyValue("--accent"));
  const share = 1 - Math.exp((drawnAt - time) / SMOOTH);
  drawnAt = time;
  for (const [id, { shown, x, y, name, hue }] of players) {
    shown.x += (x - shown.x) * share;
    shown.y += (y - shown.y) * share;
    if (id !== me) drawCursor(shown, name, hue, colours.color);
  }
  if (place) drawCursor(place, "You", players.get(me)?.hue ?? 0, colours.color);
  requestAnimationFrame(draw);
}

/** Clear the canvas, and have it as many pixels as the screen. */
function fit() {
  const { clientWidth, clientHeight } = $("field");
  $("field").width = Math.round(clientWidth * devicePixelRatio);
  $("field").height = Math.round(clientHeight * devicePixelRatio);
  pen.scale(devicePixelRatio, devicePixelRatio);
  high = clientHeight;
}

/** The ring around it tells how long it stays. */
function drawDot(colour) {
  const dot = currentDot();
  if (caught.has(dot)) return;
  const [x, y] = placeOf(dot);
  const left = 1 - (serverTime() / DOT - dot);
  disc(x, y, NEAR * high * 0.5, colour);
  pen.beginPath();
  pen.arc(x * high, y * high, NEAR * high * 0.8, -Math.PI / 2, (left * 2 - 0.5) * Math.PI);
  pen.lineWidth = NEAR * high * 0.12;
  pen.strokeStyle = colour;
  pen.stroke();
}

/** The server knows the same formula, so that it need not send where a dot is. */
function placeOf(dot) {
  return [0.1 + 1.3 * ((dot * 0.6180339887) % 1), 0.1 + 0.8 * ((dot * 0.7548776662) % 1)];
}

function drawCursor({ x, y }, name, hue, colour) {
  const isRight = x > WIDTH * 0.7;
  disc(x, y, 7, `hsl(${hue} 70% 50%)`);
  pen.font = "13px system-ui, sans-serif";
  pen.textAlign = isRight ? "right" : "left";
  pen.fillStyle = colour;
  pen.fillText(name, x * high + (isRight ? -12 : 12), y * high + 4);
}

function disc(x, y, radius, colour) {
  pen.beginPath();
  pen.arc(x * high, y * high, radius, 0, 2 * Math.PI);
  pen.fillStyle = colour;
  pen.fill();
}

function showPlayers() {
  const points = new Map();
  for (const { player, at } of caught.values()) {
    if (at * 1000 > serverTime() - POINT) points.set(player, (points.get(player) ?? 0) + 1);
  }
  const rows = [...players.values()].map(({ player, name, hue }) => {
    const row = document.createElement("li");
    row.style.setProperty("--colour", `hsl(${hue} 70% 50%)`);
    row.append(player === me ? `${name} (you)` : name, document.createElement("b"));
    row.lastChild.textContent = points.get(player) ?? 0;
    return row;
  });
  rows.sort((one, other) => other.lastChild.textContent - one.lastChild.textContent);
  $("players").replaceChildren(...rows);
  $("count").textContent = rows.length;
}

// What happens here

for (const type of ["pointermove", "pointerdown"]) {
  $("field").addEventListener(type, ({ offsetX, offsetY }) => {
    const { clientWidth, clientHeight } = $("field");
    moveTo((offsetX / clientWidth) * WIDTH, offsetY / clientHeight);
  });
}
$("field").addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault(); // The page would scroll.
  const { x, y } = place ?? { x: WIDTH / 2, y: 0.5 };
  moveTo(x + step[0] * 0.04, y + step[1] * 0.04);
});
addEventListener("pagehide", () => {
  isHere = false;
  if (place) post("leave").catch(() => {}); // Then he vanishes for want of moves.
});
addEventListener("pageshow", () => (isHere = true));
setInterval(send, ALIVE); // Who does not move is still there.
setInterval(() => {
  const late = (serverTime() - GONE) / 1000;
  for (const [id, { at }] of players) if (at < late) players.delete(id);
  $("rate").textContent = received;
  received = 0;
  showPlayers();
}, 1000);
requestAnimationFrame(draw);
