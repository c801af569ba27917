"""One server with its subscribers, from its start to its stop, and all that is measured there."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fanout_servers import Cpu, Running, Server, running

from flask_eventstream import EventStreamParser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanout_clients import Crowd, Report

    Figures = dict[str, float]

TIMEOUT = 60.0
"""For one answer, in seconds."""
CONNECT_SECONDS = 90.0
DRAIN_SECONDS = 45.0
"""After the last event is published, what has not arrived within so long counts as lost."""
QUIET_SECONDS = 0.2
QUIET_CPU = 0.005
SETTLE_SECONDS = 5.0
WARM_UPS = 10
LISTENERS = 5
CHECKED_EVENTS = 20
LONELY_EVENTS = 50
TIMED_CALLS = 100
TIMED_SECONDS = 3.0
TIMED_PAUSE = 0.005
TIMED_PAUSE_FOR_EACH = 8e-6
"""More than it takes to reach a subscriber, so that one call's event is out before the next."""
CALM_FROM = 1_000
"""To more subscribers events are also published so slowly that deliveries/s are as to these."""
CALM_EVENTS = 8
BURST_EVENTS = 100
BURST_MOST = 1_000
"""To more subscribers a burst would fill the sockets' buffers."""
BURSTS_SECONDS = 5.0
"""After so long no new burst is begun."""
BUSY_EVENTS = 100
BUSY_MOST = 1_000


WORKS = ("steady", "burst", "publish", "busy")


class Load(NamedTuple):
    """How much is published.

    :param size: bytes of data of an event.
    :param interval: seconds between two events, which may be more than a server keeps up with.
    :param events: how many are published steadily.
    :param bursts: how many bursts there are.
    :param works: which of the works are done: some of :data:`WORKS`.
    """

    size: int
    interval: float
    events: int
    works: Sequence[str]
    bursts: int = 3


class WrongError(Exception):
    """A server does not deliver what was published."""


def measure(server: Server, subscribers: int, sets: str, load: Load, crowd: Crowd) -> Figures:
    """Return the figures of one server.

    :param sets: ``"single"`` if all subscribers read the same, ``"own"`` if each has a set of
        channels of its own.
    :raises AbsentError: if the server cannot be had.
    :raises WrongError: if it loses events where nobody is in a hurry.
    :raises CrowdError: if it does not take the subscribers.
    """
    with running(server, subscribers) as found:
        try:
            check(found, sets, load.size)
            figures = Session(found, subscribers, sets, load, crowd).measure()
        except (OSError, HTTPException) as error:
            crowd.disconnect()
            raise WrongError(f"{error!r}; {found.last_words()}") from error
        except Exception:
            crowd.disconnect()
            raise
        # Not after Ctrl-C, which the subscribers' processes may not have time for.
        crowd.disconnect()
        return figures


class Publisher:
    """A client that publishes, on one connection as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: socket.socket | None = None

    def post(self, path: str, body: str = "") -> bytes:
        """Post, and return the body of the answer."""
        self.ask(path, body)
        return self.answer()

    def ask(self, path: str, body: str = "") -> None:
        """Post, and leave the answer for later."""
        if self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self._port), TIMEOUT)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(request(path, body))

    def answer(self) -> bytes:
        """Return the body of the answer that comes next."""
        assert self._connection is not None
        response = HTTPResponse(self._connection, method="POST")
        response.begin()
        body = response.read()
        if response.will_close:
            self.close()
        if response.status >= 300:
            raise WrongError(f"a publisher got: {response.status} {response.reason}")
        return body

    def pipeline(self, path: str, bodies: Sequence[str]) -> None:
        """Post all bodies at once on one connection, and read all answers."""
        self.close()
        self._connection = socket.create_connection(("127.0.0.1", self._port), TIMEOUT)
        self._connection.sendall(b"".join(request(path, body) for body in bodies))
        answers = b""
        while answers.count(b"HTTP/1.1 2") < len(bodies):
            piece = self._connection.recv(1 << 16)
            if not piece:
                raise WrongError("a publisher's answers ended early")
            answers += piece

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def request(path: str, body: str) -> bytes:
    """Return a POST in one piece, so that a server reads it with one call."""
    data = body.encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def stamped(size: int, number: int | None = None) -> str:
    """Return data with the time of now, in nanoseconds, and with a number if one is given."""
    start = "" if number is None else f"{number}@"
    start += f"{time.monotonic_ns()}@"
    return start + "x" * max(0, size - len(start) - 1) + "~"


def unstamped(size: int) -> str:
    """Return data for who puts the number and the time in front."""
    return stamped(size, 10).partition("@")[2].partition("@")[2]


def check(found: Running, sets: str, size: int) -> None:
    """Publish a few events to a few subscribers.

    :raises WrongError: if one of them does not get all of them, whole and in order.
    """
    connections = [HTTPConnection("127.0.0.1", found.port, timeout=10) for _ in range(LISTENERS)]
    try:
        for number, connection in enumerate(connections):
            target = found.server.target(number, sets)
            connection.request("GET", target, headers={"Accept": "text/event-stream"})
        settle(found)
        expected = _publish_to_check(found, size)
        for connection in connections:
            _compare(_read_events(connection, len(expected)), expected)
    finally:
        for connection in connections:
            connection.close()


def _publish_to_check(found: Running, size: int) -> list[str]:
    expected = [stamped(size, number) for number in range(CHECKED_EVENTS)]
    body = stamped(size)
    with closing(Publisher(found.port)) as publisher:
        for data in expected:
            publisher.post("/publish", data)
        burst(found, publisher, body, CHECKED_EVENTS)
    return expected + [f"{number}@{body}" for number in range(CHECKED_EVENTS)]


def _read_events(connection: HTTPConnection, count: int) -> list[str]:
    response = connection.getresponse()
    parser = EventStreamParser()
    found: list[str] = []
    while len(found) < count and (piece := response.read1(1 << 16)):
        # Some peers know only JSON, so that text has quotes.
        found += [event.data.strip('"') for event in parser.feed(piece)]
    return found


def _compare(found: list[str], expected: list[str]) -> None:
    if found != expected:
        pairs = zip(found + [""] * len(expected), expected, strict=False)
        first = next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), "none")
        raise WrongError(f"{len(found)} of {len(expected)} events, the first wrong one is {first}")


def settle(found: Running) -> None:
    """Wait until a server has nothing more to do, for some seconds at most."""
    end = time.monotonic() + SETTLE_SECONDS
    spent = found.cpu().total
    while time.monotonic() < end:
        time.sleep(QUIET_SECONDS)
        before, spent = spent, found.cpu().total
        if spent - before < QUIET_CPU:
            return


def burst(found: Running, publisher: Publisher, body: str, count: int = BURST_EVENTS) -> bytes:
    """Publish the same many times without a pause, in the server where it can do that.

    :returns: what a server of ours answers: how many nanoseconds the calls took.
    """
    if found.server.bursts_itself:
        return publisher.post(f"/burst?n={count}", body)
    publisher.pipeline("/publish", [f"{number}@{body}" for number in range(count)])
    return b""


class Session:
    def __init__(
        self, found: Running, subscribers: int, sets: str, load: Load, crowd: Crowd
    ) -> None:
        self._found = found
        self._server = found.server
        self._subscribers = subscribers
        self._sets = sets
        self._load = load
        self._crowd = crowd

    def measure(self) -> Figures:
        figures = self._lonely()
        if self._does("publish", self._server.is_ours):
            figures |= self._timed_publish("publish_alone")
        figures |= self.connect()
        self.warm_up()
        if self._does("steady"):
            figures |= self._paces()
        if self._does("burst", self._subscribers <= BURST_MOST):
            figures |= self._bursts()
        if self._does("publish", self._server.is_ours):
            figures |= self._timed_publish("publish")
        if self._does("busy", self._server.has_threads and self._subscribers <= BUSY_MOST):
            figures |= self._busy()
        return figures

    def _does(self, work: str, can: bool = True) -> bool:
        return can and work in self._load.works

    def _lonely(self) -> Figures:
        """What it costs to publish when nobody listens: the request, mostly."""
        before = self._found.cpu()
        with closing(Publisher(self._found.port)) as publisher:
            for number in range(LONELY_EVENTS):
                publisher.post("/publish", stamped(self._load.size, number))
        spent = self._found.cpu().total - before.total
        return {"request.cpu_us": spent / LONELY_EVENTS * 1e6}

    def connect(self) -> Figures:
        targets = [self._server.target(one, self._sets) for one in range(self._subscribers)]
        # The first ones start threads, and fill pools and caches, which the others find.
        first = len(targets) // 10
        self._connect_some(targets[:first])
        cpu, memory = self._found.cpu(), self._found.memory()
        seconds = self._connect_some(targets[first:])
        rest = len(targets) - first
        return {
            "connect.cpu_us": (self._found.cpu().total - cpu.total) / rest * 1e6,
            "connect.per_second": rest / seconds,
            "memory.kb": (self._found.memory() - memory) / rest / 1024,
        }

    def _connect_some(self, targets: list[str]) -> float:
        """Connect subscribers, and return how many seconds it took."""
        start = time.monotonic()
        at_once = self._server.answers_at_once
        self._crowd.connect(self._found.port, targets, CONNECT_SECONDS, at_once)
        seconds = time.monotonic() - start
        settle(self._found)
        return seconds

    def warm_up(self) -> None:
        """Publish until an event has reached all, since a head may come before its subscription."""
        with closing(Publisher(self._found.port)) as publisher:
            for _ in range(WARM_UPS):
                self._crowd.record()
                publisher.post("/publish", stamped(self._load.size, 0))
                if self._crowd.wait(1, 3.0):
                    break
            else:
                got = self._crowd.report().received
                raise WrongError(f"{got} of {self._subscribers} subscribers got an event")
        settle(self._found)

    def _paces(self) -> Figures:
        interval, seconds = self._load.interval, self._load.interval * self._load.events
        figures = self._pace("steady", interval, self._load.events)
        if self._subscribers > CALM_FROM:
            interval *= self._subscribers / CALM_FROM
            figures |= self._pace("calm", interval, max(CALM_EVENTS, round(seconds / interval)))
        return figures

    def _pace(self, name: str, interval: float, events: int) -> Figures:
        figures = self.steady(name, interval, events)
        if self._server.is_ours:
            figures |= self.inside(f"{name}_inside", interval, events)
        return figures

    def inside(self, name: str, interval: float, events: int) -> Figures:
        """The same, published by a view that goes on and on, without a request for each event."""

        def publish() -> None:
            body = unstamped(self._load.size)
            with closing(Publisher(self._found.port)) as publisher:
                publisher.post(f"/publish-every?n={events}&interval={interval}", body)

        return self.published_by(publish, name, events)

    def published_by(self, publish: Callable[[], object], name: str, events: int) -> Figures:
        """Have so many events published by a function, which gives them number and time."""
        self._crowd.record()
        before = self._found.cpu()
        publish()
        self._crowd.wait(events, DRAIN_SECONDS)
        return self._deliveries(name, before, events)

    def steady(self, name: str, interval: float, events: int) -> Figures:
        self._crowd.record()
        before = self._found.cpu()
        start = time.monotonic()
        published = self._publish_steadily(start, interval, events)
        seconds = time.monotonic() - start
        self._crowd.wait(published, DRAIN_SECONDS)
        figures = self._deliveries(name, before, published)
        return figures | {f"{name}.published_every_ms": seconds / published * 1e3}

    def _publish_steadily(self, start: float, interval: float, events: int) -> int:
        """Publish, and return how many events it was; a server that is late gets fewer of them."""
        end = start + 2 * events * interval + 2
        with closing(Publisher(self._found.port)) as publisher:
            for number in range(events):
                time.sleep(max(0.0, start + number * interval - time.monotonic()))
                if time.monotonic() > end:
                    return number
                publisher.post("/publish", stamped(self._load.size, number))
        # The pause after the last one belongs to it.
        time.sleep(max(0.0, start + events * interval - time.monotonic()))
        return events

    def _bursts(self) -> Figures:
        end = time.monotonic() + BURSTS_SECONDS
        found = [self._burst()]
        while len(found) < self._load.bursts and time.monotonic() < end:
            found.append(self._burst())
        # Of the counts the sum is wanted, of the rest the middle.
        return {
            name: (sum if name.endswith((".lost", ".out_of_order")) else median)(
                figures[name] for figures in found
            )
            for name in found[0]
        }

    def _burst(self) -> Figures:
        self._crowd.record()
        before = self._found.cpu()
        with closing(Publisher(self._found.port)) as publisher:
            taken = burst(self._found, publisher, stamped(self._load.size))
        self._crowd.wait(BURST_EVENTS, DRAIN_SECONDS)
        figures = self._deliveries("burst", before, BURST_EVENTS)
        if self._server.is_ours:
            figures["publish.in_a_burst_us"] = int(taken) / BURST_EVENTS / 1e3
        return figures

    def _deliveries(self, name: str, before: Cpu, published: int) -> Figures:
        # It may still be busy after its last byte has arrived.
        time.sleep(QUIET_SECONDS / 4)
        after = self._found.cpu()
        report = self._crowd.report()
        if not report.received:
            raise WrongError(f"nothing arrived; {self._found.last_words()}")
        figures = {
            "cpu_us": (after.total - before.total) / report.received * 1e6,
            "helpers_us": (after.helpers - before.helpers) / report.received * 1e6,
            "user_us": (after.user - before.user) / report.received * 1e6,
            "system_us": (after.system - before.system) / report.received * 1e6,
            "received": float(report.received),
            "lost": float(published * self._subscribers - report.received),
            "out_of_order": float(report.out_of_order),
            "ended": float(report.ended),
            "thousand_per_second": _thousand_per_second(report),
            **percentiles([ns / 1e6 for ns in report.latencies], "ms"),
            **percentiles(_reach(report), "reach_ms"),
        }
        return {f"{name}.{key}": figure for key, figure in figures.items()}

    def _timed_publish(self, name: str) -> Figures:
        """Let a view time its calls of publish(), when the event before is out."""
        calls: list[list[int]] = []
        # As far apart if nobody listens, or a cold cache would be taken for the subscribers' price.
        pause = TIMED_PAUSE + TIMED_PAUSE_FOR_EACH * self._subscribers
        end = time.monotonic() + TIMED_SECONDS
        with closing(Publisher(self._found.port)) as publisher:
            while len(calls) < TIMED_CALLS and time.monotonic() < end:
                time.sleep(pause)
                calls.append(
                    json.loads(publisher.post("/time-publish", stamped(self._load.size, 0)))
                )
        settle(self._found)
        figures = {}
        for unit, values in zip(
            ("cold_us", "wall_us", "cpu_us"), zip(*calls, strict=True), strict=True
        ):
            figures |= percentiles([ns / 1e3 for ns in values], unit)
        return {f"{name}.{key}": figure for key, figure in figures.items()}

    def _busy(self) -> Figures:
        interval = self._load.interval
        seconds = BUSY_EVENTS * interval
        self._crowd.record()
        before = self._found.cpu()
        computing, publisher = Publisher(self._found.port), Publisher(self._found.port)
        with closing(computing), closing(publisher):
            computing.ask(f"/compute?seconds={seconds + 1}")
            path = f"/publish-every?n={BUSY_EVENTS}&interval={interval}"
            publisher.post(path, stamped(self._load.size).partition("@")[2])
            self._crowd.wait(BUSY_EVENTS, DRAIN_SECONDS)
            figures = self._deliveries("busy", before, BUSY_EVENTS)
            computing.answer()
        # Its CPU time is that of the computing.
        return {name: figure for name, figure in figures.items() if "_us" not in name}


def _thousand_per_second(report: Report) -> float:
    first = min(published for published, _ in report.reached.values())
    last = max(last for _, last in report.reached.values())
    return report.received / ((last - first) / 1e6)


def _reach(report: Report) -> list[float]:
    """Return the milliseconds that each event took to reach the last of its subscribers."""
    return [(last - published) / 1e6 for published, last in report.reached.values()]


def percentiles(values: Sequence[float], unit: str) -> Figures:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"p50_{unit}": ordered[round(last * 0.5)],
        f"p99_{unit}": ordered[round(last * 0.99)],
        f"max_{unit}": ordered[last],
    }
