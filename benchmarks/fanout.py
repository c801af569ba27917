"""Delivering what is published to many subscribers: what it costs, and how long it takes.

Each server is started with one worker process and holds 1,000 or 10,000 subscribers on real sockets
of loopback, which other processes read (``fanout_clients.py``). Measured are

* *CPU time for a delivery*: what all processes of the server spend, user and system, divided by the
  events that subscribers got. The request that publishes is in it; its own column says what it
  costs when nobody listens. On a busy machine this is the figure to trust, and its ratio to the C
  loop, which is the limit, in the same round.
* *Latency*: from the moment before the publisher's request to the subscriber's read.
* *Memory*: what the processes have more when idle subscribers are connected, shared pages counted
  once, divided by their number. Socket buffers are the kernel's, and not in it.
* *A burst*: 100 events back to back, published inside of the server in one request. nchan, which
  cannot do that, gets 100 pipelined requests.
* *Beside a computing request*: a thread of the server computes in Python without pause, another one
  publishes; the time is from the call of ``publish()`` until the last subscriber is reached.
* *publish() for its caller*: wall and CPU time of a call inside of the server, made by a view that
  has slept since the event before, with a cold cache; and of the calls of a burst.
* *Own channels*: each subscriber reads the shared channel, and one more that nobody else reads.

The servers take turns, so that a noisy moment hits all. Before each measurement a few subscribers
must get what was published whole and in order, and in each of them events are counted and compared.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fanout_clients import Crowd, CrowdError
from fanout_report import Results, Run, judge, print_bars, print_tables, write_json, write_svg
from fanout_servers import LIMIT, AbsentError, Server, program_versions, servers
from fanout_session import WORKS, Load, WrongError, measure
from measuring import print_machine, raise_descriptor_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

DISTRIBUTIONS = (
    "flask-eventstream", "flask", "werkzeug", "gunicorn", "gevent", "uvicorn", "uvloop",
    "httptools", "starlette", "sse-starlette", "fastapi", "flask-sse", "redis",
)  # fmt: skip
FEW = 1_000
DEFAULT_SERVERS = [
    LIMIT, "gunicorn-gevent", "gunicorn-gthread", "gunicorn-sync", "gunicorn-gevent:iterator",
    "nchan", "Node http", "Starlette", "sse-starlette",
]  # fmt: skip
DEFAULT_SERVERS_OF_MANY = [LIMIT, "gunicorn-gevent", "gunicorn-gthread", "gunicorn-sync", "nchan"]
"""Of more than 1,000 subscribers."""
DEFAULT_OWN_CHANNELS = ["gunicorn-gevent"]
DEFAULT_ROUNDS = 2
"""The second one without more than 1,000 subscribers, if the number was not asked for."""
BUDGET_SECONDS = 300.0
"""After so long no second round is begun, if the number was not asked for."""
RESERVED_DESCRIPTORS = 200


class Turn(NamedTuple):
    """A server, and what it is to do."""

    server: Server
    subscribers: int
    sets: str

    def __str__(self) -> str:
        own = ", own channels" if self.sets == "own" else ""
        return f"{self.server.name}, {self.subscribers:,}{own}"


def main() -> None:
    """Measure, and tell."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    machine = print_machine(DISTRIBUTIONS)
    absent: dict[str, str] = {}
    most = raise_descriptor_limit() - RESERVED_DESCRIPTORS
    for size in [size for size in options.subscribers if size > most]:
        absent[f"{size:,} subscribers"] = f"the system allows {most:,} for each process"
        options.subscribers.remove(size)
    results = Results([])
    with closing(Crowd(options.clients)) as crowd, suppress(KeyboardInterrupt):
        # What was measured until then is told.
        for run in _take_rounds(options, crowd, absent):
            results.runs.append(run)
    machine["programs"] = program_versions()
    print("\n" + ", ".join(f"{name} {version}" for name, version in machine["programs"].items()))
    print_tables(results)
    for name, reason in absent.items():
        print(f"\nAbsent: {name}: {reason}")
    bars = judge(results)
    print_bars(bars)
    shown = {name: str(value) for name, value in vars(options).items()}
    write_json(options.json, machine, shown, results, bars, absent)
    write_svg(options.svg, results)


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Compare what delivering to subscribers costs.")
    add = parser.add_argument
    add("--subscribers", type=_numbers, default=[1_000, 10_000], metavar="N[,N...]")
    add("--server", type=_names, metavar="NAME[,NAME...]", help="or all; a wrong name lists them")
    add("--sets", choices=["single", "own"], help="channels that subscribers of ours read")
    add("--work", type=_works, default=WORKS, metavar="NAME[,NAME...]", help=", ".join(WORKS))
    add("--seconds", type=float, default=3.0, help="of the steady pace, 3 by default")
    add("--events", type=int, help="of the steady pace, instead of --seconds")
    add("--interval", type=float, default=0.05, help="seconds between two events, 0.05 by default")
    add("--size", type=int, default=100, help="bytes of an event's data, 100 by default")
    add("--clients", type=int, default=_client_processes(), help="processes of subscribers")
    add("--rounds", type=int, help=f"turns, {DEFAULT_ROUNDS} by default")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--svg", type=Path, metavar="FILE", help="draw plots there (needs matplotlib)")
    options = parser.parse_args()
    if options.svg and find_spec("matplotlib") is None:
        parser.error("--svg needs matplotlib")
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _names(text: str) -> list[str]:
    known = list(servers())
    names = known if text == "all" else text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of: {', '.join(known)}")
    return names


def _works(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in WORKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of: {', '.join(WORKS)}")
    return text.split(",")


def _client_processes() -> int:
    # The server has a core for itself.
    return max(1, min(4, (os.cpu_count() or 1) - 1))


def _take_rounds(
    options: argparse.Namespace, crowd: Crowd, absent: dict[str, str]
) -> Iterator[Run]:
    end = time.monotonic() + BUDGET_SECONDS
    for number in range(options.rounds or DEFAULT_ROUNDS):
        is_short = number > 0 and options.rounds is None
        if is_short and time.monotonic() > end:
            break
        for turn in _turns(options):
            if str(turn) not in absent and not (is_short and turn.subscribers > FEW):
                yield from _take_turn(turn, number, options, crowd, absent)


def _turns(options: argparse.Namespace) -> Iterator[Turn]:
    known = servers()
    for subscribers in options.subscribers:
        default = DEFAULT_SERVERS if subscribers <= FEW else DEFAULT_SERVERS_OF_MANY
        for name in options.server or default:
            server = known[name]
            if subscribers <= server.most:
                for sets in _sets(options, server):
                    yield Turn(server, subscribers, sets)


def _sets(options: argparse.Namespace, server: Server) -> list[str]:
    if options.sets:
        return [options.sets] if server.is_ours or options.sets == "single" else []
    return ["single", "own"] if server.name in DEFAULT_OWN_CHANNELS else ["single"]


def _take_turn(
    turn: Turn, number: int, options: argparse.Namespace, crowd: Crowd, absent: dict[str, str]
) -> Iterator[Run]:
    events = options.events or max(1, round(options.seconds / options.interval))
    load = Load(options.size, options.interval, events, options.work)
    start = time.monotonic()
    try:
        figures = measure(turn.server, turn.subscribers, turn.sets, load, crowd)
        yield Run(turn.server.name, turn.subscribers, turn.sets, number, figures)
    except (AbsentError, CrowdError, WrongError) as error:
        absent[str(turn)] = str(error)
    seconds = time.monotonic() - start
    word = absent.get(str(turn), f"{seconds:.0f} s")
    print(f"  round {number + 1}: {turn}: {word}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
