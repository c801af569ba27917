const $ = (id) => document.getElementById(id);
const canvas = $("canvas").getContext("2d");
const { width, height } = $("canvas");
const times = [];
let source, isDrawing = false;

function play() {
  source?.close();
  times.length = 0;
  const isGzipped = $("gzip").checked;
  source = new EventSource(`/binary/frames?gzip=${isGzipped}`);
  source.onopen = source.onerror = showState;
  source.addEventListener("frame", (event) => take(event, isGzipped));
  showState();
}

async function take({ data, lastEventId, target }, isGzipped) {
  if (isDrawing || target !== source) return; // A slow device leaves some out.
  isDrawing = true;
  try {
    const pixels = await unpack(data, isGzipped);
    canvas.putImageData(new ImageData(pixels, width, height), 0, 0);
    showFigures(lastEventId, pixels.length, data.length);
  } catch (error) {
    $("problem").textContent = error.message;
  } finally {
    isDrawing = false;
  }
}

async function unpack(base64, isGzipped) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  if (!isGzipped) return new Uint8ClampedArray(packed.buffer);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8ClampedArray(await new Response(stream).arrayBuffer());
}

function showFigures(number, raw, text) {
  const wire = `event: frame\ndata: \nid: ${number}\n\n`.length + text;
  $("number").textContent = number;
  $("raw").textContent = `${raw.toLocaleString("en")} bytes`;
  $("wire").textContent = `${wire.toLocaleString("en")} bytes`;
  $("ratio").textContent = `${Math.round((100 * wire) / raw)} %`;
  times.push(performance.now());
  if (times.length > 20) times.shift();
  const seconds = (times.at(-1) - times[0]) / 1000;
  if (seconds) $("rate").textContent = ((times.length - 1) / seconds).toFixed(1);
}

function stop() {
  source.close();
  showState();
}

function showState() {
  const state = ["connecting", "open", "closed"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
  $("play").disabled = source.readyState !== EventSource.CLOSED;
  $("stop").disabled = source.readyState === EventSource.CLOSED;
}

$("gzip").addEventListener("change", play);
$("play").addEventListener("click", play);
$("stop").addEventListener("click", stop);
play();
