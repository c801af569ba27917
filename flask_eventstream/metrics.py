"""What a process counts of an app's streams, for Prometheus. It needs prometheus-client.

The figures are kept anyway, as plain numbers; see :mod:`figures`. There are two ways out:

* One process: Prometheus's client asks a collector, which reads them then.
* Several, with ``PROMETHEUS_MULTIPROC_DIR``: whoever is asked reads the files of all processes, and
  no collector. So each process brings what it has in such files up to date, about once a second and
  when it ends. What streams do costs nothing more for that.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from . import concurrency
from .endings import REASONS
from .errors import ConfigurationError, NotRegisteredError
from .figures import DELAYS, Deliveries

try:
    import prometheus_client
    from prometheus_client import core
except ModuleNotFoundError as error:
    needs = "flask_eventstream.metrics needs prometheus-client; "
    needs += "pip install 'flask-eventstream[metrics]'"
    raise ModuleNotFoundError(needs, name=error.name) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.registry import CollectorRegistry

    from .state import State

    Values = dict[str, Mapping[str, float]]
    """Of each family by its name, its values by the one label that it has, ``""`` without one."""

MAX_PREFIXES = 50
"""How many prefixes of channels have a value of their own. Requests may name channels, and each
value costs Prometheus memory for days."""

OTHER = "other"
"""What the rest of them have together."""

_SECONDS = 1.0
_SHARE = 0.05
_EXIT_SECONDS = 0.5
_DELIVERY = "eventstream_delivery_seconds"
_LIMIT = "eventstream_max_subscribers"
_LABELS = {"eventstream_subscribers": "channel", "eventstream_ends_total": "reason"}
_HELP = {
    "eventstream_subscribers": "Subscribers, by the prefix of the channels that they read",
    "eventstream_places_taken": "Subscribers, each once, whatever they read",
    _LIMIT: "How many subscribers there may be",
    "eventstream_lagging": "Subscribers who have not taken everything yet",
    "eventstream_generator_streams": "Generator streams that are open",
    "eventstream_runs": "Runs whose producer goes on",
    "eventstream_connects_total": "Subscribers that have come",
    "eventstream_ends_total": "Subscribers that have gone, by the reason",
    "eventstream_published_total": "Events published",
    "eventstream_deliveries_total": "Events sent, each as often as there were subscribers",
    "eventstream_delivered_bytes_total": "Bytes of these",
    "eventstream_replays_total": "Clients that returned and got exactly what they had missed",
    "eventstream_resets_total": "Clients that returned and were told that something may be gone",
    "eventstream_replayed_events_total": "Events that clients began with",
    _DELIVERY: "Seconds from publish to the last subscriber's socket",
}

_logger = logging.getLogger(__name__)


def instrument(app: Any, registry: CollectorRegistry | None = None) -> None:
    """Have the figures of an app's streams served with those of Prometheus's client.

    With ``PROMETHEUS_MULTIPROC_DIR`` they go to its files, from every process that is forked, too.

    :param app: the app, after an :class:`EventStream` was registered with it.
    :param registry: where they are registered; ``prometheus_client.REGISTRY`` by default. Each app
        needs one of its own. With ``PROMETHEUS_MULTIPROC_DIR``, which has no room for more than one
        app, it is always the default.
    :raises NotRegisteredError: if the app has no event stream.
    :raises ConfigurationError: if the registry has such figures already.
    """
    state = app.extensions.get("eventstream")
    if state is None:
        raise NotRegisteredError(app.name)
    has_files = "PROMETHEUS_MULTIPROC_DIR" in os.environ
    if registry is None or has_files:
        registry = prometheus_client.REGISTRY
    try:
        if has_files:
            app.extensions["eventstream.metrics"] = Mirror(state, registry)
        else:
            registry.register(Collector(state))
    except ValueError as error:
        reason = "cannot take the figures of one more app; call instrument() once, and with a "
        reason += "registry for each app, such as prometheus_client.CollectorRegistry()"
        raise ConfigurationError("registry", registry, reason) from error


class Collector:
    """Reads the figures when Prometheus's client asks for them.

    :param state: what the app has.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def describe(self) -> list[core.Metric]:
        """Return the families, without their values."""
        return [*map(_new_family, _without_delivery()), _new_histogram()]

    def collect(self) -> Iterator[core.Metric]:
        """Yield the families."""
        for name, values in _read(self._state, _most_read).items():
            family = _new_family(name)
            for label, value in values.items():
                family.add_metric([label] if label else [], value)
            yield family
        sent = _sent_by_hub(self._state)
        delays, buckets, count = list(sent.delays), [], 0
        for bound, number in zip([*map(str, DELAYS), "+Inf"], delays, strict=True):
            count += number
            buckets.append((bound, count))
        histogram = _new_histogram()
        histogram.add_metric([], buckets, sent.delay_sum)
        yield histogram


class Mirror:
    """Brings metrics of Prometheus's own kinds up to date, again and again.

    :param state: what the app has.
    :param registry: where the metrics are registered.
    """

    def __init__(self, state: State, registry: CollectorRegistry) -> None:
        self._state = state
        self._metrics = {name: _new_metric(name, registry) for name in _read(state, _most_read)}
        histogram = prometheus_client.Histogram(
            _DELIVERY, _HELP[_DELIVERY], buckets=DELAYS, registry=registry
        )
        # There is no public way to add to a histogram what was counted elsewhere. Each bucket is a
        # number of its own there; they are summed up when it is asked.
        self._buckets, self._sum = histogram._buckets, histogram._sum
        # Prometheus's client has a lock of its own, which a child must not find taken.
        self._mutex = concurrency.new_mutex()
        concurrency.hold_through_forks(self._mutex)
        self._start()
        concurrency.call_after_fork(self._start)
        concurrency.call_at_exit(self._finish)

    def _start(self) -> None:
        # A forked child counts from zero, and into files of its own.
        self._told: dict[tuple[str, str], float] = {}
        self._told_delays = Deliveries()
        self._prefixes: dict[str, None] = {}
        self._turn = turn = object()
        concurrency.spawn(self._run, turn)

    def _run(self, turn: object) -> None:
        in_greenlet = concurrency.runs_in_greenlet()
        pause = concurrency.switch if in_greenlet else concurrency.original("time", "sleep")
        # A greenlet is copied by a fork, and finds that the child has a new one.
        while self._turn is turn:
            begin = time.monotonic()
            try:
                self.update()
            except Exception:  # it would fail again each second
                _logger.exception("The figures of this process cannot be told to Prometheus")
                return
            pause(max(_SECONDS, (time.monotonic() - begin) / _SHARE))

    def _finish(self) -> None:
        # What was asked last to be called at exit is called first: the streams are still open.
        shutdown, figures = self._state.shutdown, self._state.figures
        shutdown.begin()
        concurrency.look_until(
            lambda: sum(figures.ends.values()) >= figures.connects,
            _EXIT_SECONDS,
            in_greenlet=shutdown.is_greenlet,
        )
        self.update()

    def update(self) -> None:
        """Have the metrics say what the figures say now."""
        with self._mutex:
            for name, values in _read(self._state, self._first_read).items():
                for label, value in values.items():
                    self._tell(name, label, value)
            self._tell_delays(_sent_by_hub(self._state))

    def _first_read(self, counts: Counter[str]) -> Iterable[str]:
        # What a file has once, it has as long as its process lives.
        for prefix in _most_read(counts):
            if len(self._prefixes) < MAX_PREFIXES:
                self._prefixes[prefix] = None
        return self._prefixes

    def _tell(self, name: str, label: str, value: float) -> None:
        if name == _LIMIT and not self._state.figures.connects:
            # The process may be one that only forks those that have subscribers.
            value = 0
        # Also if it is 0: from now on it is there.
        metric = self._metrics[name].labels(label) if label else self._metrics[name]
        if not name.endswith("_total"):
            metric.set(value)
        elif value != (told := self._told.get((name, label), 0)):
            metric.inc(value - told)
            self._told[name, label] = value

    def _tell_delays(self, sent: Deliveries) -> None:
        told, now = self._told_delays, Deliveries()
        now.delays, now.delay_sum = list(sent.delays), sent.delay_sum
        for bucket, after, before in zip(self._buckets, now.delays, told.delays, strict=True):
            if after != before:
                bucket.inc(after - before)
        self._sum.inc(now.delay_sum - told.delay_sum)
        self._told_delays = now


def _read(state: State, choose: Callable[[Counter[str]], Iterable[str]]) -> Values:
    figures, broker, hub, places = state.figures, state.broker, state.hub, state.places
    sent, iterated = _sent_by_hub(state), figures.iterated
    numbers: dict[str, float] = {
        "places_taken": places.taken,
        "lagging": hub.lagging if hub else 0,
        "generator_streams": state.shutdown.generator_streams,
        "runs": state.runs.active,
        "connects_total": figures.connects,
        "published_total": broker.published,
        "deliveries_total": sent.events + iterated.events,
        "delivered_bytes_total": sent.bytes + iterated.bytes,
        "replays_total": broker.replays,
        "resets_total": broker.resets,
        "replayed_events_total": figures.replayed,
    }
    if places.max_all is not None:
        numbers["max_subscribers"] = places.max_all
    return {
        "eventstream_subscribers": _by_prefix(broker.prefixes(), choose),
        "eventstream_ends_total": {reason: figures.ends[reason] for reason in REASONS},
        **{f"eventstream_{name}": {"": number} for name, number in numbers.items()},
    }


def _sent_by_hub(state: State) -> Deliveries:
    return state.hub.sent if state.hub else Deliveries()


def _by_prefix(
    counts: Counter[str], choose: Callable[[Counter[str]], Iterable[str]]
) -> dict[str, float]:
    chosen: Counter[str] = Counter({prefix: counts[prefix] for prefix in choose(counts)})
    chosen[OTHER] += counts.total() - chosen.total()
    return dict(chosen)


def _most_read(counts: Counter[str]) -> list[str]:
    return [prefix for prefix, _ in counts.most_common(MAX_PREFIXES)]


def _without_delivery() -> list[str]:
    return [name for name in _HELP if name != _DELIVERY]


def _labels(name: str) -> list[str]:
    return [_LABELS[name]] if name in _LABELS else []


def _new_family(name: str) -> core.CounterMetricFamily | core.GaugeMetricFamily:
    is_counter = name.endswith("_total")
    kind = core.CounterMetricFamily if is_counter else core.GaugeMetricFamily
    return kind(name, _HELP[name], labels=_labels(name))


def _new_histogram() -> core.HistogramMetricFamily:
    return core.HistogramMetricFamily(_DELIVERY, _HELP[_DELIVERY])


def _new_metric(name: str, registry: CollectorRegistry) -> Any:
    if name.endswith("_total"):
        return prometheus_client.Counter(name, _HELP[name], _labels(name), registry=registry)
    # Of the processes that live; the dead are marked so by who started them.
    return prometheus_client.Gauge(
        name, _HELP[name], _labels(name), registry=registry, multiprocess_mode="livesum"
    )
