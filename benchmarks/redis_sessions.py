"""The rounds of ``redis_broker.py``: servers that hold subscribers side by side, and take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from fanout_clients import Crowd, CrowdError
from fanout_servers import PEERS, AbsentError, Running, Server, flask_sse, gunicorn_ours, running
from fanout_session import Session, WrongError, check, unstamped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from fanout_session import Load

    Figures = dict[str, float]
    Act = Callable[[], Figures]

LAPS = 3
"""How often our servers of a round take turns. The peer, far from any bar, has one turn."""
MEMORY, INSIDE, OUTSIDE = "MemoryBroker", "RedisBroker", "RedisBroker, from outside"
FLASK_SSE = "Flask-SSE"
WORKERS = ("gevent", "gthread")
LAP = "lap"
"""What the names of a lap's figures begin with."""
UNABLE = (
    AbsentError,
    CrowdError,
    WrongError,
    OSError,
    HTTPException,
    subprocess.SubprocessError,
)


class Lap(NamedTuple):
    """What a server did in one lap.

    :param number: counts the laps of all rounds.
    :param figures: those of ``fanout_session.py``, and ``redis_us``: the CPU time of Redis for a
        delivery.
    """

    worker: str
    case: str
    number: int
    figures: Figures


class Found:
    """What all rounds found.

    :ivar connections: for each worker and each kind of server, those at Redis of each round.
    :ivar absent: who could not take part, and why.
    """

    def __init__(self) -> None:
        self.laps: list[Lap] = []
        self.connections: dict[tuple[str, str], list[int]] = {}
        self.absent: dict[str, str] = {}

    def figures(self, worker: str, case: str, key: str) -> dict[int, float]:
        """Return a figure of all laps, by their numbers."""
        laps = (lap for lap in self.laps if (lap.worker, lap.case) == (worker, case))
        return {lap.number: lap.figures[f"{LAP}.{key}"] for lap in laps}

    def pairs(self, worker: str, case: str) -> list[tuple[float, float]]:
        """Return the CPU time of a delivery beside that of the broker in memory, of each lap."""
        own, memory = (self.figures(worker, name, "cpu_us") for name in (case, MEMORY))
        return [(own[number], memory[number]) for number in own.keys() & memory.keys()]


class Rounds:
    """Takes all rounds.

    :param redis_running: the Redis server of all.
    """

    def __init__(self, redis_running: Running, options: argparse.Namespace, load: Load) -> None:
        self.url = f"redis://127.0.0.1:{redis_running.port}/0"
        self.found = Found()
        self._redis = redis_running
        self._client = redis.Redis.from_url(self.url)
        self._options = options
        self._load = load

    def take(self) -> None:
        """Take them."""
        for number in range(self._options.rounds):
            for worker in WORKERS:
                self._take_one(worker, number * LAPS)
                _tell(f"round {number + 1}: {worker}")

    def _take_one(self, worker: str, first: int) -> None:
        with ExitStack() as stack:
            acts: dict[str, Act] = {}
            for name, server in self._servers(worker).items():
                session = self._entered(stack, worker, name, server)
                acts |= self._acts(name, session) if session else {}
            for number in range(first, first + LAPS):
                for case, act in acts.items():
                    if case != FLASK_SSE or number == first:
                        self._take_lap(worker, case, number, act)

    def _servers(self, worker: str) -> dict[str, Server]:
        ours = gunicorn_ours(worker)._replace(is_ours=True)
        with_redis = gunicorn_ours(worker, broker_url=self.url)._replace(is_ours=True)
        # It has a greenlet and a connection for each subscriber, for which nobody has threads.
        peers = {FLASK_SSE: flask_sse(self.url)} if worker == "gevent" else {}
        return {MEMORY: ours, INSIDE: with_redis, **peers}

    def _entered(self, stack: ExitStack, worker: str, name: str, server: Server) -> Session | None:
        before = len(self._client.client_list())
        try:
            session = stack.enter_context(self._connected(server))
        except UNABLE as error:
            self._note_absence(worker, name, error)
            return None
        connections = len(self._client.client_list()) - before
        self.found.connections.setdefault((worker, name), []).append(connections)
        return session

    @contextmanager
    def _connected(self, server: Server) -> Iterator[Session]:
        subscribers = self._options.subscribers
        with running(server, subscribers) as found, closing(Crowd(1)) as crowd:
            check(found, "single", self._load.size)
            session = Session(found, subscribers, "single", self._load, crowd)
            session.connect()
            session.warm_up()
            yield session

    def _acts(self, name: str, session: Session) -> dict[str, Act]:
        load = self._load
        if name == FLASK_SSE:
            return {name: partial(session.steady, LAP, load.interval, load.events)}
        acts: dict[str, Act] = {name: partial(session.inside, LAP, load.interval, load.events)}
        if name == INSIDE:
            acts[OUTSIDE] = partial(session.published_by, self._publish, LAP, load.events)
        return acts

    def _publish(self) -> None:
        load = self._load
        publish(
            "publish-every", self.url, str(load.events), str(load.interval), unstamped(load.size)
        )

    def _take_lap(self, worker: str, case: str, number: int, act: Act) -> None:
        before = self._redis.cpu().total
        try:
            figures = act()
        except UNABLE as error:
            self._note_absence(worker, case, error)
            return
        spent = self._redis.cpu().total - before
        figures[f"{LAP}.redis_us"] = spent / figures[f"{LAP}.received"] * 1e6
        self.found.laps.append(Lap(worker, case, number, figures))

    def _note_absence(self, worker: str, name: str, error: Exception) -> None:
        self.found.absent[f"{name}, {worker}"] = str(error)
        _tell(f"{name}, {worker}: {error}")


def publish(work: str, *arguments: str) -> Any:
    """Have another process publish, without an app that serves, and return what it found."""
    command = [sys.executable, "redis_publishers.py", work, *arguments]
    done = subprocess.run(command, cwd=PEERS, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _tell(words: str) -> None:
    print(f"  {words}", file=sys.stderr, flush=True)
