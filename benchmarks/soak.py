"""A soak: subscribers that come, go and lag for minutes or hours, while Redis is cut now and then.

gunicorn serves ``soak_app.py`` with two processes and a Redis of their own. The subscribers are in
another process (``soak_clients.py``):

* 70 % stay, and return with their cursor once a minute, a few when what they missed is gone;
* 20 % pass, and others come in their place, some of whom leave before their request is complete;
* 6 % read a small piece at a time;
* 4 % stand still until they are cut off.

They leave politely or rudely. Each reads a channel of its group and one that all read. Each channel
has a publisher that numbers its events and repeats what was refused. Connections to Redis are
killed every ten seconds, and Redis stands still for three seconds in each minute.

It fails, with the exit status 1,

* if a client got an event twice, not at all or out of order, or a ``reset`` though nothing was
  gone;
* if a worker ended;
* if something grew: the median of all samples in the last quarter of the time, compared with that
  of the second quarter, may be higher by no more than the table says, for both workers together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.measuring import print_columns, print_machine, raise_descriptor_limit
from benchmarks.soak_clients import GROUPS, SHARED
from flask_eventstream.redis_broker import RedisBroker
from tests import faults
from tests.redis_server import RedisServer, redis_server
from tests.servers import Server, serving, wait_for
from tests.stress import UNTRACED, cpu_seconds, memory_mib, workers

if TYPE_CHECKING:
    from collections.abc import Mapping

    Figures = dict[str, float]

PROCESSES = 2
SAMPLE_EVERY, TELL_EVERY, KILL_EVERY, FREEZE_EVERY = 5, 30, 10, 60
"""Seconds."""
FROZEN_SECONDS = 3
SHARED_PAUSE, GROUP_PAUSE = 0.25, 0.5
"""Seconds between two events of a channel."""
MOST_PADDING = 1000
KILLED = ("normal", "pubsub")
DISTRIBUTIONS = ("flask-eventstream", "flask", "gunicorn", "gevent", "redis")
PATIENCE = 30.0


class Bound(NamedTuple):
    """How much something may grow: so much, or such a share of what it was, if that is more."""

    much: float
    share: float = 0.0


BOUNDS = {
    "memory, MiB": Bound(8, 0.1),
    "blocks of Python's memory": Bound(20_000, 0.05),
    # Less than one for each subscriber. Requests are in flight, and of their connections to Redis
    # each process has at most eight.
    "descriptors, without subscribers": Bound(PROCESSES * 8),
    # gevent looks names up in a pool of threads, which grows when several are looked up at once.
    "threads": Bound(PROCESSES * 4),
    "greenlets": Bound(PROCESSES * 8),
}


class Crowd(faults.Crowd):
    """The subscribers, in a process of their own."""

    program = "benchmarks.soak_clients"


class Publisher(faults.Publisher):
    """Publishes the numbered events of a channel."""

    def __init__(self, broker: RedisBroker, channel: str, pause: float) -> None:
        self.channel = channel
        self._chance = random.Random(channel)
        super().__init__(broker, pause)

    def _publish(self) -> None:
        padding = "x" * self._chance.randrange(MOST_PADDING)
        self._broker.publish(f"{self.channel} {self.accepted} {padding}", channel=self.channel)


class Soak:
    """A server with its Redis and its subscribers, what is done to them, and what is seen.

    :ivar cut: how often what was done to Redis.
    :ivar samples: what the workers held, each time they were looked at.
    """

    def __init__(self, redis: RedisServer, server: Server, subscribers: int) -> None:
        self._redis = redis
        self._server = server
        self._pids = self._workers()
        self._broker = RedisBroker(redis.url)
        self.crowd = Crowd(server.port, subscribers)
        groups = {f"group:{number}": GROUP_PAUSE for number in range(GROUPS)}
        pauses = {SHARED: SHARED_PAUSE, **groups}
        self.publishers = [Publisher(self._broker, *each) for each in pauses.items()]
        self.cut = {"connections killed": 0, "stood still": 0}
        self.samples: list[Figures] = []

    def _workers(self) -> list[int]:
        return wait_for(lambda: len(pids := workers(self._server)) == PROCESSES and pids)

    def run(self, seconds: float) -> None:
        """Soak for some seconds, from the moment on that all are connected."""
        begin, second = time.monotonic(), 0
        self._begin_cpu = self._cpu()
        while second < seconds:
            second += 1
            time.sleep(max(0.0, begin + second - time.monotonic()))
            if second % FREEZE_EVERY == FREEZE_EVERY // 2:
                self._freeze()
            elif second % KILL_EVERY == 0:
                self._kill()
            if second % SAMPLE_EVERY == 0:
                self._sample()
            if second % TELL_EVERY == 0:
                _tell(f"{second:6} s", self.samples[-1], self.crowd.figures({}))
        self._end_cpu = self._cpu()
        self._seconds = time.monotonic() - begin

    def _kill(self) -> None:
        kind = KILLED[self.cut["connections killed"] % len(KILLED)]
        self._redis.redis.client_kill_filter(_type=kind, skipme=True)
        self.cut["connections killed"] += 1

    def _freeze(self) -> None:
        self._redis.freeze()
        time.sleep(FROZEN_SECONDS)
        self._redis.thaw()
        self.cut["stood still"] += 1

    def _sample(self) -> None:
        vitals = self._vitals()
        found = {name: sum(one[name] for one in vitals) for name in vitals[0]}
        self.samples.append(
            {
                "subscribers": found["subscribers"],
                "memory, MiB": sum(memory_mib(pid) for pid in self._pids),
                "blocks of Python's memory": found["blocks"],
                "descriptors, without subscribers": found["descriptors"] - found["subscribers"],
                "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self._pids),
                "greenlets": found["greenlets"],
            }
        )

    def _vitals(self) -> list[Figures]:
        """Ask until each worker has answered: nobody can choose who does."""
        found: dict[float, Figures] = {}
        wait_for(lambda: found.update(self._ask()) or len(found) == PROCESSES, PATIENCE)
        return list(found.values())

    def _ask(self) -> dict[float, Figures]:
        try:
            with urllib.request.urlopen(f"{self._server.url}/vitals", timeout=PATIENCE) as answer:
                vitals: Figures = json.load(answer)
        except urllib.error.HTTPError:
            # It asks Redis too, whose connection may be cut.
            return {}
        return {vitals["pid"]: vitals}

    def _cpu(self) -> Figures:
        return {
            "the server": sum(cpu_seconds(pid) for pid in self._pids),
            "the subscribers": cpu_seconds(self.crowd.pid),
            "Redis": cpu_seconds(self._redis.process.pid),
            "the publishers": time.process_time(),
        }

    def cpu(self) -> Figures:
        """Return how much of a core each took."""
        return {
            name: (self._end_cpu[name] - begin) / self._seconds
            for name, begin in self._begin_cpu.items()
        }

    def end(self) -> dict[str, Any]:
        """Publish no more, and return what the subscribers got once they have got all."""
        figures = self.crowd.figures({one.channel: one.stop() for one in self.publishers})
        if self._workers() != self._pids:
            figures["faults"] = figures.get("faults", 0) + 1
            figures["examples"].append("a worker ended, and another one took its place")
        return figures

    def close(self) -> None:
        self.crowd.close()
        for one in self.publishers:
            one.stop()
        self._broker.close()


class Growth(NamedTuple):
    """How something was in the second and in the last quarter, and how much it may have grown."""

    before: float
    after: float
    allowed: float

    @property
    def is_met(self) -> bool:
        return self.after - self.before <= self.allowed


def growth(samples: list[Figures], name: str, bound: Bound) -> Growth:
    """Compare the medians of two quarters of all samples."""
    quarter = len(samples) // 4
    before = median(one[name] for one in samples[quarter : 2 * quarter])
    after = median(one[name] for one in samples[-quarter:])
    return Growth(before, after, max(bound.much, bound.share * before))


def _tell(begin: str, *figures: Mapping[str, Any]) -> None:
    found = [f"{name} {value:,.0f}" for each in figures for name, value in each.items()
             if not isinstance(value, list)]  # fmt: skip
    print(f"{begin}: {', '.join(found)}", file=sys.stderr, flush=True)


def print_counts(counts: Mapping[str, float]) -> None:
    """Print what happened how often."""
    print()
    print_columns([["", "times"], *([name, f"{number:,}"] for name, number in counts.items())])


def print_growths(growths: Mapping[str, Growth]) -> None:
    """Print what grew."""
    rows = [
        [name, *(f"{number:,.1f}" for number in (*one, one.after - one.before)),
         "met" if one.is_met else "MISSED"]
        for name, one in growths.items()
    ]  # fmt: skip
    print()
    print_columns([["", "second quarter", "last quarter", "may grow by", "grew by", ""], *rows])


def counts_of(soak: Soak, figures: dict[str, Any]) -> dict[str, float]:
    """Return what happened how often, in the order in which it is read."""
    publishers = soak.publishers
    names = (
        "deliveries", "connections", "returns", "resets", "left politely", "left rudely",
        "left in mid-head", "stood still", "slow ones cut", "ended by the server", "not connected",
    )  # fmt: skip
    return {
        "events published": sum(one.accepted for one in publishers),
        "publishing refused": sum(one.refusals for one in publishers),
        **{name: figures.get(name, 0) for name in names},
        **{f"Redis: {name}": number for name, number in soak.cut.items()},
        "faults": figures.get("faults", 0),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Let many subscribers come and go for long.")
    parser.add_argument("--minutes", type=float, default=10, help="10 by default")
    parser.add_argument("--subscribers", type=int, default=2000, help="2,000 by default")
    parser.add_argument("--worker", choices=("gevent", "gthread"), default="gevent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main() -> bool:
    """Soak, and tell whether all is well."""
    options = _options()
    raise_descriptor_limit()
    machine = print_machine(DISTRIBUTIONS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        redis = stack.enter_context(redis_server(folder))
        environ = {**UNTRACED, "REDIS_URL": redis.url}
        threads = ["--threads=32"] if options.worker == "gthread" else []
        arguments = (f"--workers={PROCESSES}", *threads)
        app = "benchmarks.soak_app:create_app()"
        server = stack.enter_context(serving(app, options.worker, *arguments, environ=environ))
        soak = stack.enter_context(closing(Soak(redis, server, options.subscribers)))
        soak.run(options.minutes * 60)
        figures = soak.end()
    growths = {name: growth(soak.samples, name, bound) for name, bound in BOUNDS.items()}
    counts = counts_of(soak, figures)
    print_counts(counts)
    print_growths(growths)
    print("\nOf a core:", ", ".join(f"{name} {share:.0%}" for name, share in soak.cpu().items()))
    print(*figures["examples"], sep="\n")
    if options.json:
        found = {name: one._asdict() for name, one in growths.items()}
        data = {"machine": machine, "options": {**vars(options), "json": None}, "counts": counts}
        data |= {"growth": found, "cpu": soak.cpu(), "faults": figures["examples"]}
        options.json.write_text(json.dumps(data | {"samples": soak.samples}, indent=2) + "\n")
    return counts["faults"] == 0 and all(one.is_met for one in growths.values())


if __name__ == "__main__":
    sys.exit(not main())
