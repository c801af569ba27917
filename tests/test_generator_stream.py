from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask

from flask_eventstream import EventStreamResponse, interval, merge
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.shutdown import StreamStopped

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_eventstream.shutdown import Shutdown


def shutdown_of(app: Flask) -> Shutdown:
    shutdown: Shutdown = app.extensions["eventstream"].shutdown
    return shutdown


class Reader:
    """Reads a stream of an app on a thread of its own, to its end."""

    def __init__(self, app: Flask, view: Callable[[], Iterator[Any]], **options: Any) -> None:
        app.add_url_rule("/", view_func=lambda: EventStreamResponse(view(), **options))
        self.wire = b""
        self._thread = threading.Thread(target=self._read, args=[app])
        self._thread.start()

    def _read(self, app: Flask) -> None:
        answer = app.test_client().get("/", buffered=False)
        for part in answer.response:
            assert isinstance(part, bytes)
            self.wire += part
        answer.close()

    def rest(self) -> bytes:
        self._thread.join(20)
        assert not self._thread.is_alive(), self.wire
        return self.wire


def endless() -> Iterator[int]:
    yield from interval(0.01)


def waiting() -> Iterator[int]:
    yield 0
    yield from interval(3600)


def merged() -> Iterator[int]:
    yield from merge([0], interval(3600))


@pytest.mark.parametrize(
    ("view", "heartbeat"), [(endless, None), (waiting, None), (waiting, 5), (merged, None)]
)
def test_a_stream_ends_without_its_end_when_the_server_stops(
    app: Flask, view: Any, heartbeat: float | None
) -> None:
    reader = Reader(app, view, heartbeat=heartbeat)
    wait_for(lambda: b"data: 0\n\n" in reader.wire)
    shutdown_of(app).begin()
    # Browsers return, and the view runs again.
    assert b"event: " not in reader.rest()
    assert reader.wire.splitlines()[-1].startswith(b"retry: ")
    assert not shutdown_of(app)._streams


def test_openais_clients_are_told_by_an_error(app: Flask) -> None:
    reader = Reader(app, lambda: iter(waiting()), format="openai")
    wait_for(lambda: b"data: 0\n\n" in reader.wire)
    shutdown_of(app).begin()
    assert b'"code": "server_stopped"' in reader.rest()
    assert b"[DONE]" not in reader.wire


def test_what_a_view_does_when_it_is_stopped_is_done(app: Flask) -> None:
    seen: list[str] = []

    def view() -> Iterator[int]:
        try:
            yield from waiting()
        except Exception:
            seen.append("no error")
            raise
        finally:
            seen.append("closed")

    reader = Reader(app, view)
    wait_for(lambda: b"data: 0\n\n" in reader.wire)
    shutdown_of(app).begin()
    reader.rest()
    assert seen == ["closed"]


def test_a_stream_that_begins_when_the_server_stops_ends_after_its_first_item(app: Flask) -> None:
    shutdown_of(app).begin()
    first, end = Reader(app, lambda: iter(range(9))).rest().split(b"\n\n")
    assert first == b"data: 0"
    assert end.startswith(b"retry: ")


def test_a_view_that_is_stopped_before_its_first_item_is_an_empty_stream(app: Flask) -> None:
    def view() -> Iterator[int]:
        raise StreamStopped
        yield 0

    assert Reader(app, view).rest().startswith(b"retry: ")


def test_streams_of_an_app_without_a_blueprint_end_too() -> None:
    app = Flask(__name__)
    reader = Reader(app, waiting)
    wait_for(lambda: b"data: 0\n\n" in reader.wire)
    app.extensions["eventstream.shutdown"].begin()
    assert reader.rest().splitlines()[-1].startswith(b"retry: ")


def test_nothing_is_left_of_streams_that_have_ended(app: Flask) -> None:
    reader = Reader(app, lambda: iter([1, 2]))
    assert reader.rest().endswith(b"event: end\ndata: {}\nid: end\n\n")
    with app.test_request_context():
        stream = EventStreamResponse(merge([1], interval(0.01)))
        stream.close()
    assert not shutdown_of(app)._streams


def test_an_interval_needs_no_app_and_a_pause() -> None:
    assert next(interval(0.001)) == 0
    with pytest.raises(ConfigurationError, match="seconds=0"):
        interval(0)
