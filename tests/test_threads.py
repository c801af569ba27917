from __future__ import annotations

import gc
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from flask_eventstream.threads import Threads


class Stream:
    """What may have a thread."""


def worker_of(module: str, threads: int) -> Any:
    """Return a worker of a class that derives from one of gunicorn's."""
    base = type("Worker", (), {"__module__": module, "handle_exit": lambda self: None})
    worker = type("OwnWorker", (base,), {})()
    worker.alive, worker.cfg = True, SimpleNamespace(threads=threads)
    return worker


def serve_by(monkeypatch: pytest.MonkeyPatch, module: str, threads: int) -> None:
    worker = worker_of(module, threads)
    monkeypatch.setattr(signal, "getsignal", lambda kind: worker.handle_exit)


@pytest.mark.parametrize(
    ("module", "threads", "most"),
    [("gthread", 8, 4), ("gthread", 3, 1), ("gthread", 2, 1), ("sync", 1, 0)],
)
def test_streams_have_half_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, module: str, threads: int, most: int
) -> None:
    serve_by(monkeypatch, f"gunicorn.workers.{module}", threads)
    taken, streams = Threads(), [Stream() for _ in range(threads)]
    assert sum(map(taken.take, streams)) == most
    for stream in streams:
        taken.release(stream)
        taken.release(stream)
    assert sum(map(taken.take, streams)) == most


@pytest.mark.parametrize("module", ["gunicorn.workers.ggevent", "gunicorn.workers.geventlet"])
def test_greenlets_are_not_counted(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    serve_by(monkeypatch, module, 1)
    taken = Threads()
    assert all(taken.take(Stream()) for _ in range(100))


def test_without_a_worker_of_gunicorn_threads_are_not_counted() -> None:
    taken = Threads()
    assert all(taken.take(Stream()) for _ in range(100))


def test_a_stream_that_is_dropped_gives_its_thread_back(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_by(monkeypatch, "gunicorn.workers.gthread", 2)
    taken = Threads()
    for _ in range(10):
        assert taken.take(Stream())
        gc.collect()


def test_one_stream_at_a_time_has_a_thread_for_what_is_large() -> None:
    taken, one, other = Threads(), Stream(), Stream()
    assert [taken.lend(it) for it in (one, other, one)] == [True, False, False]
    taken.release(other)
    assert not taken.lend(other)
    taken.release(one)
    assert taken.lend(other)
    del other
    gc.collect()
    assert taken.lend(one)


def test_it_is_said_once_that_threads_are_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve_by(monkeypatch, "gunicorn.workers.gthread", 2)
    taken, streams = Threads(), [Stream() for _ in range(3)]
    assert list(map(taken.take, streams)) == [True, False, False]
    [record] = caplog.records
    assert "they have 1 of the server's threads" in record.getMessage()


def test_a_forked_child_has_all_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_by(monkeypatch, "gunicorn.workers.gthread", 2)
    taken, streams = Threads(), [Stream(), Stream()]
    assert taken.take(streams[0])
    taken._start()  # what os.register_at_fork() calls
    assert taken.take(streams[1])
