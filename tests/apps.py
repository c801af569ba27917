"""The app that the tests serve with real servers."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app, request, session

import flask_eventstream
from flask_eventstream import (
    EventStream,
    EventStreamResponse,
    ServerSentEvent,
    concurrency,
    hub,
    interval,
    merge,
    shutdown,
)
from flask_eventstream.event import HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import Iterator

eventstream = EventStream("eventstream", __name__)
HOME = os.path.dirname(flask_eventstream.__file__)
OPEN: Counter[str] = Counter()
"""How many generators of a view there are, by its name."""


@eventstream.stream("/ticks")
def ticks() -> Iterator[int]:
    yield from interval(0.1)


@eventstream.stream("/silent", heartbeat=0.2)
def silent() -> Iterator[int]:
    OPEN["silent"] += 1
    try:
        yield from interval(0.4)
    finally:
        OPEN["silent"] -= 1


@eventstream.stream("/mute", heartbeat=3)
def mute() -> Iterator[int]:
    yield 0
    yield from interval(3600)


@eventstream.stream("/quiet", heartbeat=3600)
def quiet() -> Iterator[int]:
    yield 0
    yield from interval(3600)


@eventstream.stream("/merged")
def merged() -> Iterator[int]:
    yield from merge(interval(0.1), interval(0.3))


@eventstream.stream("/count/<int:number>")
def count(number: int) -> Iterator[ServerSentEvent]:
    current_app.config["STARTED"] = current_app.config.get("STARTED", 0) + 1
    for n in range(number):
        yield ServerSentEvent({"n": n}, retry=request.args.get("retry", type=int))


@eventstream.stream("/blocked")
def blocked() -> Iterator[int]:
    """Wait for something that does not come, in the thread or greenlet of the server."""
    yield 0
    try:
        time.sleep(3600)
    finally:
        print("blocked was closed", file=sys.stderr, flush=True)


@eventstream.stream("/large")
def large() -> Iterator[str]:
    while True:
        yield "x" * 100_000


GATES: dict[str, threading.Event] = defaultdict(threading.Event)
"""What generators wait for in the middle, until the test lets them go on."""

BEFORE = ["Hel", "lo ", "世界", " 👋🏽", "!\nA line\u2028of two, "]
AFTER = ["再", "见", "", " 🎉", "!\n"]


@eventstream.resumable("/answer/<name>")
def answer(name: str) -> Iterator[str]:
    """Stop in mid-answer until the test says ``/go/<name>``."""
    current_app.config["STARTED"] = current_app.config.get("STARTED", 0) + 1
    yield from BEFORE
    GATES[name].wait()
    yield from AFTER


def go(name: str) -> dict[str, str]:
    GATES[name].set()
    return {}


def publish() -> dict[str, str]:
    data = request.get_json()
    return {"id": eventstream.publish(data["data"], **data.get("fields", {}))}


def state() -> dict[str, Any]:
    """Tell what the process holds because of streams, and what it holds at all."""
    gc.collect()
    gevent = sys.modules.get("gevent")
    greenlets = [one for one in gc.get_objects() if gevent and isinstance(one, gevent.Greenlet)]
    return {
        "subscribers": eventstream.subscriber_count(),
        "channels": len(list(current_app.extensions["eventstream"].broker._channels)),
        "threads": sum(is_ours(frame) for frame in sys._current_frames().values()),
        "silent": OPEN["silent"],
        "greenlets": sum(not one.dead for one in greenlets),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def blocks() -> dict[str, int]:
    """Tell how many pieces of memory all objects have."""
    gc.collect()
    return {"blocks": sys.getallocatedblocks()}


def started() -> str:
    """Tell how often a view was started."""
    return str(current_app.config.get("STARTED", 0))


def is_ours(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(HOME):
            return True
        frame = frame.f_back
    return False


def chunks() -> Iterator[Any]:
    """Write like OpenAI's API, but slowly enough for heartbeats, and with ids and types."""
    for token in ("Hel", "lo", " 世界"):
        yield {"choices": [{"index": 0, "delta": {"content": token}}]}
        yield None


def chat() -> Any:
    return raw() if "wire" in request.args else EventStreamResponse(chunks(), format="openai")


def with_ids() -> Iterator[Any]:
    for n in range(3):
        yield ServerSentEvent({"n": n}, id=n)
        yield None


def raw() -> Any:
    """Send bytes as they are, to show what a client makes of the wrong ones."""
    wire = request.args["wire"].encode("latin-1")
    return current_app.response_class(wire, mimetype="text/event-stream")


class Flood:
    """Events without end from a thread or greenlet of the server's: number, nanoseconds, filling.

    :ivar published: how many there were.
    """

    def __init__(self) -> None:
        self.published = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread()

    def start(self, app: Flask, size: int, batch: int, pause: float) -> None:
        self._is_over.clear()
        self._thread = threading.Thread(target=self._run, args=(app, size, batch, pause))
        self._thread.daemon = True
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self, app: Flask, size: int, batch: int, pause: float) -> None:
        with app.app_context():
            while not self._is_over.is_set():
                self.publish(batch, size)
                time.sleep(pause)

    def publish(self, batch: int, size: int) -> None:
        for _ in range(batch):
            eventstream.publish(f"{self.published} {time.time_ns()} {'x' * size}")
            self.published += 1


FLOOD = Flood()


def flood() -> dict[str, int]:
    """Start a flood, ``batch`` events of a ``size`` after each ``pause``, or one batch at once."""
    size, batch = (int(request.args.get(key, 1)) for key in ("size", "batch"))
    pause = request.args.get("pause")
    if pause is None:
        FLOOD.publish(batch, size)
    else:
        FLOOD.start(eventstream_app(), size, batch, float(pause))
    return {"published": FLOOD.published}


def end_flood() -> dict[str, int]:
    FLOOD.stop()
    return {"published": FLOOD.published}


def eventstream_app() -> Flask:
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def compute() -> str:
    """Keep a thread busy with pure Python, for so many ``seconds``."""
    deadline, rounds = time.monotonic() + float(request.args["seconds"]), 0
    while time.monotonic() < deadline:
        rounds += sum(range(1000)) > 0
    return str(rounds)


def child() -> dict[str, Any]:
    """Leave a child behind that only sleeps, forked or executed; tell its process id."""
    if "forked" not in request.args:
        return {"child": subprocess.Popen(["sleep", "60"]).pid}
    # Not gevent's sleep: that one would run the greenlets that the child has copies of.
    sleep, seconds = concurrency.original("time", "sleep"), float(request.args["forked"])
    forked = multiprocessing.get_context("fork").Process(target=sleep, args=(seconds,), daemon=True)
    forked.start()
    return {"child": forked.pid}


def who() -> EventStreamResponse:
    """Stream the default channel, with the worker's process id first."""
    return eventstream.subscribe(snapshot=lambda: str(os.getpid()))


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Make the app; with ``TIME_TO_END``, its streams have so many seconds to end in order.

    However many they are, and however busy the machine is, none is to be cut then.
    """
    app = Flask(__name__)
    app.config.update(config or {})
    if seconds := app.config.get("TIME_TO_END"):
        shutdown._PATIENCE = shutdown._PATIENCE_WITH_GREENLETS = hub._STOP_SECONDS = seconds
    app.register_blueprint(eventstream)
    app.add_url_rule("/publish", view_func=publish, methods=["POST"])
    app.add_url_rule(
        "/disconnect", "disconnect", lambda: [eventstream.disconnect("sse")], methods=["POST"]
    )
    app.add_url_rule("/state", view_func=state)
    app.add_url_rule("/blocks", view_func=blocks)
    app.add_url_rule("/started", view_func=started)
    app.add_url_rule("/go/<name>", view_func=go, methods=["POST"])
    app.add_url_rule("/v1/chat/completions", "chat", chat, methods=["POST"])
    app.add_url_rule("/ids", "ids", lambda: EventStreamResponse(with_ids()))
    app.add_url_rule("/raw", view_func=raw)
    app.add_url_rule("/flood", view_func=flood, methods=["POST"])
    app.add_url_rule("/flood/end", view_func=end_flood, methods=["POST"])
    app.add_url_rule("/compute", view_func=compute)
    app.add_url_rule("/child", view_func=child, methods=["POST"])
    app.add_url_rule("/who", view_func=who)
    return app


# An upstream, and what relays it


UPSTREAM_EVENTS = [
    ServerSentEvent("one\n\n two\u2028\n", type="first", id="7", retry=9000),
    ServerSentEvent({"text": "世界 👋🏽"}, type="tool_call"),
    ServerSentEvent("", id=8),
    ServerSentEvent("再见\n🎉"),
]


class Upstream:
    """What an upstream sends, by the prompt, and what it tells of itself.

    :ivar told: how often it was asked, how many events it has produced, and how many of its
        answers it goes on with.
    """

    def __init__(self) -> None:
        self.told = {"asked": 0, "produced": 0, "open": 0}

    def answer(self) -> Any:
        key, prompt = request.headers["Authorization"], request.get_json()["messages"][0]["content"]
        if prompt.isdigit():
            # As some do that are of help where they should not.
            return f"Your key {key} is refused.", int(prompt), {"X-Your-Key": key}
        items = getattr(self, prompt)()
        return current_app.response_class(self._count(items), mimetype="text/event-stream")

    def _count(self, items: Iterator[ServerSentEvent | None]) -> Iterator[bytes]:
        self.told["asked"] += 1
        self.told["open"] += 1
        try:
            for item in items:
                self.told["produced"] += item is not None
                yield HEARTBEAT if item is None else item.encode()
        finally:
            self.told["open"] -= 1

    def events(self) -> Iterator[ServerSentEvent | None]:
        """The second one is produced only when the test has said ``/go/events``."""
        first, *others = UPSTREAM_EVENTS
        yield first
        while not GATES["events"].wait(0.05):
            yield None
        GATES["events"].clear()
        yield from others
        yield ServerSentEvent("[DONE]")

    def tokens(self) -> Iterator[ServerSentEvent | None]:
        for n in interval(0.02):
            yield ServerSentEvent(str(n))

    def heartbeats(self) -> Iterator[ServerSentEvent | None]:
        yield ServerSentEvent("thinking")
        for _ in interval(0.05):
            yield None

    def silence(self) -> Iterator[ServerSentEvent | None]:
        """Nothing more until the test has said ``/go/silence``."""
        yield ServerSentEvent("thinking")
        GATES["silence"].wait()

    def flood(self) -> Iterator[ServerSentEvent | None]:
        number = 0
        while True:
            yield ServerSentEvent(f"{number} {'x' * 16_000}")
            number += 1

    def broken(self) -> Iterator[ServerSentEvent | None]:
        yield ServerSentEvent("before")
        raise RuntimeError("the rest of the answer is lost")

    def unfinished(self) -> Iterator[ServerSentEvent | None]:
        yield ServerSentEvent("before")


def create_upstream() -> Flask:
    app, upstream = Flask(__name__), Upstream()
    app.add_url_rule("/v1/chat/completions", view_func=upstream.answer, methods=["POST"])
    app.add_url_rule("/told", "told", lambda: upstream.told)
    app.add_url_rule("/go/<name>", view_func=go, methods=["POST"])
    return app


def create_relay(*replaced: tuple[str, str]) -> Flask:
    """Make an app of the code in the documentation, some of its text replaced."""
    app, own = Flask(__name__), EventStream("eventstream", __name__)
    app.secret_key = "of the session"
    # Who asks is the same user each time.
    app.before_request(lambda: session.update(user_id=1))
    page = (Path(__file__).parent.parent / "docs" / "relay.rst").read_text("utf-8")
    shown = re.findall(r"^\.\. testcode::\n\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    code = "".join(map(dedent, shown))
    for old, new in replaced:
        assert old in code, f"docs/relay.rst has no {old!r} any more"
        code = code.replace(old, new)
    exec(code, {"eventstream": own})
    app.register_blueprint(own)
    return app
