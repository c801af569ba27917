const $ = (id) => document.getElementById(id);
const SHOWN = 8;
const source = new EventSource("/examples/interval");

for (const type of ["data", "heartbeat"]) {
  source.addEventListener(type, (event) => {
    const { number } = JSON.parse(event.data);
    $(type).textContent = number + 1;
    log(type, number);
  });
}

function log(type, number) {
  const row = document.createElement("li");
  row.className = type;
  const time = new Date().toLocaleTimeString();
  row.textContent = `${time}  ${type} ${number}`;
  $("log").prepend(row);
  if ($("log").children.length > SHOWN) $("log").lastChild.remove();
}

source.onopen = source.onerror = () => {
  const state = ["connecting", "open", "closed"][source.readyState];
  $("state").textContent = $("state").dataset.state = state;
};
