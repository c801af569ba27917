"""Runs: what a token costs whose producer outlives its client, beside plain streams.

Each server has one worker process and 1,000 producers at once, each with one client and a rate of
50 tokens a second, and then of 10. Tokens come at irregular times, as those of a model do; equal
pauses would have producers fall into step with each other. The clients are in one other process
(``runs_clients.py``). The same tokens, 25 characters with their number and time, go out

* by a view decorated with ``EventStream.resumable``, each at a URL of its own: *runs*;
* by a view decorated with ``EventStream.stream``: *plain streams*. Both are in gunicorn, with its
  gevent worker;
* by sse-starlette's ``EventSourceResponse`` in uvicorn, with uvloop and httptools.

The producers start one after another. Once all stream, and have done so for a second, a few seconds
are measured:

* *CPU time for a token*: what all processes of the server spend, user and system, divided by the
  tokens that arrived. The bar speaks of its ratio to plain streams in the same round.
* *Latency*: from the ``yield`` to the client's read. Tokens of runs are joined for up to 25 ms.
* *Lost*: tokens that did not arrive, or not in order. It must be 0.
* *Memory*: what the processes have more once all stream, for each producer; and what they have
  more after the measurement, for each token: the log of a run keeps its tokens.

The servers take turns. Of one that is *behind*, since it has no more CPU time to spend, the
producers yield too late, so that its latencies say little. The CPU time for a token holds still.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fanout_clients import CrowdError
from fanout_report import Bar, print_bars
from fanout_servers import AbsentError, Server, Stage, gunicorn_command, running, uvicorn_commands
from fanout_session import percentiles
from measuring import print_columns, print_machine, raise_descriptor_limit
from runs_clients import Clients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Figures = dict[str, float]

DISTRIBUTIONS = (
    "flask-eventstream", "flask", "gunicorn", "gevent", "uvicorn", "uvloop", "httptools",
    "starlette", "sse-starlette",
)  # fmt: skip
BAR = 1.5
SATURATED = 95
"""Percent of a core."""
BEHIND = 85
"""Percent of the tokens that were to come."""
BUSY_CLIENTS = 70
"""Percent of a core, from which on the clients may be what is slow."""
SETTLE_SECONDS = 1.0
RUNS, PLAIN, PEER = "runs", "plain streams", "sse-starlette"
FORMATS = {
    "tokens/s": "{:,.0f}",
    "server CPU %": "{:,.0f}",
    "clients CPU %": "{:,.0f}",
    "p50 ms": "{:,.1f}",
    "p99 ms": "{:,.1f}",
    "lost": "{:,.0f}",
    "KB each": "{:,.0f}",
    "bytes kept/token": "{:,.0f}",
}


class Turn(NamedTuple):
    """What a server did in one round, at one rate."""

    name: str
    rate: float
    round: int
    figures: Figures


def main() -> None:
    """Measure, and tell."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    raise_descriptor_limit()
    machine = print_machine(DISTRIBUTIONS)
    turns: list[Turn] = []
    absent: dict[str, str] = {}
    with closing(Clients()) as clients, suppress(KeyboardInterrupt):
        # What was measured until then is told.
        turns.extend(take_rounds(options, clients, absent))
    for rate in options.rate:
        print_table([turn for turn in turns if turn.rate == rate], options.runs, rate)
    for name, reason in absent.items():
        print(f"\nAbsent: {name}: {reason}")
    bars = judge(turns, options)
    print_bars(bars)
    if options.json:
        _write_json(options.json, machine, turns, bars, absent)


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Compare what a token of a run costs.")
    add = parser.add_argument
    add("--runs", type=int, default=1_000, help="at once, 1,000 by default")
    add("--rate", type=_rates, default=[50.0, 10.0], metavar="N[,N...]", help="tokens/s of each")
    add("--seconds", type=float, default=3.0, help="that are measured, 3 by default")
    add("--rounds", type=int, default=4, help="turns, 4 by default")
    add("--server", type=_names, default=list(SERVERS), metavar="NAME[,NAME...]")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def _names(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in SERVERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of: {', '.join(SERVERS)}")
    return text.split(",")


def _ours(stage: Stage) -> list[list[str]]:
    return [gunicorn_command(stage, "gevent", "runs_ours:create_app()")]


SERVERS = {
    RUNS: (Server(RUNS, _ours), "/stream/run"),
    PLAIN: (Server(PLAIN, _ours), "/stream/plain"),
    PEER: (
        Server(PEER, partial(uvicorn_commands, "runs_sse_starlette", ["sse_starlette"])),
        "/stream/plain",
    ),
}
"""The servers, and what their URLs begin with."""


def take_rounds(
    options: argparse.Namespace, clients: Clients, absent: dict[str, str]
) -> Iterator[Turn]:
    """Yield what was measured; note who could not take part, and why."""
    for number in range(options.rounds):
        for rate in options.rate:
            for name in options.server:
                label = f"{name}, {rate:g}/s"
                try:
                    yield Turn(name, rate, number, measure(name, rate, options, clients))
                except (AbsentError, CrowdError) as error:
                    clients.drop()
                    absent[label] = str(error)
                word = absent.get(label, "done")
                print(f"  round {number + 1}: {label}: {word}", file=sys.stderr, flush=True)


def measure(name: str, rate: float, options: argparse.Namespace, clients: Clients) -> Figures:
    """Return the figures of one server at one rate."""
    server, path = SERVERS[name]
    with running(server, options.runs) as found:
        targets = [f"{path}/{n}?pause={1 / rate}" for n in range(options.runs)]
        # The first ones start what the others find.
        first = len(targets) // 10
        clients.start(found.port, targets[:first])
        before = found.memory()
        clients.start(found.port, targets[first:])
        time.sleep(SETTLE_SECONDS)
        memory = found.memory()
        clients.begin()
        cpu = found.cpu().total
        time.sleep(options.seconds)
        cpu = found.cpu().total - cpu
        clients.end()
        after = found.memory()
        report = clients.report()
    tokens = len(report.latencies)
    return {
        "CPU us": cpu / tokens * 1e6,
        "tokens/s": tokens / report.seconds,
        "server CPU %": cpu / report.seconds * 100,
        "clients CPU %": report.cpu / report.seconds * 100,
        "lost": float(report.lost),
        "KB each": (memory - before) / len(targets[first:]) / 1024,
        "bytes kept/token": (after - memory) / tokens,
        **_milliseconds(report.latencies),
    }


def _milliseconds(latencies: Sequence[int]) -> Figures:
    found = percentiles([ns / 1e6 for ns in latencies], "ms")
    return {"p50 ms": found["p50_ms"], "p99 ms": found["p99_ms"]}


def print_table(turns: Sequence[Turn], runs: int, rate: float) -> None:
    """Print the medians of one rate, and who was saturated."""
    print(f"\n{runs:,} at once, {rate:g} tokens/s each: a token\n")
    lines = [["", "CPU us", f"x {PLAIN}", "lowest", "highest", *FORMATS]]
    names = list(dict.fromkeys(turn.name for turn in turns))
    for name in names:
        cells = [form.format(_median(turns, name, key)) for key, form in FORMATS.items()]
        lines.append([name, f"{_median(turns, name, 'CPU us'):,.1f}", *_cells(turns, name), *cells])
    print_columns(lines)
    for name in names:
        _print_doubts(turns, name, runs * rate)


def _print_doubts(turns: Sequence[Turn], name: str, wanted: float) -> None:
    server, clients = (_median(turns, name, f"{who} CPU %") for who in ("server", "clients"))
    came = _median(turns, name, "tokens/s") / wanted * 100
    if server > SATURATED or came < BEHIND:
        print(f"\nBehind: {name}: {server:.0f} % of a core, {came:.0f} % of the tokens in time")
    if clients > BUSY_CLIENTS:
        print(f"\nThe clients were busy: {name}: {clients:.0f} % of a core")


def _median(turns: Sequence[Turn], name: str, key: str) -> float:
    return median(turn.figures[key] for turn in turns if turn.name == name)


def _cells(turns: Sequence[Turn], name: str) -> list[str]:
    found = _ratios(turns, name)
    if name == PLAIN or not found:
        return ["-"] * 3
    return [f"{ratio:.2f}" for ratio in (median(found), min(found), max(found))]


def _ratios(turns: Sequence[Turn], name: str) -> list[float]:
    """Return the CPU time of a token beside that of plain streams, of each round."""
    own, plain = (
        {turn.round: turn.figures["CPU us"] for turn in turns if turn.name == wanted}
        for wanted in (name, PLAIN)
    )
    return [own[number] / plain[number] for number in own.keys() & plain.keys()]


def judge(turns: Sequence[Turn], options: argparse.Namespace) -> list[Bar]:
    """Return all aims for what was measured."""
    bars = []
    for rate in options.rate:
        at_rate = [turn for turn in turns if turn.rate == rate]
        what = f"{options.runs:,} runs, {rate:g}/s each"
        if ratios := _ratios(at_rate, RUNS):
            bars.append(Bar(f"{what}: CPU of a token", BAR, f"x {PLAIN}", False, median(ratios)))
        for name in dict.fromkeys(turn.name for turn in at_rate):
            lost = sum(turn.figures["lost"] for turn in at_rate if turn.name == name)
            bars.append(Bar(f"{name}, {rate:g}/s each: lost", 0, "tokens", False, lost))
    return bars


def _write_json(
    path: Path,
    machine: dict[str, object],
    turns: Sequence[Turn],
    bars: Sequence[Bar],
    absent: dict[str, str],
) -> None:
    data = {
        "machine": machine,
        "turns": [turn._asdict() for turn in turns],
        "bars": [{**bar._asdict(), "met": bar.is_met} for bar in bars],
        "absent": absent,
    }
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
