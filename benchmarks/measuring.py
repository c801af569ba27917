"""What the benchmarks share: fair turns, tables, the bar, and the machine that they ran on.

In-process figures are CPU time, since other work may run on the machine, and the best of several
rounds. The peers take turns (A B C A B C ...), so that a noisy moment hits all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import sys
import time
import timeit
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Figures = Mapping[str, float]

T = TypeVar("T")

TURN_SECONDS = 0.01
"""How long a peer's turn is made, by repeating its work."""


class Table(NamedTuple):
    """Seconds of CPU time, for each workload and each peer that does it.

    :param reference: the peer that the others' ratios are given to.
    :param parts: peers that are parts of another package, and not its public way.
    """

    title: str
    reference: str
    rows: Mapping[str, Figures]
    unit: str = "ns"
    is_judged: bool = True
    parts: tuple[str, ...] = ()

    def print(self) -> None:
        names = dict.fromkeys(name for figures in self.rows.values() for name in figures)
        lines = [["", *names]]
        for workload, figures in self.rows.items():
            lines.append([workload, *(self._cell(figures, name) for name in names)])
        print(f"\n{self.title} [{self.unit}]\n")
        print_columns(lines)

    def _cell(self, figures: Figures, name: str) -> str:
        if name not in figures:
            return "-"
        number = f"{figures[name] * 1e9:,.0f}"
        if self.unit == "us":
            number = f"{figures[name] * 1e6:,.2f}"
        if name == self.reference or self.reference not in figures:
            return number + " " * len(" ( 1.00 x)")
        return f"{number} ({figures[name] / figures[self.reference]:5.2f} x)"


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for name, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *right]).rstrip())


def options(description: str, rounds: int) -> argparse.Namespace:
    """Return the command line: ``--json FILE`` and ``--rounds N``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns, {rounds} by default")
    return parser.parse_args()


def timer(work: str | Callable[[], object], names: Mapping[str, Any] | None = None) -> timeit.Timer:
    """Return a timer of CPU time for a statement, or for a function without arguments.

    timeit turns the garbage collector off, which would be a gift to whoever makes most garbage.
    """
    names = {**(names or {}), "gc": gc}
    return timeit.Timer(work, "gc.enable()", timer=time.process_time, globals=names)


def best_of_rounds(timers: Mapping[str, timeit.Timer], rounds: int) -> dict[str, float]:
    """Return the best CPU time of one execution of each timer, in seconds."""
    # What the imports left is nobody's garbage: a collection looks at the work's own objects only.
    gc.collect()
    gc.freeze()
    repeats = {name: _repeats(one) for name, one in timers.items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(rounds):
        for name, one in timers.items():
            best[name] = min(best[name], one.timeit(repeats[name]) / repeats[name])
    return best


def _repeats(one: timeit.Timer) -> int:
    repeats = 1
    while (seconds := one.timeit(repeats)) < TURN_SECONDS / 2:
        repeats *= 2
    return max(1, round(repeats * TURN_SECONDS / seconds))


def print_speed_bar(tables: Iterable[Table], bar: float) -> list[dict[str, Any]]:
    """Say for each judged table whether its reference beats the fastest peer by a factor.

    :returns: the same as data.
    """
    print(f"\nBar: at least {bar:g} x faster than the fastest Python peer.")
    judgements = []
    for table in tables:
        if table.is_judged:
            judgements.append(_judge(table, table.title, table.parts, bar))
        if table.is_judged and table.parts:
            judgements.append(_judge(table, f"{table.title}, {table.parts[0]} too", (), bar))
    return judgements


def _judge(table: Table, title: str, left_out: tuple[str, ...], bar: float) -> dict[str, Any]:
    ratios = {}
    for workload, figures in table.rows.items():
        peers = figures.keys() - {table.reference, *left_out}
        if peers and table.reference in figures:
            peer = min(peers, key=figures.__getitem__)
            ratios[workload] = (figures[peer] / figures[table.reference], peer)
    missed = {workload: found for workload, found in ratios.items() if found[0] < bar}
    worst = dict(sorted(ratios.items(), key=lambda item: item[1])[:1])
    word = f"MISSED in {len(missed)} of {len(ratios)}" if missed else "met, at worst"
    print(f"\n  {title}: {word if ratios else 'unknown, no peer is installed'}")
    for workload, (ratio, peer) in (missed or worst).items():
        print(f"    {workload}: {ratio:.2f} x {peer}")
    return {"title": title, "bar": bar, "met": bool(ratios) and not missed, "ratios": ratios}


def print_machine(distributions: Iterable[str]) -> dict[str, Any]:
    """Say what the CPU and the versions are, and return the same as data."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    versions = {name: _version(name) for name in distributions}
    print(f"\n{_cpu_model()}, {os.cpu_count()} cores, {platform.system()}, {python}")
    print(", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()))
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": python,
        "versions": versions,
    }


def raise_descriptor_limit() -> int:
    """Let this process, and all that it starts, have as many sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def load(loaders: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Return what each peer's loader returns; say which peers are not installed."""
    found: dict[str, T] = {}
    for name, loader in loaders.items():
        found |= _loaded(name, loader)
    return found


def _loaded(name: str, loader: Callable[[], T]) -> dict[str, T]:
    try:
        return {name: loader()}
    except ImportError as error:
        print(f"Skipped: {name} ({error})")
        return {}


def write_json(
    path: Path | None, machine: dict[str, Any], tables: Iterable[Table], bars: object
) -> None:
    """Write everything that was printed to a file, if there is one; times in seconds."""
    if path is not None:
        found = [table._asdict() for table in tables]
        data = {"machine": machine, "tables": found, "bars": bars}
        path.write_text(json.dumps(data, indent=2) + "\n")
