from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import httpx
import prometheus_client
import pytest
from flask import Flask
from prometheus_client import multiprocess
from prometheus_client.parser import text_string_to_metric_families

from flask_eventstream import EventStream, metrics
from flask_eventstream.endings import REASONS
from flask_eventstream.errors import ConfigurationError, NotRegisteredError
from flask_eventstream.figures import DELAYS
from flask_eventstream.testing import client_stream

from .servers import DEADLINE, Server, serving, wait_for
from .stress import workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prometheus_client.registry import CollectorRegistry

    from flask_eventstream.state import State

    from .redis_server import RedisServer

    Samples = dict[str, float]


pytestmark = pytest.mark.beside


@pytest.fixture
def registry() -> CollectorRegistry:
    return prometheus_client.CollectorRegistry(auto_describe=True)


def samples(text: str) -> Samples:
    """Return the values of the package's families, by name and label."""
    families = text_string_to_metric_families(text)
    return {
        "/".join([sample.name.removeprefix("eventstream_"), *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("eventstream_") and not sample.name.endswith("_created")
    }


def scraped(registry: CollectorRegistry) -> Samples:
    return samples(prometheus_client.generate_latest(registry).decode())


def state_of(app: Flask) -> State:
    state: State = app.extensions["eventstream"]
    return state


# --- One process


def test_before_anything_happens_all_is_there_and_zero(
    make_app: Callable[..., Flask], registry: CollectorRegistry
) -> None:
    metrics.instrument(make_app(MAX_SUBSCRIBERS=7), registry)
    found = scraped(registry)
    assert found.pop("max_subscribers") == 7
    assert {f"ends_total/{reason}" for reason in REASONS} < found.keys()
    assert {f"delivery_seconds_bucket/{bound}" for bound in (*DELAYS, "+Inf")} < found.keys()
    assert len(found) == len(REASONS) + len(DELAYS) + 3 + 1 + 11
    assert set(found.values()) == {0}


def test_what_is_scraped_is_exact_at_once(
    app: Flask, eventstream: EventStream, registry: CollectorRegistry
) -> None:
    metrics.instrument(app, registry)
    client, broker = app.test_client(), state_of(app).broker
    with app.app_context():
        first = eventstream.publish("one")
        eventstream.publish_many(["two", "three"], ["sse", "room:1"])
    with client_stream(client, f"/stream?lastEventId={first}") as stream:
        assert [stream.next().data for _ in range(2)] == ["two", "three"]
        with closing(broker.subscribe("room:1", "room:2", "news")):
            open_ones = scraped(registry)
        with app.app_context():
            eventstream.publish("four")
        wire = f"data: four\nid: {stream.next().id}\n\n"
    with client_stream(client, "/stream?lastEventId=of-another-life") as stream:
        assert stream.next().type == "reset"
    after = scraped(registry)
    assert open_ones["places_taken"] == 1
    prefixes = {name: value for name, value in open_ones.items() if name[:12] == "subscribers/"}
    assert prefixes == {
        "subscribers/sse": 1, "subscribers/room": 1, "subscribers/news": 1, "subscribers/other": 0
    }  # fmt: skip
    assert after["places_taken"] == 0
    assert "subscribers/sse" not in after
    counted = ("published", "connects", "replays", "resets", "ends_total/left")
    assert [after[f"{name}_total" if "/" not in name else name] for name in counted] == [
        4, 2, 1, 1, 2
    ]  # fmt: skip
    assert (after["deliveries_total"], after["delivered_bytes_total"]) == (1, len(wire))
    # Two were missed; after the reset, itself one, came the four that there are.
    assert after["replayed_events_total"] == 2 + 5


def test_what_the_hub_has_sent_is_counted_with_its_delays(
    app: Flask, registry: CollectorRegistry
) -> None:
    metrics.instrument(app, registry)
    hub = state_of(app).hub
    assert hub is not None
    hub.sent.add(b"data: x\n\n", 3)
    for seconds in (0.0, DELAYS[2], 60.0):
        hub.sent.observe(seconds)
    found = scraped(registry)
    assert (found["deliveries_total"], found["delivered_bytes_total"]) == (3, 27)
    assert found["delivery_seconds_bucket/0.001"] == found["delivery_seconds_bucket/0.0025"] == 1
    assert found["delivery_seconds_bucket/0.005"] == found["delivery_seconds_bucket/10.0"] == 2
    assert found["delivery_seconds_bucket/+Inf"] == found["delivery_seconds_count"] == 3
    assert found["delivery_seconds_sum"] == 60 + DELAYS[2]


def test_streams_and_runs_are_counted_while_they_are_open(
    make_app: Callable[..., Flask], eventstream: EventStream, registry: CollectorRegistry
) -> None:
    may_go_on = threading.Event()

    @eventstream.stream("/merged", heartbeat=5)
    def merged() -> Any:
        from flask_eventstream import merge

        return merge(one(), one())

    @eventstream.stream("/plain")
    def plain() -> Any:
        return one()

    @eventstream.resumable("/run")
    def run() -> Any:
        yield from one()

    def one() -> Any:
        yield "started"
        may_go_on.wait(20)

    app = make_app()
    metrics.instrument(app, registry)
    client = app.test_client()
    with ExitStack() as stack:
        for path, method in (
            ("/stream/merged", "GET"), ("/stream/plain", "GET"), ("/stream/run", "POST")
        ):  # fmt: skip
            stream = stack.enter_context(client_stream(client, path, method=method))
            assert stream.next().data == "started"
        client.head("/stream/plain").close()
        found = scraped(registry)
        assert (found["generator_streams"], found["runs"], found["subscribers/run"]) == (2, 1, 1)
        may_go_on.set()

    def are_over() -> bool:
        found = scraped(registry)
        return found["generator_streams"] == found["runs"] == 0

    wait_for(are_over)


def test_requests_that_name_channels_make_no_more_than_a_few_values(
    app: Flask, registry: CollectorRegistry
) -> None:
    metrics.instrument(app, registry)
    broker = state_of(app).broker
    names = [f"{n}:x" for n in range(2 * metrics.MAX_PREFIXES)]
    with ExitStack() as stack:
        for name in [*names, *names[-metrics.MAX_PREFIXES + 1 :], ":no prefix", "other:1"]:
            stack.enter_context(closing(broker.subscribe(name)))
        for _ in range(3):
            stack.enter_context(closing(broker.subscribe("other:1")))
        found = {
            name.removeprefix("subscribers/"): value
            for name, value in scraped(registry).items()
            if name.startswith("subscribers/")
        }
    # Its own four, those that are the only ones of their prefix, and the one that has none.
    assert found.pop("other") == 4 + metrics.MAX_PREFIXES + 1 + 1
    assert found == {str(n): 2 for n in range(metrics.MAX_PREFIXES + 1, 2 * metrics.MAX_PREFIXES)}


def test_without_a_limit_or_a_hub_there_is_none(
    make_app: Callable[..., Flask], registry: CollectorRegistry
) -> None:
    app = make_app(HIJACK=False)
    state_of(app).places.max_all = None
    metrics.instrument(app, registry)
    found = scraped(registry)
    assert "max_subscribers" not in found
    assert found["lagging"] == found["delivery_seconds_count"] == 0


def test_a_registry_takes_one_app_and_each_app_may_have_its_own(
    make_app: Callable[..., Flask], registry: CollectorRegistry
) -> None:
    app, other = make_app(MAX_SUBSCRIBERS=1), make_app(MAX_SUBSCRIBERS=2)
    metrics.instrument(app, registry)
    with pytest.raises(ConfigurationError, match=r"one more app; call instrument\(\) once"):
        metrics.instrument(other, registry)
    own = prometheus_client.CollectorRegistry()
    metrics.instrument(other, own)
    assert [scraped(one)["max_subscribers"] for one in (registry, own)] == [1, 2]


def test_an_app_without_an_event_stream_is_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(NotRegisteredError, match="register_blueprint"):
        metrics.instrument(Flask("bare"), registry)


def test_without_the_client_of_prometheus_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "flask_eventstream.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flask-eventstream\[metrics\]'"):
        __import__("flask_eventstream.metrics")


# --- Several processes


def test_prometheus_own_metrics_say_the_same_as_the_collector(
    app: Flask, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is counted elsewhere can be added to a histogram by its internals only. This fails if a
    # version of Prometheus's client has others.
    monkeypatch.setattr(metrics, "_SECONDS", 0.01)
    state = state_of(app)
    metrics.instrument(app, registry)
    mirrored = prometheus_client.CollectorRegistry()
    threads = threading.active_count()
    mirror = metrics.Mirror(state, mirrored)
    assert state.hub is not None
    keep = [state.broker.subscribe(f"room:{n}") for n in range(2)]
    for seconds in (0.0, 0.3, 60.0, 0.3):
        state.figures.connected(b"data: x\n\n")
        state.hub.sent.observe(seconds)
        wait_for(lambda: scraped(mirrored) == scraped(registry), what=str(seconds))
    keep.pop()
    state.figures.ended("left")
    wait_for(lambda: scraped(mirrored) == scraped(registry))
    assert scraped(mirrored)["subscribers/room"] == 1
    mirror._turn = object()
    wait_for(lambda: threading.active_count() <= threads)


def test_a_failure_is_logged_once_and_ends_the_thread(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(app)
    monkeypatch.setattr(state.broker, "prefixes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metrics.Mirror(state, prometheus_client.CollectorRegistry())
    monkeypatch.undo()
    threads = threading.active_count()
    monkeypatch.setattr(metrics.Mirror, "update", lambda mirror: 1 / 0)
    mirror = metrics.Mirror(state, prometheus_client.CollectorRegistry())
    wait_for(lambda: caplog.records)
    wait_for(lambda: threading.active_count() <= threads)
    [record] = caplog.records
    assert "cannot be told to Prometheus" in record.message
    assert mirror is not None


def test_with_files_for_several_processes_metrics_of_prometheus_own_are_instrumented(
    app: Flask, monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    monkeypatch.setattr(metrics, "_SECONDS", 0.01)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    metrics.instrument(app, prometheus_client.CollectorRegistry())
    mirror = app.extensions["eventstream.metrics"]
    assert isinstance(mirror, metrics.Mirror)
    mirror.update()
    assert scraped(registry)["max_subscribers"] == 0
    mirror._turn = object()


def test_a_process_that_ends_tells_what_its_end_has_brought(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_SECONDS", 0.01)
    state, mirrored = state_of(app), prometheus_client.CollectorRegistry()
    threads = threading.active_count()
    mirror = metrics.Mirror(state, mirrored)
    mirror._turn = object()
    wait_for(lambda: threading.active_count() <= threads)
    state.figures.connected(b"")
    # Streams are closed by the hub's errands, which may still be on their way.
    closing_one = threading.Timer(0.1, lambda: state.figures.ended("stopped"))
    closing_one.start()
    mirror._finish()
    closing_one.join()
    assert state.shutdown.has_begun
    assert scraped(mirrored)["connects_total"] == scraped(mirrored)["ends_total/stopped"] == 1


def test_a_process_keeps_the_prefixes_that_it_had_first(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_SECONDS", 0.01)
    state, mirrored = state_of(app), prometheus_client.CollectorRegistry()
    mirror = metrics.Mirror(state, mirrored)
    mirror._turn = object()
    for round in range(3):
        names = [f"{round}-{n}:x" for n in range(metrics.MAX_PREFIXES - 1)]
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(closing(state.broker.subscribe(name)))
            mirror.update()
            found = scraped(mirrored)
    prefixes = [name for name in found if name.startswith("subscribers/")]
    assert len(prefixes) == metrics.MAX_PREFIXES + 1
    assert found["subscribers/0-0"] == found["subscribers/1-0"] == 0
    assert found["subscribers/other"] == metrics.MAX_PREFIXES - 1


class Site:
    """gunicorn with two workers, and subscribers that are open."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._clients = ExitStack()

    def subscribe(self) -> dict[int, list[httpx.Response]]:
        """Have each worker serve one subscriber at least; return all by their workers."""
        # One that is not there yet would leave all of them to the other.
        self.wait_until_both_say({})
        found: dict[int, list[httpx.Response]] = {pid: [] for pid in self.workers()}
        while not all(found.values()):
            client = self._clients.enter_context(httpx.Client(timeout=20))
            ask = client.build_request("GET", f"{self.server.url}/user/1")
            response = client.send(ask, stream=True)
            found[int(response.headers["X-Pid"])].append(response)
        return found

    def workers(self) -> list[int]:
        def both() -> list[int]:
            pids = workers(self.server)
            return pids if len(pids) == 2 else []

        return wait_for(both)

    def wait_until_both_say(self, expected: Samples) -> None:
        """Wait until each worker, asked for the figures, has these."""
        last: dict[str, Samples] = {}

        def agree() -> bool:
            answer = httpx.get(
                f"{self.server.url}/metrics", headers={"Connection": "close"}, timeout=DEADLINE
            )
            last[answer.headers["X-Pid"]] = found = samples(answer.text)
            has_all = all(found.get(name) == value for name, value in expected.items())
            return has_all and len(last) >= 2

        wait_for(agree, what=f"{expected}, but {last}")

    def close(self) -> None:
        self._clients.close()

    def kill(self, pid: int) -> None:
        """Kill a worker, and wait for the one that takes its place."""
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in self.workers())


@pytest.mark.parametrize(
    ("worker_class", "options"),
    [("gevent", []), ("gthread", ["--threads=8"]), ("gevent", ["--preload"])],
    ids=["gevent", "gthread", "gevent preloaded"],
)
def test_every_worker_says_what_all_of_them_have(
    worker_class: str, options: list[str], redis: RedisServer, tmp_path: Path
) -> None:
    environ = {"REDIS_URL": redis.url, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    config = ["--config=python:tests.metrics_app", "--workers=2", "--graceful-timeout=20", *options]
    with (
        serving("tests.metrics_app:create_app()", worker_class, *config, environ=environ) as server,
        closing(Site(server)) as site,
    ):
        found = site.subscribe()
        (killed, lost), (_, [leaving, *kept]) = sorted(found.items(), key=lambda one: len(one[1]))
        comers = len(lost) + 1 + len(kept)
        id = httpx.post(f"{server.url}/publish", timeout=DEADLINE).text
        expected: Samples = {
            "subscribers/sse": comers, "subscribers/user": comers, "places_taken": comers,
            "max_subscribers": 2000, "connects_total": comers, "ends_total/left": 0,
            "ends_total/failed": 0, "published_total": 1, "deliveries_total": comers,
            "delivered_bytes_total": comers * len(f"data: x\nid: {id}\n\n"),
            "delivery_seconds_count": 2, "delivery_seconds_bucket/+Inf": 2,
        }  # fmt: skip
        site.wait_until_both_say(expected)
        leaving.close()
        site.kill(killed)
        # What was counted is not lost with the process; what it had open is.
        expected |= {
            "subscribers/sse": len(kept), "subscribers/user": len(kept),
            "places_taken": len(kept), "max_subscribers": 1000, "ends_total/left": 1,
        }  # fmt: skip
        site.wait_until_both_say(expected)
        newcomers = sum(map(len, site.subscribe().values()))
        expected |= {"max_subscribers": 2000, "connects_total": comers + newcomers}
        site.wait_until_both_say({**expected, **dict.fromkeys(
            ["subscribers/sse", "subscribers/user", "places_taken"], len(kept) + newcomers
        )})  # fmt: skip
        server.stop()
        assert "Traceback" not in server.log()
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
    at_the_end = scraped(registry)
    assert at_the_end["ends_total/stopped"] == len(kept) + newcomers
    assert at_the_end["connects_total"] == comers + newcomers
    assert 0 < at_the_end["delivery_seconds_sum"] < 20
