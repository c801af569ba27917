from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from werkzeug.exceptions import ServiceUnavailable

from flask_eventstream import ServerSentEvent
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.opening import come_again, first_events, open_stream, opening, take_place
from flask_eventstream.state import current_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask

    from flask_eventstream.state import State


def nobody() -> None:
    pass


@pytest.fixture
def state(app: Flask) -> Iterator[State]:
    with app.test_request_context("/stream", headers={"Last-Event-ID": "x"}):
        yield current_state()


def test_a_stream_opens_with_a_comment_and_a_jittered_retry_and_no_blank_line(
    state: State,
) -> None:
    found = {opening(state.config) for _ in range(100)}
    assert all(wire.startswith(b":\nretry: ") and wire.count(b"\n") == 2 for wire in found)
    times = sorted(int(wire.split()[-1]) for wire in found)
    assert 2400 <= times[0] < times[-1] <= 3600


def test_what_was_replayed_is_not_kept_once_it_is_sent(state: State) -> None:
    state.broker.publish("x" * 10_000, channel="news")
    subscription = state.broker.subscribe("news", history=1)
    start = first_events(state.config, subscription, None)
    assert len(start) > 10_000
    response = open_stream(state, subscription, start, take_place(state, nobody))
    assert subscription.start == b""
    response.close()


def test_a_stream_begins_with_what_it_is_given(state: State) -> None:
    subscription = state.broker.subscribe("news")
    place = take_place(state, nobody)
    response = open_stream(state, subscription, b"data: x\n\n", place)
    assert next(iter(response.iter_encoded())).endswith(b"\ndata: x\n\n")
    assert state.places.taken == 1
    response.close()
    assert state.broker.subscriptions == state.places.taken == 0


def test_who_is_sent_away_for_a_while_gets_the_opening_alone(state: State) -> None:
    response = come_again(state.config, BrokerUnavailableError("redis://there", "no answer"))
    assert response.status_code == 200
    assert b"".join(response.iter_encoded()).startswith(b":\nretry: ")


def test_there_is_room_or_there_is_503(state: State) -> None:
    take_place(state, nobody).release()
    state.places.max_all = 0
    with pytest.raises(ServiceUnavailable):
        take_place(state, nobody)


def test_a_snapshot_comes_behind_what_was_missed(state: State) -> None:
    id = state.broker.publish("old", channel="news")
    subscription = state.broker.subscribe("news", history=1)
    snapshot = ServerSentEvent("all", "snapshot")
    assert first_events(state.config, subscription, lambda: snapshot) == (
        f"data: old\nid: {id}\n\nevent: snapshot\ndata: all\nid: {id}\n\n".encode()
    )
    assert first_events(state.config, subscription, lambda: None) == subscription.start
    assert first_events(state.config, subscription, None) == subscription.start
    resumed = state.broker.subscribe("news", last_event_id=id)
    assert first_events(state.config, resumed, pytest.fail) == b""
