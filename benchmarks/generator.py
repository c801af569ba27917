"""What an item of a generator view costs, against a bare Flask response.

Ours is a view decorated with ``EventStream.stream`` that yields the item. The bare view makes the
same bytes itself, ``f"data: {item}\\n\\n"`` for text and ``f"data: {json.dumps(item)}\\n\\n"``
for a dict, and returns ``Response(generator)``; once more with ``stream_with_context``, which ours
always has. Two measurements:

* *Through gunicorn*, with its gevent and its gthread worker: the CPU time, user and system, that
  the worker's process spends while a client reads a stream to its end. The bar speaks of this one,
  since it is what a server pays. The client is another process and reads a plain socket. The
  figure of the bare view is the median of the rounds; the others' are that times the median of
  their ratios to the bare view in the same round.
* *In process*: the CPU time of iterating the WSGI application's answer, without a server.

Not quite the same: ours bounds the size of an event, splits lines, turns an error into an event,
encodes JSON with the app's provider (which knows dates, and sorts keys) and refuses NaN, and ends
the stream with an event. The last column is a bare view that uses the app's provider too.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from io import BytesIO
from itertools import repeat
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, request, stream_with_context
from measuring import (
    Table,
    best_of_rounds,
    load,
    options,
    print_machine,
    timer,
    write_json,
)
from werkzeug.test import create_environ

from flask_eventstream import EventStream, EventStreamParser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BAR = 1.25
ITEMS_IN_PROCESS = 2_000
ITEMS_SERVED = 20_000
SECONDS = 90.0
"""After so long no new round through gunicorn is begun."""
DISTRIBUTIONS = ("flask-eventstream", "flask", "werkzeug", "gunicorn", "gevent")
ITEMS: dict[str, Any] = {
    "text": "Hello",
    "dict": {"id": "chatcmpl-1042", "index": 0, "delta": {"content": "Hello"}, "done": None},
}
BARE = "Response(generator)"
PATHS = {
    "flask_eventstream": "/stream/",
    BARE: "/bare/",
    "with stream_with_context": "/bare-with-context/",
    "with the app's JSON": "/bare-with-provider/",
}
WORKERS = {"gevent": ["gunicorn", "gevent"], "gthread": ["gunicorn"]}
"""Worker classes, and the modules that they need."""
THREADS = {"gthread": ["--threads", "4"]}


def create_app() -> Flask:
    """Return the app with all the views; gunicorn calls it."""
    app = Flask("generator")
    stream = EventStream("eventstream", "generator")
    stream.stream("/<kind>")(our_view)
    app.register_blueprint(stream)
    app.add_url_rule("/bare/<kind>", view_func=bare_view)
    app.add_url_rule("/bare-with-context/<kind>", view_func=bare_view_with_context)
    app.add_url_rule("/bare-with-provider/<kind>", view_func=bare_view_with_provider)
    app.add_url_rule("/cpu", "cpu", lambda: str(time.process_time()))
    return app


def our_view(kind: str) -> Iterator[Any]:
    # A loop, as real views and the bare ones have it.
    for item in _items(kind):  # noqa: UP028
        yield item


def bare_view(kind: str) -> Response:
    return Response(_bare_events(kind, json.dumps), mimetype="text/event-stream")


def bare_view_with_context(kind: str) -> Response:
    events = stream_with_context(_bare_events(kind, json.dumps))
    return Response(events, mimetype="text/event-stream")


def bare_view_with_provider(kind: str) -> Response:
    return Response(_bare_events(kind, current_app.json.dumps), mimetype="text/event-stream")


def _items(kind: str) -> Iterator[Any]:
    return repeat(ITEMS[kind], int(request.args["items"]))


def _bare_events(kind: str, dumps: Callable[[Any], str]) -> Iterator[str]:
    items = _items(kind)
    return _text_events(items) if kind == "text" else _json_events(items, dumps)


def _text_events(items: Iterator[str]) -> Iterator[str]:
    for item in items:
        yield f"data: {item}\n\n"


def _json_events(items: Iterator[Any], dumps: Callable[[Any], str]) -> Iterator[str]:
    for item in items:
        yield f"data: {dumps(item)}\n\n"


def main() -> None:
    arguments = options("Compare what an item of a generator view costs.", rounds=11)
    machine = print_machine(DISTRIBUTIONS)
    app = create_app()
    in_process = Table("An item, in process", BARE, measure_in_process(app, arguments.rounds))
    in_process.print()
    served = Table(
        "An item, through gunicorn: the worker's CPU time",
        BARE,
        measure_served(arguments.rounds),
        unit="us",
    )
    served.print()
    write_json(arguments.json, machine, [in_process, served], print_bar(served))


def measure_in_process(app: Flask, rounds: int) -> dict[str, dict[str, float]]:
    rows = {}
    for kind in ITEMS:
        answers = {name: partial(_answer, app, url(path, kind)) for name, path in _peers(kind)}
        for name, answer in answers.items():
            _check(name, kind, b"".join(answer()))
        timers = {name: timer(partial(_exhaust, answer)) for name, answer in answers.items()}
        best = best_of_rounds(timers, rounds)
        rows[kind] = {name: seconds / ITEMS_IN_PROCESS for name, seconds in best.items()}
    return rows


def _peers(kind: str) -> list[tuple[str, str]]:
    return [(name, path) for name, path in PATHS.items() if kind == "dict" or "JSON" not in name]


def url(path: str, kind: str, items: int = ITEMS_IN_PROCESS) -> str:
    return f"{path}{kind}?items={items}"


def _answer(app: Flask, target: str) -> Any:
    environ = create_environ(target)
    return app(environ, lambda status, headers, error=None: _refuse_write)


def _refuse_write(data: bytes) -> None:
    raise AssertionError("nobody uses the write function of PEP 3333")


def _exhaust(answer: Callable[[], Any]) -> None:
    with closing(answer()) as body:
        deque(body, maxlen=0)


def _check(name: str, kind: str, body: bytes, items: int = ITEMS_IN_PROCESS) -> None:
    found = [event.data for event in EventStreamParser().feed(body) if event.type != "end"]
    item = ITEMS[kind]
    # All are alike, so that one of them is decoded.
    is_right = len(found) == items and len(set(found)) == 1
    if not is_right or (found[0] if kind == "text" else json.loads(found[0])) != item:
        raise SystemExit(f"{name} did other work: {len(found)} events like {found[:1]}")


def measure_served(rounds: int) -> dict[str, dict[str, float]]:
    rows = {}
    loaders = {name: partial(_import_all, modules) for name, modules in WORKERS.items()}
    for worker_class in load(loaders):
        with gunicorn(worker_class) as port:
            taken = _take_rounds(port, rounds)
        for kind in ITEMS:
            seconds = {name: taken[kind, name] for name, _ in _peers(kind)}
            rows[f"{kind}, {worker_class}"] = _typical(seconds)
    return rows


def _typical(seconds: dict[str, list[float]]) -> dict[str, float]:
    # The speed of the machine changes from round to round, and the scheduler's mood with it. So
    # each is compared with the bare response of its own round.
    bare = seconds[BARE]
    ratios = {
        name: median(one / other for one, other in zip(turns, bare, strict=True))
        for name, turns in seconds.items()
    }
    return {name: median(bare) * ratio for name, ratio in ratios.items()}


def _import_all(modules: Iterable[str]) -> None:
    for module in modules:
        import_module(module)


def _take_rounds(port: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    turns = [(kind, name, path) for kind in ITEMS for name, path in _peers(kind)]
    taken: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind, name, _ in turns}
    for kind, name, path in turns:
        _cpu_of_stream(port, name, path, kind, ITEMS_IN_PROCESS)
    end = time.monotonic() + SECONDS / len(WORKERS)
    for _ in range(rounds):
        if time.monotonic() > end:
            break
        for kind, name, path in turns:
            seconds = _cpu_of_stream(port, name, path, kind, ITEMS_SERVED)
            taken[kind, name].append(seconds / ITEMS_SERVED)
    return taken


def _cpu_of_stream(port: int, name: str, path: str, kind: str, items: int) -> float:
    before = _cpu(port)
    answer = _read(port, url(path, kind, items))
    seconds = _cpu(port) - before
    to_read: Any = SimpleNamespace(makefile=lambda mode: BytesIO(answer))
    response = http.client.HTTPResponse(to_read)
    response.begin()
    _check(name, kind, response.read(), items)
    return seconds


def _cpu(port: int) -> float:
    """Return the CPU time, user and system, that the worker has spent so far, in seconds."""
    # The worker is asked for it, which tells nanoseconds; /proc/<pid>/stat has the same in ticks
    # of 10 ms. The question itself costs 0.5 ms, of 100 ms or more.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/cpu")
        return float(connection.getresponse().read())
    finally:
        connection.close()


def _read(port: int, target: str) -> bytes:
    request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request.encode())
        pieces = []
        while piece := connection.recv(1 << 18):
            pieces.append(piece)
    return b"".join(pieces)


@contextmanager
def gunicorn(worker_class: str) -> Iterator[int]:
    """Serve the app with one worker process on a free port, as long as the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "gunicorn", "-k", worker_class, "-b", f"127.0.0.1:{port}",
        "--log-level", "warning", "--graceful-timeout", "1", *THREADS.get(worker_class, ()),
        "generator:create_app()",
    ]  # fmt: skip
    # Not from where the benchmark was started, or a package that lies there would be served.
    server = subprocess.Popen(command, cwd=Path(__file__).parent)
    try:
        _wait_until_it_listens(server, port)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_it_listens(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("gunicorn does not listen")


def print_bar(table: Table) -> list[dict[str, Any]]:
    """Say whether ours is within the bar for each workload, and return the same as data."""
    print(f"\nBar: at most {BAR:g} x the CPU time of a bare {BARE}, through gunicorn.\n")
    bars = []
    for workload, figures in table.rows.items():
        ratio = figures["flask_eventstream"] / figures[BARE]
        print(f"  {workload}: {'met' if ratio <= BAR else 'MISSED'}: {ratio:.2f} x")
        bars.append({"workload": workload, "bar": BAR, "met": ratio <= BAR, "ratio": ratio})
    return bars


if __name__ == "__main__":
    main()
