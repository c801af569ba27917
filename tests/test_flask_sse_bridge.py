"""The bridge's own rules, and what it makes of what breaks."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask

from flask_eventstream import flask_sse_bridge
from flask_eventstream.config import Config
from flask_eventstream.flask_sse import event_of
from flask_eventstream.flask_sse_bridge import Bridge
from flask_eventstream.redis_broker import RedisBroker

from .faults import proxy
from .servers import ROOT, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_eventstream import ServerSentEvent, Subscription
    from flask_eventstream.redis_link import Listener

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

PROVIDER = Flask("bridge").json


def sent(redis: RedisServer, data: Any, channel: str, **options: Any) -> None:
    """Publish as Flask-SSE does."""
    redis.redis.publish(channel, json.dumps({"data": data, **options}))


class Side:
    """A process' worth: a broker, its bridge, and what a subscriber of a channel gets."""

    def __init__(self, url: str, broker_url: str, prefix: str, **config: Any) -> None:
        self.broker = RedisBroker(broker_url, key_prefix=prefix)
        config = {"broker_url": broker_url, "key_prefix": prefix, **config}
        as_event = partial(event_of, provider=PROVIDER)
        self.bridge = Bridge(self.broker, Config(**config), url, as_event)
        self.wire = b""

    def subscribe(self, channel: str) -> Subscription:
        self.bridge.follow(channel)
        return self.broker.subscribe(channel)

    def has_got(self, subscription: Subscription, *texts: str) -> bool:
        self.wire += subscription.take(0.05) or b""
        return all(text.encode() in self.wire for text in texts)

    def close(self) -> None:
        self.bridge.stop()
        self.broker.close()


@pytest.fixture
def side(redis: RedisServer) -> Iterator[Callable[..., Side]]:
    """Return what makes a side; all sides of a test belong to one app."""
    made: list[Side] = []
    prefix = redis.prefix()

    def make(url: str = redis.url, broker_url: str = redis.url, **config: Any) -> Side:
        made.append(Side(url, broker_url, prefix, **config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def heard(redis: RedisServer, channel: str) -> int:
    return int(redis.redis.pubsub_numsub(channel)[0][1])


def test_while_processes_come_and_go_each_message_is_taken_once(
    side: Callable[..., Side], redis: RedisServer
) -> None:
    first = side()
    subscription = first.subscribe("seam")
    numbers = iter(range(1_000_000))
    is_over = threading.Event()

    def send() -> None:
        while not is_over.is_set():
            sent(redis, f"<{next(numbers)}>", "seam")

    publisher = threading.Thread(target=send)
    publisher.start()
    for _ in range(10):
        other = side()
        other.bridge.follow("seam")
        wire = subscription.take(20)
        assert wire
        first.wire += wire
        other.close()
    is_over.set()
    publisher.join()
    last = next(numbers)
    sent(redis, f"<{last}>", "seam")
    wait_for(lambda: first.has_got(subscription, *[f"<{n}>" for n in range(last + 1)]))
    found = [line for line in first.wire.split(b"\n") if line.startswith(b"data: ")]
    assert Counter(found) == Counter(b"data: <%d>" % n for n in range(last + 1))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Side], threading.Event]]:
    """Return what has a side stand still at its next message until an event is set."""
    gates = []

    def shut(one: Side) -> threading.Event:
        as_event = one.bridge._as_event
        gates.append(threading.Event())

        def wait(text: bytes) -> ServerSentEvent:
            gates[-1].wait(20)
            return as_event(text)

        monkeypatch.setattr(one.bridge, "_as_event", wait)
        return gates[-1]

    yield shut
    for one in gates:
        one.set()


def test_a_process_that_has_just_come_overtakes_nobody(
    side: Callable[..., Side],
    redis: RedisServer,
    gate: Callable[[Side], threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_HOLD_SECONDS", 20)
    slow, quick = side(), side()
    slow.subscribe("overtaking").close()
    go_on = gate(slow)
    sent(redis, "1", "overtaking")
    subscription = quick.subscribe("overtaking")
    sent(redis, "2", "overtaking")
    wait_for(lambda: len(quick.bridge._held) == 1)
    go_on.set()
    wait_for(lambda: quick.has_got(subscription, "data: 1\n", "data: 2\n"))
    assert quick.wire.index(b"data: 1\n") < quick.wire.index(b"data: 2\n")


def test_what_the_others_do_not_take_it_takes_itself_in_the_end(
    side: Callable[..., Side], redis: RedisServer, gate: Callable[[Side], threading.Event]
) -> None:
    stuck, other = side(), side()
    stuck.subscribe("stuck").close()
    gate(stuck)
    sent(redis, "1", "stuck")
    subscription = other.subscribe("stuck")
    for n in (2, 3):
        sent(redis, n, "stuck")
    wait_for(lambda: other.has_got(subscription, "data: 2\n", "data: 3\n"))
    assert b"data: 1\n" not in other.wire


def test_a_message_that_nobody_could_have_published_is_left_out_and_logged(
    side: Callable[..., Side], redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = side()
    subscription = one.subscribe("odd")
    epoch = one.broker.publish("x", channel="odd").partition("-")[0]
    bad = ["no JSON", "[]", '{"type": "x"}', "\ud800", '{"data": "a", "type": "b\\nc"}']
    bad += ['{"data": "a", "retry": "b"}', f'{{"data": {"[" * 100_000}}}', '{"data": "\\ud800"}']
    bad += [f'{{"data": "a", "id": "{epoch}-7"}}', json.dumps({"data": "x" * 1024 * 1024})]
    for text in bad:
        redis.redis.publish("odd", text.encode("utf-8", "surrogatepass"))
    sent(redis, "fine", "odd")
    wait_for(lambda: one.has_got(subscription, "data: fine"))
    assert one.wire.count(b"data: ") == 2
    assert caplog.text.count("was left out") == len(bad)
    assert f"id='{epoch}-7' has the form of this broker's own ids" in caplog.text


def test_a_connection_that_is_cut_is_made_anew(
    side: Callable[..., Side], own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = side(own_redis.url, own_redis.url)
    subscription = one.subscribe("cut")
    own_redis.redis.client_kill_filter(_type="pubsub", skipme=True)
    wait_for(lambda: "others may hear, or nobody" in caplog.text)
    wait_for(lambda: "cut" in one.bridge._ready)
    sent(own_redis, "after", "cut")
    wait_for(lambda: one.has_got(subscription, "data: after"))


def test_while_redis_is_away_nobody_waits_for_it(
    side: Callable[..., Side], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = side(own_redis.url)
    own_redis.kill()
    subscription = one.subscribe("away")
    assert one.bridge._has_failed
    tried = []
    listen = one.bridge._link.listen

    def note() -> Listener:
        tried.append(True)
        return listen()

    monkeypatch.setattr(one.bridge._link, "listen", note)
    wait_for(lambda: len(tried) >= 2)
    own_redis.start()
    wait_for(lambda: "away" in one.bridge._ready)
    sent(own_redis, "back", "away")
    wait_for(lambda: one.has_got(subscription, "data: back"))


def test_silence_is_broken_by_asking_and_a_dead_connection_is_replaced(
    side: Callable[..., Side],
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(flask_sse_bridge, "_TICK_SECONDS", 0.05)
    with proxy(redis.port) as between:
        one = side(f"redis://127.0.0.1:{between.port}")
        subscription = one.subscribe("silent")
        asked: list[bool] = []
        wake = one.bridge._wake

        def note() -> None:
            asked.append(True)
            wake()

        monkeypatch.setattr(one.bridge, "_wake", note)
        wait_for(lambda: len(asked) >= 2)
        between.lose_messages()
        wait_for(lambda: "nothing was heard for" in caplog.text)
        wait_for(lambda: "silent" in one.bridge._ready)
        sent(redis, "x", "silent")
        wait_for(lambda: one.has_got(subscription, "data: x"))
        one.close()


def test_what_a_broker_cannot_take_is_told(
    side: Callable[..., Side],
    redis: RedisServer,
    own_redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = side(broker_url=own_redis.url)
    subscription = one.subscribe("full")
    sent(redis, "first", "full")
    wait_for(lambda: one.has_got(subscription, "data: first"))
    own_redis.redis.config_set("maxmemory", 1)
    sent(redis, "refused", "full")
    wait_for(lambda: "was left out" in caplog.text)
    own_redis.redis.config_set("maxmemory", 0)
    sent(redis, "second", "full")
    wait_for(lambda: one.has_got(subscription, "data: second"))
    own_redis.kill()
    sent(redis, "lost", "full")
    wait_for(lambda: "others may hear, or nobody" in caplog.text)
    assert b"refused" not in one.wire


def test_whatever_fails_the_next_message_is_heard(
    side: Callable[..., Side],
    redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = side()
    subscription = one.subscribe("broken")
    as_event = one.bridge._as_event

    def fail(text: bytes) -> ServerSentEvent:
        monkeypatch.setattr(one.bridge, "_as_event", as_event)
        raise KeyError("a provider of the app's own")

    monkeypatch.setattr(one.bridge, "_as_event", fail)
    sent(redis, "x", "broken")
    wait_for(lambda: "could not be heard" in caplog.text)
    wait_for(lambda: "broken" in one.bridge._ready)
    sent(redis, "y", "broken")
    wait_for(lambda: one.has_got(subscription, "data: y"))


def test_a_channel_that_is_heard_already_needs_nothing_of_redis(
    side: Callable[..., Side], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = side()
    one.bridge.follow("heard")
    wait_for(lambda: "heard" in one.bridge._ready)
    monkeypatch.setattr(one.bridge, "_wake", None)
    one.bridge.follow("heard")


class Heard:
    """A connection that hears what the test says, and ends the bridge's work after that.

    :param bridge: what it is for.
    :param early: what comes between a subscription to a channel and its confirmation.
    :param late: what comes once the channel is heard, each with the name that it comes by.
    """

    def __init__(self, bridge: Bridge, early: list[bytes], late: list[tuple[bytes, bytes]]) -> None:
        self._bridge, self._early, self._late = bridge, early, late
        self._messages: deque[list[Any]] = deque()

    def connect(self) -> None: ...
    def close(self) -> None: ...

    def send(self, command: str, names: list[bytes]) -> None:
        assert command == "SUBSCRIBE"
        for name in names:
            if name not in (self._bridge._keys.notes, self._bridge._own):
                self._messages += [[b"message", name, text] for text in self._early]
            self._messages.append([b"subscribe", name, 1])

    def has_message(self, timeout: float) -> bool:
        if not self._messages:
            for token in tuple(self._bridge._joining):
                note = [b"message", self._bridge._keys.notes, b"round " + token.encode()]
                self._messages += [note, *([b"message", *one] for one in self._late)]
        if not self._messages:
            self._bridge.stop()
        return bool(self._messages)

    def read(self) -> list[Any]:
        return self._messages.popleft()


@pytest.mark.parametrize("in_a_row", [1, 256])
def test_what_comes_before_a_channel_is_heard_and_copies_are_left_to_others(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch, in_a_row: int
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_MESSAGES_IN_A_ROW", in_a_row)
    bridge = side().bridge
    offered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(bridge, "_offer", lambda *arguments: offered.append(arguments))
    bridge._followed = {"c": time.monotonic()}
    late = [
        (b"c", b"first"),
        (bridge._keys.notes, b"copy c"),
        (b"c", b"a copy"),
        (b"other", b"of a channel that was left"),
        (bridge._own, b""),
        (b"c", b"second"),
    ]
    bridge._hear_on(Heard(bridge, [b"early"], late))  # type: ignore[arg-type]
    assert [(channel, number, text) for channel, _, number, text in offered] == [
        ("c", 1, b"first"),
        ("c", 2, b"second"),
    ]


def test_what_waits_for_others_is_offered_once_that_is_over(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_HOLD_SECONDS", 3600)
    bridge = side().bridge
    offered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(bridge, "_offer", lambda *arguments: offered.append(arguments))
    bridge._followed = {"c": time.monotonic()}
    # As if the note had reached another process, too.
    monkeypatch.setattr(bridge._link, "pipeline", lambda commands, begin: [2])
    bridge._hear_on(Heard(bridge, [], [(b"c", b"held")]))  # type: ignore[arg-type]
    assert (offered, len(bridge._held)) == ([], 1)
    bridge._held = [(0.0, *each[1:]) for each in bridge._held]
    bridge._offer_held()
    assert [each[-1] for each in offered] == [b"held"]
    assert bridge._held == []


def test_a_flood_of_messages_is_taken_in_order(
    side: Callable[..., Side], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_MESSAGES_IN_A_ROW", 2)
    one = side()
    subscription = one.subscribe("flood")
    with redis.redis.pipeline() as pipeline:
        for n in range(300):
            pipeline.publish("flood", json.dumps({"data": n}))
        pipeline.execute()
    wait_for(lambda: one.has_got(subscription, "data: 299\n"))
    found = [line[6:] for line in one.wire.split(b"\n") if line.startswith(b"data: ")]
    assert found == [b"%d" % n for n in range(300)]


def test_a_channel_is_heard_for_a_while_after_its_last_subscriber(
    side: Callable[..., Side], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(flask_sse_bridge, "_LEAST_PATIENCE", 0.1)
    one = side(history_seconds=0.5)
    subscription = one.subscribe("idle")
    one.bridge.follow("unread")
    wait_for(lambda: not heard(redis, "unread"))
    assert heard(redis, "idle") == 1
    subscription.close()
    wait_for(lambda: not heard(redis, "idle"))
    again = one.subscribe("idle")
    sent(redis, "x", "idle")
    wait_for(lambda: one.has_got(again, "data: x"))


def test_made_up_names_do_not_pile_up(
    side: Callable[..., Side], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flask_sse_bridge, "_SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(flask_sse_bridge, "_MOST_IDLE", 2)
    one = side()
    subscription = one.subscribe("read")
    for n in range(6):
        one.bridge.follow(f"made up {n}")
    names = [f"made up {n}" for n in range(6)]
    wait_for(lambda: [heard(redis, name) for name in names] == [0, 0, 0, 0, 1, 1])
    assert heard(redis, "read") == 1
    subscription.close()


def test_a_copy_that_cannot_be_sent_is_told_and_no_error(
    side: Callable[..., Side], own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = side(own_redis.url)
    own_redis.kill()
    one.bridge.copy("sse", "{}")
    assert "No copy was sent to Flask-SSE" in caplog.text
    own_redis.start()


def test_a_bridge_for_which_there_is_no_thread_is_built_later(
    side: Callable[..., Side], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one = side()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            one.bridge.follow("late")
    subscription = one.subscribe("late")
    sent(redis, "x", "late")
    wait_for(lambda: one.has_got(subscription, "data: x"))


def test_a_forked_child_hears_by_itself(side: Callable[..., Side], redis: RedisServer) -> None:
    one = side()
    subscription = one.subscribe("forked")
    child = os.fork()
    if not child:
        status = 1
        try:
            one.bridge.follow("forked")
            status = int(heard(redis, "forked") != 2)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    sent(redis, "x", "forked")
    wait_for(lambda: one.has_got(subscription, "data: x"))


def test_the_rights_in_the_documentation_are_enough(
    own_redis: RedisServer,
) -> None:
    command: Any = own_redis.redis.execute_command
    for name in ("redis", "flask-sse"):
        page = (ROOT / "docs" / f"{name}.rst").read_text("utf-8")
        [rule] = [line for line in page.splitlines() if line.startswith("    ACL SETUSER")]
        command(*rule.split())
    url = own_redis.url.replace("//", "//app:secret@")
    one = Side(url, url, "eventstream:")
    subscription = one.subscribe("sse")
    sent(own_redis, "x", "sse")
    one.bridge.copy("sse", '{"data": "copy"}')
    sent(own_redis, "y", "sse")
    wait_for(lambda: one.has_got(subscription, "data: x", "data: y"))
    assert b"copy" not in one.wire
    one.close()
