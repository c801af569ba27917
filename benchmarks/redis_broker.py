"""The broker in Redis: what it costs beside the broker in memory, and beside Flask-SSE.

``python benchmarks/redis_broker.py`` starts a Redis server of its own, on a free port of loopback,
and stops it. It needs ``redis-server``, gunicorn, gevent and Flask-SSE. Measured are

* *CPU time for a delivery*: what the processes of the app spend, user and system, divided by the
  events that subscribers got; the work is that of the steady pace of ``fanout.py``. The events are
  published inside of the app by its MemoryBroker and by its RedisBroker; by a RedisBroker of
  another process that has no app; and by requests to Flask-SSE. What Redis itself spends has a
  column of its own.
* *Connections* that Redis has for that.
* *One call* of ``publish()``, with a pause before it, in a script. *Heard* is a broker whose events
  a subscriber in the same process reads. The limit is redis-py's ``PUBLISH``, which keeps nothing
  for those who return.
* *Events per second* of one publisher that does nothing else, and the CPU time of an event.

The servers of a round hold their subscribers at the same time and take turns to deliver. Each round
has new processes. Ratios are those of one lap, and what is told is the median of the laps. On a
busy machine CPU times and their ratios are the figures to trust.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fanout_report import Bar, print_bars
from fanout_servers import program_versions, redis_server, running
from fanout_session import Load, percentiles
from measuring import print_columns, print_machine, raise_descriptor_limit
from redis_sessions import FLASK_SSE, INSIDE, MEMORY, OUTSIDE, WORKERS, Found, Rounds, publish

if TYPE_CHECKING:
    from collections.abc import Sequence

DISTRIBUTIONS = ("flask-eventstream", "gunicorn", "gevent", "redis", "flask-sse")
BAR = 1.1
INTERVAL = 0.05
SIZE = 100
CALLS = 200
"""Of each way to publish in each round."""
RATE_SECONDS = 0.3
LAP_FORMATS = {
    "cpu_us": "{:,.2f}",
    "system_us": "{:,.2f}",
    "redis_us": "{:,.2f}",
    "p50_ms": "{:,.1f}",
    "p99_ms": "{:,.1f}",
    "lost": "{:,.0f}",
}
CALL_NAMES = {
    "PUBLISH": "redis-py: PUBLISH",
    "alone": "RedisBroker, not heard here",
    "heard": "RedisBroker, heard",
    "Flask-SSE": "Flask-SSE",
}
RATE_NAMES = {
    "PUBLISH": "redis-py: PUBLISH",
    "pipeline": "redis-py: PUBLISH, pipeline of 100",
    "publish": "RedisBroker.publish",
    "publish_many": "RedisBroker.publish_many of 100",
    "Flask-SSE": "Flask-SSE",
}


def main() -> None:
    """Measure, and tell."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    raise_descriptor_limit()
    machine = print_machine(DISTRIBUTIONS)
    print(f"redis-server {program_versions().get('redis-server', 'not found')}")
    with running(redis_server(), options.subscribers) as redis:
        rounds = Rounds(redis, options, _load(options))
        rounds.take()
        calls, rates = (_published(rounds.url, work, options) for work in ("calls", "rates"))
    bars = tell(rounds.found, calls, rates, options.subscribers)
    if options.json:
        _write_json(options.json, machine, rounds.found, rates, bars)


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Compare what the broker in Redis costs.")
    add = parser.add_argument
    add("--rounds", type=int, default=4, help="with new processes, 4 by default")
    add("--seconds", type=float, default=1.5, help="of a lap, 1.5 by default")
    add("--subscribers", type=int, default=1_000, help="of each server, 1,000 by default")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def _load(options: argparse.Namespace) -> Load:
    return Load(SIZE, INTERVAL, max(1, round(options.seconds / INTERVAL)), works=())


def _published(url: str, work: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    amount = {"calls": str(CALLS), "rates": str(RATE_SECONDS)}[work]
    found: list[dict[str, Any]] = publish(work, url, str(options.rounds), amount, "x" * SIZE)
    return found


def tell(
    found: Found,
    calls: Sequence[dict[str, list[tuple[int, int]]]],
    rates: Sequence[dict[str, dict[str, float]]],
    subscribers: int,
) -> list[Bar]:
    """Print the tables and the bars, and return the bars."""
    _print_deliveries(found, subscribers)
    _print_connections(found, subscribers)
    _print_calls(calls)
    _print_rates(rates)
    for name, reason in found.absent.items():
        print(f"\nAbsent: {name}: {reason}")
    bars = _judge(found)
    print_bars(bars)
    return bars


def _print_deliveries(found: Found, subscribers: int) -> None:
    print(f"\n{subscribers:,} subscribers, one event each {INTERVAL * 1e3:.0f} ms: a delivery\n")
    heads = ["CPU us", "x memory", "lowest", "highest", "us more for an event", "system us"]
    lines = [["", *heads, "Redis CPU us", "p50 ms", "p99 ms", "lost"]]
    for worker in WORKERS:
        for case in (MEMORY, INSIDE, OUTSIDE, FLASK_SSE):
            if found.figures(worker, case, "cpu_us"):
                label = f"{worker}: {case}"
                lines.append([label, *_delivery_cells(found, worker, case, subscribers)])
    print_columns(lines)


def _delivery_cells(found: Found, worker: str, case: str, subscribers: int) -> list[str]:
    first, *rest = [
        form.format(median(found.figures(worker, case, key).values()))
        for key, form in LAP_FORMATS.items()
    ]
    ratios = _ratios(found, worker, case)
    if case == MEMORY or not ratios:
        return [first, *["-"] * 4, *rest]
    numbers = [f"{number:.2f}" for number in (median(ratios), min(ratios), max(ratios))]
    more = median(own - memory for own, memory in found.pairs(worker, case)) * subscribers
    return [first, *numbers, f"{more:,.0f}", *rest]


def _ratios(found: Found, worker: str, case: str) -> list[float]:
    return [own / memory for own, memory in found.pairs(worker, case)]


def _print_connections(found: Found, subscribers: int) -> None:
    print(f"\n{subscribers:,} subscribers: connections at Redis\n")
    lines = [["", "connections"]]
    for (worker, name), counts in found.connections.items():
        lines.append([f"{worker}: {name}", f"{median(counts):,.0f}"])
    print_columns(lines)


def _print_calls(rounds: Sequence[dict[str, list[tuple[int, int]]]]) -> None:
    print("\nOne call of publish() for its caller [us]\n")
    lines = [["", "CPU p50", "x PUBLISH", "p50", "p99"]]
    limit = _call_figures(rounds, "PUBLISH")
    for way, label in CALL_NAMES.items():
        cpu, wall, slow = _call_figures(rounds, way)
        ratio = f"{cpu / limit[0]:.2f}"
        lines.append([label, f"{cpu:,.0f}", ratio, f"{wall:,.0f}", f"{slow:,.0f}"])
    print_columns(lines)


def _call_figures(
    rounds: Sequence[dict[str, list[tuple[int, int]]]], way: str
) -> tuple[float, float, float]:
    """Return the medians of the rounds' CPU time at p50, and of their wall time at p50 and p99."""
    found = []
    for ways in rounds:
        walls, cpus = ([ns / 1e3 for ns in column] for column in zip(*ways[way], strict=True))
        wall = percentiles(walls, "us")
        found.append((median(cpus), wall["p50_us"], wall["p99_us"]))
    cpu, fast, slow = (median(column) for column in zip(*found, strict=True))
    return cpu, fast, slow


def _print_rates(rounds: Sequence[dict[str, dict[str, float]]]) -> None:
    print("\nOne publisher that does nothing else: CPU time of an event, events per second\n")
    lines = [["", "CPU us", "Redis CPU us", "events/s", "x PUBLISH"]]
    for way, label in RATE_NAMES.items():
        own, redis, rate = (
            median(ways[way][key] for ways in rounds) for key in ("us", "redis_us", "per_second")
        )
        ratio = median(ways[way]["per_second"] / ways["PUBLISH"]["per_second"] for ways in rounds)
        lines.append([label, f"{own:,.0f}", f"{redis:,.0f}", f"{rate:,.0f}", f"{ratio:.2f}"])
    print_columns(lines)


def _judge(found: Found) -> list[Bar]:
    return [
        Bar(f"{worker}, {case}: CPU of a delivery", BAR, "x MemoryBroker", False, median(ratios))
        for worker in WORKERS
        for case in (INSIDE, OUTSIDE)
        if (ratios := _ratios(found, worker, case))
    ]


def _write_json(
    path: Path,
    machine: dict[str, Any],
    found: Found,
    rates: Sequence[dict[str, dict[str, float]]],
    bars: Sequence[Bar],
) -> None:
    data = {
        "machine": machine,
        "laps": [lap._asdict() for lap in found.laps],
        "connections": {", ".join(key): counts for key, counts in found.connections.items()},
        "rates": rates,
        "bars": [{**bar._asdict(), "met": bar.is_met} for bar in bars],
        "absent": found.absent,
    }
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
