from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.errors import BrokerClosedError
from flask_eventstream.follow import (
    Answer,
    StreamError,
    follow,
    from_broker,
    from_url,
    opened,
    pause_before,
    shown,
)

from .canned import END, GONE, STREAM, answered, canned, chunked
from .servers import wait_for

if TYPE_CHECKING:
    from flask_eventstream.event import ServerSentEvent
    from flask_eventstream.follow import Read


pytestmark = pytest.mark.beside


class Following:
    """Reads a stream to its end: the events, what was said, and how long each pause was."""

    def __init__(self, read: Read, last_event_id: str = "") -> None:
        self.said: list[str] = []
        self.pauses: list[float] = []
        chunks = list(follow(read, last_event_id, self.said.append, self.pauses.append))
        self.wire = b"".join(wire for wire, _ in chunks)
        self.events: list[ServerSentEvent] = [event for _, events in chunks for event in events]


def test_a_stream_that_ends_is_continued_after_its_last_event_until_204() -> None:
    first = chunked(b"retry: 250\n", "id: 数\ndata: 1\n\n".encode())
    with canned(STREAM + first + END, STREAM + chunked(b"data: 2\n\n") + END, GONE) as server:
        followed = Following(from_url(f"{server.url}/a b?channel=数", {"X-Own": "1"}), "0")
    assert [(event.data, event.id) for event in followed.events] == [("1", "数"), ("2", "数")]
    assert followed.wire == "retry: 250\nid: 数\ndata: 1\n\ndata: 2\n\n".encode()
    assert followed.pauses == [0.25, 0.25]
    assert followed.said[0] == "The stream has ended. Connecting again in 0.25 s."
    assert [
        f"Last-Event-ID: {id}\r\n" in request
        for id, request in zip("0数数", server.requests, strict=True)
    ]
    assert server.requests[0].startswith("GET /a%20b?channel=%E6%95%B0 HTTP/1.1\r\n")
    for request in server.requests:
        assert "Accept: text/event-stream\r\n" in request
        assert "X-Own: 1\r\n" in request


def test_what_is_lost_or_broken_is_tried_again_after_longer_and_longer() -> None:
    broken = STREAM + chunked(b"retry: 2000\n\ndata: 1\n\n") + b"40\r\ndata: ha"
    busy = answered("503 Service Unavailable", "All places are taken.")
    with canned(b"", busy, busy, broken, busy, GONE) as server:
        followed = Following(from_url(server.url, {}))
    assert [event.data for event in followed.events] == ["1"]
    assert followed.pauses == [3, 6, 12, 2, 4]
    assert "503 Service Unavailable All places are taken. Connecting again" in followed.said[1]
    assert "IncompleteRead" in followed.said[3]


def test_a_silent_connection_is_given_up() -> None:
    with canned(STREAM + b"...") as server, Answer(server.url, {}, 5) as answer:
        with pytest.raises(TimeoutError):
            answer.chunk(0.01)


def test_an_answer_that_is_no_stream_is_an_error_that_shows_it() -> None:
    answers = (
        answered("403 Forbidden", "Reading 'x' is\n not allowed."),
        answered("404 Not Found", "no", "Content-Type: text/event-stream"),
        answered("200 OK", "<p>Hello!</p>", "Content-Type: text/html"),
        b"HTTP/1.1 410 Gone\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    expected = ["403 Forbidden Reading 'x' is not allowed", "404 Not Found no", "text/html", "410"]
    with canned(*answers) as server:
        for text in expected:
            with pytest.raises(StreamError, match=text):
                Following(from_url(server.url, {}))


def test_redirects_are_followed_and_the_users_headers_stay_on_their_site() -> None:
    with canned(STREAM + END) as other:
        there = answered("307 Temporary Redirect", "", f"Location: {other.url}/there")
        with canned(answered("302 Found", "", "Location: /here"), there) as server:
            own = {
                "Authorization": "Bearer secret",
                "X-Key": "secret",
                "Accept": "text/event-stream",
            }
            with opened(server.url, own, 5) as answer:
                assert answer.url == f"{other.url}/there"
                assert answer.is_stream
    assert [request.split()[1] for request in server.requests] == ["/", "/here"]
    assert all("Bearer secret" in request for request in server.requests)
    assert "secret" not in other.requests[0]
    assert "Accept: text/event-stream" in other.requests[0]


def test_a_circle_of_redirects_is_an_error() -> None:
    circle = answered("301 Moved Permanently", "", "Location: /")
    with canned(*[circle] * 6) as server, pytest.raises(StreamError, match="more than 5 redirects"):
        opened(server.url, {}, 5)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "http://",
        "http://host:port/",
        "http://user:secret@host/",
        "http://user:secret/more@host/",
        "http://user:se#cret@host/",
        "http:/user:secret@host/",
        "http://.a./",
        "//a",
    ],
)
def test_a_url_that_cannot_be_used_is_an_error(url: str) -> None:
    with pytest.raises(StreamError, match="http://host/path") as caught:
        opened(url, {}, 1)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_no_connection() -> None:
    with pytest.raises(ConnectionError, match="no connection"):
        opened("https://127.0.0.1:1/", {}, 5)


@pytest.mark.parametrize(
    ("retry", "failures", "pause"),
    [(3, 0, 3), (3, 1, 3), (3, 2, 6), (3, 4, 24), (3, 5, 30), (3, 999, 30), (0, 0, 0.1), (0, 1, 1)],
)
def test_pauses_grow_up_to_a_limit(retry: float, failures: int, pause: float) -> None:
    assert pause_before(retry, failures) == pause


def test_a_stream_may_ask_for_any_pause() -> None:
    assert pause_before(60, 1) == 60
    assert pause_before(1e300, 0) == threading.TIMEOUT_MAX


def test_channels_are_read_through_a_broker_and_continue_when_they_were_ended() -> None:
    broker, received = MemoryBroker(), list[str]()
    cursor = broker.publish("before", channel="a")
    broker.publish("missed", channel="a")

    def act(_: float) -> None:
        broker.publish("meanwhile", channel="b")

    def receive() -> None:
        for _, events in follow(from_broker(broker, ("a", "b")), cursor, print, act):
            received.extend(event.data for event in events)

    def run() -> None:
        with pytest.raises(BrokerClosedError):
            receive()

    reader = threading.Thread(target=run)
    reader.start()
    wait_for(lambda: broker.channels() == {"a": 1, "b": 1})
    broker.disconnect("a")
    wait_for(lambda: received == ["missed", "meanwhile"])
    broker.close()
    reader.join(5)
    assert not reader.is_alive()


def test_what_could_steer_a_terminal_is_shown_and_not_sent() -> None:
    text = "\x1b]0;title\x07 \x9b31m a\rb\tc\x7f \u202egnp.exe \u2066"
    assert shown(text) == "\\x1b]0;title\\x07 \\x9b31m a\\rb\\tc\\x7f \\u202egnp.exe \\u2066"
    assert shown("Hé, 你好! 👩\u200d💻 \\x1b") == "Hé, 你好! 👩\u200d💻 \\x1b"
