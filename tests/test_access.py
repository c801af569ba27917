from __future__ import annotations

import resource
import sys

import pytest
from flask import Flask
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException

from flask_eventstream import access
from flask_eventstream.places import Places


@pytest.fixture
def app() -> Flask:
    return Flask(__name__)


@pytest.mark.parametrize(
    ("query", "channels"),
    [
        ("", ("sse",)),
        ("?channel=a", ("a",)),
        ("?channel=a&channel=b&channel=a", ("a", "b")),
        ("?channel=room%3A1&other=x", ("room:1",)),
        ("?channel=%E6%95%B0", ("数",)),
    ],
)
def test_the_query_names_the_channels(app: Flask, query: str, channels: tuple[str, ...]) -> None:
    with app.test_request_context(f"/{query}"):
        assert access.requested_channels(3) == channels


@pytest.mark.parametrize("query", ["?channel=", "?channel=%00", f"?channel={'x' * 256}"])
def test_a_name_that_no_channel_can_have_is_400(app: Flask, query: str) -> None:
    with app.test_request_context(f"/{query}"), pytest.raises(BadRequest, match="channel="):
        access.requested_channels(3)


def test_too_many_channels_are_400(app: Flask) -> None:
    query = "&".join(f"channel={n}" for n in range(4))
    with (
        app.test_request_context(f"/?{query}"),
        pytest.raises(BadRequest, match="4 channels were asked for; at most 3"),
    ):
        access.requested_channels(3)


def test_only_the_default_channel_is_open_unless_the_app_says_otherwise() -> None:
    access.check_may_read(("sse",), [])
    with pytest.raises(Forbidden, match="'news' is not allowed"):
        access.check_may_read(("sse", "news"), [])


def test_the_app_decides_for_each_channel() -> None:
    begins_with_a = [lambda channel: bool(channel.startswith("a"))]
    access.check_may_read(("a1", "a2"), begins_with_a)
    with pytest.raises(Forbidden, match="'b1'"):
        access.check_may_read(("a1", "b1"), begins_with_a)
    with pytest.raises(Forbidden, match="'sse'"):
        access.check_may_read(("sse",), [lambda channel: False])


def test_every_judge_must_allow_it() -> None:
    access.check_may_read(("a",), [lambda channel: True, lambda channel: True])
    with pytest.raises(Forbidden):
        access.check_may_read(("a",), [lambda channel: True, lambda channel: False])


def test_beyond_a_limit_there_is_no_place(app: Flask) -> None:
    places = Places(max_all=2, max_per_address=1, max_per_user=1)

    def status_of(address: str, user: str | None) -> int | None:
        with (
            app.test_request_context(environ_base={"REMOTE_ADDR": address}),
            pytest.raises(HTTPException) as caught,
        ):
            access.take_place(places, user)
        assert ("Retry-After", "5") in caught.value.get_headers()
        return caught.value.code

    with app.test_request_context(environ_base={"REMOTE_ADDR": "::1"}):
        kept = [access.take_place(places, "me")]
    assert status_of("::2", "you") == 429
    assert status_of("::0:1:0:0:0:1", "me") == 429
    kept.append(places.take("192.0.2.1"))
    assert status_of("192.0.2.2", None) == 503
    for place in kept:
        place.release()


@pytest.mark.parametrize(
    ("descriptors", "room"),
    [(1024, 922), (1_000_000, 900_000), (50, 1), (resource.RLIM_INFINITY, None)],
)
def test_the_descriptors_leave_room_for_ordinary_requests(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, room: int | None
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (descriptors, descriptors))
    assert access.default_max_subscribers() == room


def test_a_system_without_such_a_limit_has_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert access.default_max_subscribers() is None
