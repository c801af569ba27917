"""What ``fanout.py`` says in the end: tables, the bar, and plots."""

from __future__ import annotations

import json
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from fanout_servers import LIMIT, servers
from fanout_session import BURST_EVENTS
from measuring import print_columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Figures = Mapping[str, float]

OURS = {name: server for name, server in servers().items() if server.is_ours}
HUB = [name for name in OURS if not name.endswith(":iterator")]


class Run(NamedTuple):
    """What one server did in one round."""

    server: str
    subscribers: int
    sets: str
    round: int
    figures: Figures


class Column(NamedTuple):
    """A column of a table.

    :param key: the name of the figure.
    :param has_ratio: whether the ratio to the C loop in the same round is given too.
    """

    title: str
    key: str
    format: str = "{:,.1f}"
    has_ratio: bool = False


class Results:
    """The figures of all rounds; what is told is the median of them."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def get(self, server: str, subscribers: int, key: str, sets: str = "single") -> float | None:
        """Return the median of a figure, or ``None`` if nobody measured it."""
        found = self._by_round(server, subscribers, key, sets).values()
        return median(found) if found else None

    def ratio(
        self, server: str, to: str, subscribers: int, key: str, sets: str = "single"
    ) -> float | None:
        """Return the median of a figure's ratios to another server's figure of the same round.

        A figure of events that are published inside is compared with that of others' requests.
        """
        mine = self._by_round(server, subscribers, key, sets)
        other = self._by_round(to, subscribers, key, "single")
        other = other or self._by_round(to, subscribers, key.replace("_inside", ""), "single")
        # The speed of the machine changes from round to round.
        found = [mine[turn] / other[turn] for turn in mine.keys() & other.keys() if other[turn]]
        return median(found) if found else None

    def _by_round(self, server: str, subscribers: int, key: str, sets: str) -> dict[int, float]:
        wanted = (server, subscribers, sets)
        return {
            run.round: run.figures[key]
            for run in self.runs
            if (run.server, run.subscribers, run.sets) == wanted and key in run.figures
        }

    def sizes(self) -> list[int]:
        """Return the numbers of subscribers, ascending."""
        return sorted({run.subscribers for run in self.runs})

    def names(self, subscribers: int, key: str, sets: str = "single") -> list[str]:
        """Return the servers that have a figure, in the order in which they ran."""
        names = dict.fromkeys(run.server for run in self.runs)
        return [name for name in names if self.get(name, subscribers, key, sets) is not None]


def _pace(name: str) -> list[Column]:
    return [
        Column("CPU us", f"{name}.cpu_us", "{:,.2f}", has_ratio=True),
        Column("published inside", f"{name}_inside.cpu_us", "{:,.2f}", has_ratio=True),
        Column("p50 ms", f"{name}.p50_ms"),
        Column("p99 ms", f"{name}.p99_ms"),
        Column("max ms", f"{name}.max_ms"),
        Column("lost", f"{name}.lost", "{:,.0f}"),
        Column("one each ms", f"{name}.published_every_ms", "{:,.0f}"),
        Column("CPU us of a POST", "request.cpu_us", "{:,.0f}"),
    ]


IDLE = [
    Column("KB", "memory.kb"),
    Column("CPU us to connect", "connect.cpu_us", "{:,.0f}"),
    Column("connected/s", "connect.per_second", "{:,.0f}"),
]
BURST = [
    Column("thousand/s", "burst.thousand_per_second", "{:,.0f}", has_ratio=True),
    Column("CPU us", "burst.cpu_us", "{:,.2f}", has_ratio=True),
    Column("p50 ms", "burst.p50_ms"),
    Column("max ms", "burst.max_ms"),
    Column("lost", "burst.lost", "{:,.0f}"),
]
BUSY = [
    Column("p50 ms", "busy.p50_reach_ms"),
    Column("p99 ms", "busy.p99_reach_ms"),
    Column("max ms", "busy.max_reach_ms"),
    Column("lost", "busy.lost", "{:,.0f}"),
]
CALLER = [
    Column("nobody: wall us", "publish_alone.p50_wall_us"),
    Column("p99", "publish_alone.p99_wall_us"),
    Column("subscribers: wall us", "publish.p50_wall_us"),
    Column("p99", "publish.p99_wall_us"),
    Column("CPU us", "publish.p50_cpu_us"),
    Column("in a burst", "publish.in_a_burst_us"),
    Column("first after a pause", "publish.p50_cold_us"),
    Column("the same, nobody", "publish_alone.p50_cold_us"),
]
TABLES = {
    "a steady pace: CPU time for a delivery, latency": _pace("steady"),
    "a calm pace: the same": _pace("calm"),
    "idle: memory and CPU time for a subscriber": IDLE,
    f"{BURST_EVENTS} events back to back: deliveries": BURST,
    "beside a computing request: from publish() until all are reached": BUSY,
    "one call of publish() for its caller, median and p99": CALLER,
}


def print_tables(results: Results) -> None:
    """Print a table for each number of subscribers and each kind of work."""
    for subscribers in results.sizes():
        for title, columns in TABLES.items():
            lines = _lines(results, subscribers, columns)
            if len(lines) > 1:
                print(f"\n{subscribers:,} subscribers, {title}\n")
                print_columns(lines)


def _lines(results: Results, subscribers: int, columns: Sequence[Column]) -> list[list[str]]:
    lines = [["", *(column.title for column in columns)]]
    for sets in ("single", "own"):
        for name in results.names(subscribers, columns[0].key, sets):
            label = name if sets == "single" else f"{name}, own channels"
            cells = (_cell(results, name, subscribers, column, sets) for column in columns)
            lines.append([label, *cells])
    return lines


def _cell(results: Results, name: str, subscribers: int, column: Column, sets: str) -> str:
    figure = results.get(name, subscribers, column.key, sets)
    if figure is None:
        return "-"
    text = column.format.format(figure)
    ratio = results.ratio(name, LIMIT, subscribers, column.key, sets)
    if not column.has_ratio or ratio is None:
        return text
    return text + (" " * len(" ( 1.00 x)") if name == LIMIT else f" ({ratio:5.2f} x)")


class Bar(NamedTuple):
    """An aim, and how near a server came; ``None`` if it was not measured."""

    what: str
    bar: float
    unit: str
    is_least: bool
    found: float | None

    @property
    def is_met(self) -> bool | None:
        """Tell whether the aim is reached, if that is known."""
        if self.found is None:
            return None
        return self.found >= self.bar if self.is_least else self.found <= self.bar


def judge(results: Results) -> list[Bar]:
    """Return all aims for what was measured; there are none for fewer than 1,000 subscribers."""
    bars = []
    for size in [size for size in results.sizes() if size >= 1_000]:
        ours = [name for name in HUB if name in results.names(size, "steady.cpu_us")]
        for name in ours:
            bars += _judge_server(results, name, size)
    return [bar for bar in bars if bar.found is not None]


def _judge_server(results: Results, name: str, size: int) -> list[Bar]:
    def ratio(key: str, to: str, sets: str = "single") -> float | None:
        return results.ratio(name, to, size, key, sets)

    def figure(key: str) -> float | None:
        return results.get(name, size, key)

    label = f"{name}, {size:,}"
    speed = ratio("burst.thousand_per_second", "nchan")
    return [
        Bar(f"{label}: CPU of a delivery", 1.3, "x the C loop", False,
            ratio("steady_inside.cpu_us", LIMIT)),
        Bar(f"{label}: CPU of a delivery and of its request", 1.3, "x the C loop", False,
            ratio("steady.cpu_us", LIMIT)),
        Bar(f"{label}: CPU of a delivery", 1.0, "x nchan", False, ratio("steady.cpu_us", "nchan")),
        Bar(f"{label}: CPU of a delivery, calm", 1.3, "x the C loop", False,
            ratio("calm_inside.cpu_us", LIMIT)),
        Bar(f"{label}: CPU of a delivery and of its request, calm", 1.3, "x the C loop", False,
            ratio("calm.cpu_us", LIMIT)),
        Bar(f"{label}: CPU of a delivery, calm", 1.0, "x nchan", False,
            ratio("calm.cpu_us", "nchan")),
        Bar(f"{label}: all reached beside a busy thread, p99", 50.0, "ms", False,
            figure("busy.p99_reach_ms")),
        Bar(f"{label}: deliveries/s of a burst", 10.0, "x nchan", True, speed),
        Bar(f"{label}: memory of an idle subscriber", 2.5, "KB", False, figure("memory.kb")),
        Bar(f"{label}: publish() for its caller, median", 30.0, "us", False,
            figure("publish.p50_wall_us")),
        Bar(f"{label}: publish() for its caller, the first after a pause", 30.0, "us", False,
            figure("publish.p50_cold_us")),
        Bar(f"{label}: publish() for its caller, in a burst", 30.0, "us", False,
            figure("publish.in_a_burst_us")),
        Bar(f"{label}: CPU of a delivery, own channels", 2.0, "x a single set", False,
            ratio("steady.cpu_us", name, "own")),
        Bar(f"{label}: CPU of a delivery, own channels, calm", 2.0, "x a single set", False,
            ratio("calm.cpu_us", name, "own")),
    ]  # fmt: skip


def print_bars(bars: Iterable[Bar]) -> None:
    """Say which aims are met."""
    print("\nBar:\n")
    for bar in bars:
        word = "met" if bar.is_met else "MISSED"
        least = "at least" if bar.is_least else "at most"
        print(f"  {bar.what}: {word}: {bar.found:.2f}, {least} {bar.bar:g} {bar.unit}")


def write_json(
    path: Path | None,
    machine: Mapping[str, Any],
    options: Mapping[str, Any],
    results: Results,
    bars: Iterable[Bar],
    absent: Mapping[str, str],
) -> None:
    """Write all that was measured to a file, if there is one; the units are in the names."""
    if path is None:
        return
    data = {
        "machine": machine,
        "options": options,
        "runs": [run._asdict() for run in results.runs],
        "bars": [{**bar._asdict(), "met": bar.is_met} for bar in bars],
        "absent": absent,
    }
    path.write_text(json.dumps(data, indent=2) + "\n")


# Plots

# Each with the figures that it takes the first of. The calm pace has as many deliveries/s as the
# steady one to fewer subscribers, so that one line goes through both.
PANELS = {
    "CPU time for a delivery, us": ["calm.cpu_us", "steady.cpu_us"],
    "memory of an idle subscriber, KB": ["memory.kb"],
    "latency at p99, ms": ["calm.p99_ms", "steady.p99_ms"],
}
INK = "#808080"
"""Of the letters; readable on white and on black."""


def write_svg(path: Path | None, results: Results) -> None:
    """Draw the figures over the number of subscribers, if there is a file to draw to."""
    if path is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    # Letters and not shapes of letters; and the same file for the same figures.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fanout", "font.size": 9})
    mpl.rcParams.update({"text.color": INK, "xtick.color": INK, "ytick.color": INK})
    mpl.rcParams.update({"axes.edgecolor": INK, "axes.labelcolor": INK})
    _draw(path, results)


def _draw(path: Path, results: Results) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.6), layout="constrained")
    for place, (title, keys) in zip(axes, PANELS.items(), strict=True):
        _draw_panel(place, results, title, keys)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _draw_panel(place: Any, results: Results, title: str, keys: Sequence[str]) -> None:
    for name, style in _styles(results).items():
        points = {}
        for size in results.sizes():
            figures = (results.get(name, size, key) for key in keys)
            figure = next((figure for figure in figures if figure is not None), None)
            if figure is not None:
                # A logarithmic scale has no place for nothing.
                points[size] = max(figure, 0.1)
        if points:
            place.plot(list(points), list(points.values()), label=name, **style)
    place.set(title=title, xscale="log", yscale="log", xlabel="subscribers")
    place.set_xticks(results.sizes(), [f"{size:,}" for size in results.sizes()])
    place.minorticks_off()
    place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    place.grid(color=INK, alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Return how each server is drawn: the limit dashed, ours thick, peers thin."""
    names = list(dict.fromkeys(run.server for run in results.runs))
    ours = iter(["#1f7fd6", "#2aa198", "#5b6fd8", "#3a9bdc", "#6aa84f"])
    peers = cycle(["#d9822b", "#c0563a", "#b5890d", "#c74b8b", "#9a6a3a", "#a05195", "#8a8d2b"])
    markers = cycle("sDv^<>PX")

    def style(name: str) -> dict[str, Any]:
        if name == LIMIT:
            return {"color": INK, "linestyle": "--", "marker": "o"}
        if name in HUB:
            return {"color": next(ours, INK), "linewidth": 2.5, "marker": "o"}
        return {"color": next(peers), "linewidth": 1.2, "marker": next(markers), "markersize": 4}

    return {name: style(name) for name in names}
