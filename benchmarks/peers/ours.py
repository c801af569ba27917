"""This package in an app as small as its peers', with the routes that the benchmark asks for.

Every subscriber reads the channel ``shared``, alone or beside one of its own.
"""

from __future__ import annotations

import time

from flask import Flask, request

from flask_eventstream import eventstream

CHANNEL = "shared"


@eventstream.authorize
def may_read(channel: str) -> bool:
    """Let everybody read everything."""
    return True


def create_app(hijack: bool = True, broker_url: str = "memory://") -> Flask:
    """Return the app.

    :param hijack: whether subscribers' sockets are taken from the server, or its own loop
        iterates each response.
    :param broker_url: the broker.
    """
    app = Flask("ours")
    app.config["EVENTSTREAM_HIJACK"] = hijack
    app.config["EVENTSTREAM_BROKER_URL"] = broker_url
    app.config["EVENTSTREAM_MAX_SUBSCRIBERS"] = 1_000_000
    app.register_blueprint(eventstream)
    for view in (publish, burst, publish_every, time_publish, compute):
        path = "/" + view.__name__.replace("_", "-")
        app.add_url_rule(path, view_func=view, methods=["POST"])
    return app


def publish() -> tuple[str, int]:
    """Publish the body."""
    eventstream.publish(request.get_data(as_text=True), channel=CHANNEL)
    return "", 204


def burst() -> str:
    """Publish the body ``n`` times, each with its number in front; answer with the ns it took."""
    data = request.get_data(as_text=True)
    start = time.perf_counter_ns()
    for number in range(request.args.get("n", type=int)):
        eventstream.publish(f"{number}@{data}", channel=CHANNEL)
    return str(time.perf_counter_ns() - start)


def publish_every() -> tuple[str, int]:
    """Publish the body ``n`` times, ``interval`` seconds apart, with number and time in front."""
    data = request.get_data(as_text=True)
    interval = request.args.get("interval", type=float)
    start = time.monotonic()
    for number in range(request.args.get("n", type=int)):
        time.sleep(max(0.0, start + number * interval - time.monotonic()))
        eventstream.publish(f"{number}@{time.monotonic_ns()}@{data}", channel=CHANNEL)
    return "", 204


def time_publish() -> list[int]:
    """Publish the body; answer with what the call took, in ns.

    Before it comes a call for a channel that nobody reads: the wall time of that one, of which most
    is code that the CPU has to fetch again after a pause. Then the wall time of the call, and the
    thread's CPU time.
    """
    data = request.get_data(as_text=True)
    cold = time.perf_counter_ns()
    eventstream.publish(data, channel="nobody's")
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    eventstream.publish(data, channel=CHANNEL)
    return [wall - cold, time.perf_counter_ns() - wall, time.thread_time_ns() - cpu]


def compute() -> dict[str, int]:
    """Compute for some ``seconds`` without pause, as a view that does much in Python."""
    end = time.monotonic() + request.args.get("seconds", type=float)
    rounds = 0
    while time.monotonic() < end:
        rounds += sum(range(100))
    return {"rounds": rounds}
