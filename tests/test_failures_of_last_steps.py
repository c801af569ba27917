"""What is done when the last step of something fails, which no server brings about by itself."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import redis

from flask_eventstream import descriptors
from flask_eventstream.event import encode_comment
from flask_eventstream.format import StreamFormat
from flask_eventstream.hijack import HijackingBody
from flask_eventstream.hub import SocketHub
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.redis_link import RedisLink
from flask_eventstream.redis_runs import RedisRegistry, _Own
from flask_eventstream.redis_scripts import Keys, MalformedError, Message
from flask_eventstream.response import _hand_over
from flask_eventstream.run import Run
from flask_eventstream.run_registry import ACTIVE, LOST, Standing
from flask_eventstream.runs import Runs
from flask_eventstream.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import Callable

NOWHERE = "redis://127.0.0.1:1"


def test_a_watcher_that_could_not_open_opens_later(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = descriptors.Watcher()

    def refuse(*_: int) -> int:
        raise OSError("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", refuse)
        with pytest.raises(OSError, match="too many"):
            watcher.open()
    assert not watcher.is_open
    watcher.open()
    assert watcher.is_open


class Failing(deque[Any]):
    """A queue that takes what it is given, and fails all the same."""

    def append(self, one: Any) -> None:
        super().append(one)
        raise MemoryError


class Silent:
    """A source without events, and a stream that has it."""

    end = None
    deadline = 0.0
    patience = None

    def __init__(self) -> None:
        self.subscription = self
        self.channel_set = self
        self.position = 0
        self.replay = None

    def take_start(self) -> bytes:
        return b""

    def finish_by(self, finish: Callable[[], None]) -> None:
        pass


def idle_hub() -> SocketHub:
    hub = SocketHub(lambda ring: tuple, 60, encode_comment(), 60, lambda streams: b"")
    # It has no loop, which would take what arrives.
    hub._is_running = True
    return hub


def hand_over(hub: SocketHub, descriptor: int) -> BaseException | None:
    class Hijacked:
        head = b""
        is_chunked = False

    Hijacked.descriptor = descriptor  # type: ignore[attr-defined]
    stream: Any = Silent()
    return _hand_over(hub, stream, stream, Hijacked)  # type: ignore[arg-type]


def test_a_subscriber_that_the_hub_has_is_the_hubs_whatever_fails_then() -> None:
    hub = idle_hub()
    hub._arrived = Failing()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert isinstance(hand_over(hub, ours.fileno()), MemoryError)
        [subscriber] = hub._arrived
        assert isinstance(subscriber, Subscriber)
        assert hub.has(subscriber)


def test_a_subscriber_that_the_hub_has_not_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = idle_hub()

    def refuse() -> None:
        raise RuntimeError("no thread")

    monkeypatch.setattr(hub, "_start", refuse)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(RuntimeError, match="no thread"):
            hand_over(hub, ours.fileno())
        assert not hub._arrived


def giving_away(hand_over: Callable[[Any], BaseException | None]) -> HijackingBody:
    server: Any = None
    return HijackingBody(server, iter(()), hand_over, lambda: None, bool)


def test_a_socket_is_closed_once_where_it_could_not_be_handed_over() -> None:
    def refuse(_: Any) -> None:
        raise MemoryError

    ours, theirs = socket.socketpair()
    body = giving_away(refuse)
    with theirs:
        with pytest.raises(MemoryError):
            body._give_away(ours, b"", False)
        assert ours.fileno() == -1
        assert theirs.recv(1) == b""
    assert not body._is_over


def test_a_socket_that_could_not_be_detached_stays_with_its_object() -> None:
    class Attached(socket.socket):
        def detach(self) -> int:
            raise MemoryError

    ours, theirs = socket.socketpair()
    with theirs, Attached(fileno=ours.detach()) as attached:
        with pytest.raises(MemoryError):
            giving_away(lambda _: None)._give_away(attached, b"", False)
        attached.sendall(b"x")
        assert theirs.recv(1) == b"x"


def test_what_fails_behind_the_hand_over_is_the_servers_and_closes_nothing() -> None:
    ours, theirs = socket.socketpair()
    descriptor = ours.fileno()
    body = giving_away(lambda _: MemoryError())
    with theirs:
        with pytest.raises(MemoryError):
            body._give_away(ours, b"", False)
        assert body._is_over
        with socket.socket(fileno=descriptor) as taken:
            taken.sendall(b"x")
            assert theirs.recv(1) == b"x"


def test_an_error_of_redis_that_is_no_foreign_key_is_raised() -> None:
    link = RedisLink(NOWHERE, 1, 1)
    with pytest.raises(redis.ResponseError, match="OOM"):
        link._readable(("XRANGE", b"key"), redis.ResponseError("OOM"))


def test_the_keys_whose_foreign_entries_were_logged_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flask_eventstream.redis_link._MOST_LEFT_OUT", 1)
    link = RedisLink(NOWHERE, 1, 1)
    link.leave_out(b"a")
    link.leave_out(b"b")
    assert link._left_out == {b"b"}


def test_whatever_fails_while_redis_is_read_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = RedisBroker(NOWHERE)._reader
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        if len(tries) == 2:
            reader._stopping.set()
        raise KeyError("whatever")

    monkeypatch.setattr(reader._link, "listen", fail)
    reader._run()
    assert len(tries) == 2
    assert caplog.text.count("Redis could not be read, and is tried again") == 2


def test_a_message_of_another_kind_of_epoch_is_none_of_ours() -> None:
    with pytest.raises(MalformedError):
        Message.of(b"abc 1 5 \n\ndata: x\n\n", Keys("prefix:", 0))


def test_a_run_that_is_lost_is_ended_before_the_next_one_begins() -> None:
    ended: list[tuple[str, str]] = []
    answers = [Standing("old", ACTIVE, 3, is_lost=True), Standing("other", ACTIVE, 0)]

    class Registry:
        def begin(self, *_: Any) -> Standing:
            return answers.pop(0)

        def end(self, key: str, run: str, state: str, wire: bytes) -> bool:
            ended.append((run, state))
            return True

    registry: Any = Registry()
    run = Run("key", "", StreamFormat(str, 1000), str)
    runs = Runs(registry, 1)
    assert runs.begin(run, (), lambda produce: produce).run == "other"
    assert ended == [("old", LOST)]
    assert runs.active == 0


def test_a_run_whose_begin_is_doubtful_for_longer_than_its_lease_is_asked_for_no_more() -> None:
    # Redis is not there: to ask it would raise.
    link, keys = RedisLink(NOWHERE, 1, 1), Keys("prefix:", 0)
    registry = RedisRegistry(link, keys, bool, 60, lease=1, max_bytes=1, max_ended_bytes=1)
    registry._doubtful["run"] = time.monotonic() - 1, _Own("key", "", print, b"", "")
    registry._end_doubtful()
    assert not registry._doubtful
