from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
from werkzeug.exceptions import ServiceUnavailable

from flask_eventstream import ServerSentEvent
from flask_eventstream.errors import BrokerUnavailableError, InvalidFieldError
from flask_eventstream.opening import come_again, first_events, open_stream, opening, take_place
from flask_eventstream.state import current_state
from flask_eventstream.testing import client_stream

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask
    from flask.testing import FlaskClient

    from flask_eventstream import EventStream
    from flask_eventstream.state import State
    from flask_eventstream.testing import ClientStream


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


# Members


@pytest.fixture
def room(app: Flask, eventstream: EventStream) -> FlaskClient:
    @app.get("/room")
    @app.get("/room/<member>")
    def subscribe(member: str | None = None) -> Any:
        return eventstream.subscribe("room", "news", history=9, presence=True, member=member)

    return app.test_client()


def words(stream: ClientStream, number: int) -> list[str]:
    events = [stream.next() for _ in range(number)]
    found = [(event.type, json.loads(event.data)) for event in events]
    return [f"{type} {data.get('member', data.get('members', data))}" for type, data in found]


def test_a_newcomer_is_told_who_is_there_behind_history_and_hears_its_own_join(
    room: FlaskClient,
) -> None:
    with client_stream(room, "/room/ada") as ada, client_stream(room, "/room/bob") as bob:
        assert words(ada, 3) == ["present ['ada']", "join ada", "join bob"]
        assert words(bob, 3) == ["join ada", "present ['ada', 'bob']", "join bob"]


def test_who_continues_is_not_told_again_and_who_gets_a_reset_is(room: FlaskClient) -> None:
    with client_stream(room, "/room/ada") as ada:
        assert words(ada, 2) == ["present ['ada']", "join ada"]
        cursor = ada.last_event_id
        with client_stream(room, "/room/bob"):
            headers = {"Last-Event-ID": cursor}
            with client_stream(room, "/room/ada", headers=headers) as back:
                assert words(back, 1) == ["join bob"]
            headers = {"Last-Event-ID": "of-another-life"}
            with client_stream(room, "/room/ada", headers=headers) as back:
                lost, *heard = words(back, 4)
                assert lost.startswith("reset ")
                assert heard == ["join ada", "join bob", "present ['ada', 'bob']"]


def test_a_member_is_its_user_or_nobody(
    app: Flask, eventstream: EventStream, room: FlaskClient
) -> None:
    users: list[str | None] = [None, None, "7"]
    eventstream.identify(users.pop)
    with client_stream(room, "/room"), client_stream(room, "/room"), client_stream(room, "/room"):
        with app.app_context():
            seven, *others = eventstream.present("room")
        assert seven == "7"
        assert len({name for name in others if name.startswith("anonymous-")}) == 2


def test_who_is_dropped_by_whatever_it_is_leaves(
    app: Flask, eventstream: EventStream, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_eventstream.members.LOOK_SECONDS", 0.1)
    state.members.seconds = 0.01
    closed = eventstream.subscribe("room", presence=True, member="ada")
    dropped = eventstream.subscribe("room", presence=True, member="bob")
    assert eventstream.present("room") == ["ada", "bob"]
    closed.close()
    del dropped
    gc.collect()
    wait_for(lambda: eventstream.present("room") == [])


def test_a_member_that_cannot_be_is_an_error_and_leaves_nothing(
    eventstream: EventStream, state: State
) -> None:
    with pytest.raises(InvalidFieldError, match="member='' has 0 characters"):
        eventstream.subscribe("room", presence=True, member="")
    assert state.broker.subscriptions == state.places.taken == 0
    with pytest.raises(TypeError, match="presence=True"):
        eventstream.subscribe("room", member="ada")
    with pytest.raises(InvalidFieldError):
        eventstream.present("")


def test_who_cannot_be_told_of_comes_again(
    eventstream: EventStream, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(channel: str, member: str) -> None:
        raise BrokerUnavailableError("redis://there", "no answer")

    monkeypatch.setattr(state.members, "enter", refuse)
    response = eventstream.subscribe("room", presence=True)
    assert b"".join(response.iter_encoded()).count(b"\n") == 2
    assert state.broker.subscriptions == state.places.taken == 0
