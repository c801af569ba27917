from __future__ import annotations

import gc
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker, Subscription, endings
from flask_eventstream.descriptors import IS_GONE
from flask_eventstream.hub import SocketHub
from flask_eventstream.subscriber import Subscriber
from flask_eventstream.subscription import FRAME_BYTES

from .servers import DEADLINE, ROOT, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEAT = b":\n"


def farewell(streams: int) -> bytes:
    return b"retry: %d\n" % streams


class Owner:
    """What a subscriber belongs to; as a response, it ends the subscription."""

    def __init__(self, subscription: Any) -> None:
        self.subscription = subscription
        self.closed = 0
        self.reason = ""

    def end(self, reason: str) -> None:
        self.closed += 1
        self.reason = reason
        self.subscription.close()


class Crowd:
    """A broker, a hub, and the clients' ends of its connections."""

    def __init__(self, heartbeat: float = 60, max_lag: float = 30, **options: Any) -> None:
        self.broker = MemoryBroker(**options)
        self.hub = SocketHub(self.broker.watch, heartbeat, BEAT, max_lag, farewell)
        self.clients: list[socket.socket] = []
        self.owners: list[Owner] = []
        self.subscribers: list[Subscriber] = []
        self.listener = socket.create_server(("127.0.0.1", 0))

    def join(
        self,
        *channels: str,
        head: bytes = b"",
        is_chunked: bool = False,
        lifetime: float = math.inf,
        receive_buffer: int = 0,
        subscription: Subscription | None = None,
    ) -> socket.socket:
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(DEADLINE)
        client.connect(self.listener.getsockname())
        server, _ = self.listener.accept()
        if receive_buffer:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, receive_buffer)
        subscription = subscription or self.broker.subscribe(*channels)
        self.clients.append(client)
        self.owners.append(Owner(subscription))
        self.subscribers.append(
            Subscriber(
                server.detach(),
                self.owners[-1],
                subscription.channel_set,
                subscription.position,
                head,
                is_chunked,
                time.monotonic() + lifetime,
                subscription.replay,
            )
        )
        self.hub.add(self.subscribers[-1])
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.broker.close()
        wait_for(lambda: not self.hub._is_running, what="the hub to end")
        self.listener.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Crowd]]:
    crowds: list[Crowd] = []

    def make_crowd(**options: Any) -> Crowd:
        crowds.append(Crowd(**options))
        return crowds[-1]

    yield make_crowd
    for crowd in crowds:
        crowd.close()


@pytest.fixture
def crowd(make: Callable[..., Crowd]) -> Crowd:
    return make()


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Read up to some bytes; where they end an event, its id comes before that end."""
    text, blank_line, behind = end.partition(b"\n\n")
    id_line = rb"\n(id: \S+\n)?\n" if blank_line else b""
    ends = re.compile(re.escape(text) + id_line + re.escape(behind) + rb"\Z").search
    received = b""
    deadline = time.monotonic() + DEADLINE
    while not ends(received):
        # Heartbeats alone would go on for ever.
        assert time.monotonic() < deadline, f"{received[-200:]!r} came, and not {end!r} at its end"
        part = client.recv(1 << 16)
        assert part, f"the stream ended with {received[-200:]!r}"
        received += part
    return received


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def data(wire: bytes) -> list[str]:
    return [event.data for event in EventStreamParser().feed(wire)]


def test_the_head_goes_first_and_then_what_is_published(crowd: Crowd) -> None:
    client = crowd.join(head=b"head\r\n\r\n")
    id = crowd.broker.publish("x")
    assert read_until(client, b"x\n\n") == f"head\r\n\r\ndata: x\nid: {id}\n\n".encode()


@pytest.mark.parametrize("is_ended", [False, True])
def test_what_is_published_between_subscribing_and_joining_is_sent_at_once(
    crowd: Crowd, is_ended: bool
) -> None:
    crowd.join("elsewhere")
    subscription = crowd.broker.subscribe()
    crowd.broker.publish("x")
    if is_ended:
        crowd.broker.disconnect("sse")
    # The hub has looked at what was new once it has sent what came after that.
    crowd.broker.publish("y", channel="elsewhere")
    assert read_until(crowd.clients[0], b"y\n\n")
    client = crowd.join(subscription=subscription)
    assert read_until(client, b"x\n\n")
    assert not is_ended or client.recv(100) == b""


def test_chunks_are_framed_and_ended(crowd: Crowd) -> None:
    client = crowd.join(is_chunked=True)
    crowd.broker.publish("x", id="i")
    crowd.broker.disconnect("sse")
    assert read_all(client) == b"f\r\ndata: x\nid: i\n\n\r\n0\r\n\r\n"


def test_chunked_and_plain_subscribers_of_one_channel_get_the_same(crowd: Crowd) -> None:
    plain, chunked = crowd.join(), crowd.join(is_chunked=True)
    crowd.broker.publish("x", id="i")
    assert read_until(plain, b"x\n\n") == b"data: x\nid: i\n\n"
    assert read_until(chunked, b"x\n\n\r\n") == b"f\r\ndata: x\nid: i\n\n\r\n"


def test_what_is_published_back_to_back_is_sent_together(crowd: Crowd) -> None:
    news, is_looking, may_look = crowd.hub._news, threading.Event(), threading.Event()

    def look_late() -> Any:
        is_looking.set()
        assert may_look.wait(DEADLINE)
        return news()

    crowd.hub._news = look_late
    client = crowd.join(is_chunked=True)
    # The client has been taken in by now, or will be after all of them are published.
    assert is_looking.wait(DEADLINE)
    for n in range(100):
        crowd.broker.publish(str(n))
    may_look.set()
    received = read_until(client, b"data: 99\n\n\r\n")
    assert received.count(b"\r\n") == 2


@pytest.mark.parametrize("is_chunked", [False, True])
def test_those_that_read_nothing_share_the_bytes_of_a_large_event(
    crowd: Crowd, is_chunked: bool
) -> None:
    cursor, large = crowd.broker.last_event_id(), "x" * 1_000_000
    for text in ("before", large, "behind"):
        crowd.broker.publish(text)
    for _ in range(5):
        subscription = crowd.broker.subscribe(last_event_id=cursor)
        assert data(subscription.start) == ["before"]
        crowd.join(is_chunked=is_chunked, receive_buffer=4096, subscription=subscription)
    wait_for(lambda: all(len(one.wire) > len(large) for one in crowd.subscribers))
    assert len({id(one.wire) for one in crowd.subscribers}) == 1
    assert max(len(one.pending) for one in crowd.subscribers) < 40_000
    crowd.broker.publish("last", type="end")
    for client in crowd.clients:
        wire = read_until(client, b"data: last\n\n" + b"\r\n" * is_chunked)
        body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + wire) if is_chunked else wire
        assert data(body) == [large, "behind", "last"]


def test_a_newcomer_gets_only_what_comes_after_him(crowd: Crowd) -> None:
    first = crowd.join()
    crowd.broker.publish("1")
    second = crowd.join()
    crowd.broker.publish("2")
    assert data(read_until(first, b"2\n\n")) == ["1", "2"]
    assert data(read_until(second, b"2\n\n")) == ["2"]


def test_newcomers_join_without_a_hole_while_others_publish(crowd: Crowd) -> None:
    is_over = threading.Event()

    def publish() -> None:
        number = 0
        while not is_over.is_set():
            crowd.broker.publish(str(number))
            number += 1
            time.sleep(0)

    publisher = threading.Thread(target=publish)
    publisher.start()
    clients = [crowd.join() for _ in range(100)]
    is_over.set()
    publisher.join()
    crowd.broker.publish("last")
    for client in clients:
        numbers = data(read_until(client, b"data: last\n\n"))[:-1]
        first = int(numbers[0]) if numbers else 0
        assert numbers == [str(first + n) for n in range(len(numbers))]


def test_subscribers_of_other_channels_get_nothing_of_it(crowd: Crowd) -> None:
    a, b, both = crowd.join("a"), crowd.join("b"), crowd.join("a", "b")
    crowd.broker.publish("1", channel="a")
    crowd.broker.publish("2", channel="b")
    assert data(read_until(a, b"1\n\n")) == ["1"]
    assert data(read_until(b, b"2\n\n")) == ["2"]
    assert data(read_until(both, b"2\n\n")) == ["1", "2"]


def test_one_that_reads_nothing_holds_up_nobody_and_catches_up_later(crowd: Crowd) -> None:
    slow, good = crowd.join(receive_buffer=4096), crowd.join()
    for n in range(300):
        crowd.broker.publish(f"{n:10000}")
        read_until(good, f"{n}\n\n".encode())
    wait_for(lambda: crowd.hub.lagging)
    # It has a part of one frame, and the rest is where it is for all.
    assert all(
        len(one.pending) <= FRAME_BYTES + 10100 for one in crowd.hub._members.lagging.values()
    )
    crowd.broker.publish("last")
    assert [one.strip() for one in data(read_until(slow, b"last\n\n"))] == [
        *map(str, range(300)),
        "last",
    ]
    wait_for(lambda: not crowd.hub.lagging)


def test_one_that_falls_out_of_history_is_cut_off(make: Callable[..., Crowd]) -> None:
    crowd = make(history=3, max_event_bytes=100_000)
    slow, good = crowd.join(receive_buffer=4096), crowd.join()
    for n in range(200):
        crowd.broker.publish(f"{n:50000}")
        read_until(good, f"{n}\n\n".encode())
    with pytest.raises(ConnectionResetError):
        read_all(slow)
    wait_for(lambda: crowd.owners[0].closed)
    assert crowd.broker.subscriber_count() == 1


def test_one_that_lags_behind_values_of_keys_gets_the_newest_and_is_not_cut_off(
    make: Callable[..., Crowd],
) -> None:
    crowd = make(history=3, max_event_bytes=100_000)
    slow, good = crowd.join(receive_buffer=4096), crowd.join()
    for n in range(400):
        crowd.broker.publish(f"{n:50000}", key="ab"[n % 2])
        read_until(good, f"{n}\n\n".encode())
    crowd.broker.publish("last")
    got = [one.strip() for one in data(read_until(slow, b"last\n\n"))]
    assert got[-3:] == ["398", "399", "last"]
    # Some were in the buffers of the sockets and in its frame; none comes twice or out of order.
    assert got[:-1] == sorted(set(got[:-1]), key=int)
    assert len(got) < 200
    assert not crowd.owners[0].closed


def test_one_that_takes_nothing_for_too_long_is_cut_off(make: Callable[..., Crowd]) -> None:
    crowd = make(max_lag=0.2, heartbeat=1)
    crowd.join(receive_buffer=4096)
    crowd.broker.publish("x" * 1_000_000)
    wait_for(lambda: crowd.owners[0].closed)


def test_silence_is_broken_for_each_again_and_again(make: Callable[..., Crowd]) -> None:
    # How long it is at most is tested with a clock that does what it is told: see test_heartbeats.
    crowd = make(heartbeat=0.8)
    clients = [crowd.join(is_chunked=n % 2 == 0) for n in range(40)]
    for n, client in enumerate(clients):
        beats = (b"2\r\n:\n\r\n" if n % 2 == 0 else BEAT) * 3
        received = b""
        while not received.startswith(beats):
            assert beats.startswith(received)
            received += client.recv(100)


def test_heartbeats_do_not_come_all_at_once(make: Callable[..., Crowd]) -> None:
    crowd = make(heartbeat=1)
    ticks: list[list[Subscriber]] = [[]]
    tick, beat = crowd.hub._tick, crowd.hub._beat

    def note_tick() -> None:
        ticks.append([])
        tick()

    def note(subscriber: Subscriber) -> None:
        ticks[-1].append(subscriber)
        beat(subscriber)

    crowd.hub._tick, crowd.hub._beat = note_tick, note  # type: ignore[method-assign]
    for _ in range(40):
        crowd.join()
    wait_for(lambda: sum(map(len, ticks)) >= 80)
    # Between two ticks is an eighth of the interval. Descriptors may all be even ones.
    assert max(map(len, ticks)) < 20


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_client_that_closes_is_gone_without_a_heartbeat(
    make: Callable[..., Crowd], is_chunked: bool
) -> None:
    crowd = make(heartbeat=3600)
    client, other = crowd.join(is_chunked=is_chunked), crowd.join()
    client.close()
    wait_for(lambda: crowd.owners[0].closed)
    assert crowd.broker.subscriber_count() == 1
    crowd.broker.publish("x")
    assert read_until(other, b"x\n\n")


def test_a_client_that_resets_the_connection_is_gone_without_a_heartbeat(
    make: Callable[..., Crowd],
) -> None:
    crowd = make(heartbeat=3600)
    client = crowd.join()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    wait_for(lambda: crowd.owners[0].closed)


def test_a_lagging_client_that_closes_is_gone_too(crowd: Crowd) -> None:
    client = crowd.join(receive_buffer=4096)
    crowd.broker.publish("x" * 1_000_000)
    wait_for(lambda: crowd.hub.lagging)
    client.close()
    wait_for(lambda: crowd.owners[0].closed)


def test_a_client_that_closes_its_half_reads_on(crowd: Crowd) -> None:
    client = crowd.join()
    client.shutdown(socket.SHUT_WR)
    # It was asked whether it is still there.
    assert read_until(client, BEAT) == BEAT
    crowd.broker.publish("x")
    assert read_until(client, b"x\n\n")
    client.close()
    # Its machine has nothing more to say, until something arrives there.
    crowd.broker.publish("x")
    wait_for(lambda: crowd.owners[0].closed)


def test_a_stream_ends_at_its_deadline(make: Callable[..., Crowd]) -> None:
    crowd = make(heartbeat=1)
    client, other = crowd.join(is_chunked=True), crowd.join()
    crowd.broker.publish("x")
    read_until(client, b"data: x\n\n\r\n")
    crowd.subscribers[0].deadline = time.monotonic()
    assert re.fullmatch(rb"(2\r\n:\n\r\n)*9\r\nretry: 1\n\r\n0\r\n\r\n", read_all(client))
    wait_for(lambda: crowd.owners[0].reason == endings.EXPIRED)
    crowd.broker.publish("y")
    assert data(read_until(other, b"data: y\n\n")) == ["x", "y"]


def test_a_stream_whose_deadline_is_over_ends(make: Callable[..., Crowd]) -> None:
    assert read_all(make(heartbeat=1).join(lifetime=0)).endswith(b"retry: 1\n")


def test_a_lagging_stream_ends_at_its_deadline_without_a_last_chunk(
    make: Callable[..., Crowd],
) -> None:
    crowd = make(heartbeat=1)
    client = crowd.join(is_chunked=True, receive_buffer=4096)
    crowd.broker.publish("x" * 1_000_000)
    wait_for(lambda: crowd.hub.lagging)
    crowd.subscribers[0].deadline = time.monotonic()
    wait_for(lambda: crowd.owners[0].closed)
    assert crowd.owners[0].reason == endings.EXPIRED
    assert not read_all(client).endswith(b"0\r\n\r\n")


def test_a_lagging_subscriber_gets_everything_before_its_channel_ends(crowd: Crowd) -> None:
    client = crowd.join(is_chunked=True, receive_buffer=4096)
    crowd.broker.publish("x" * 1_000_000)
    wait_for(lambda: crowd.hub.lagging)
    for _ in range(10):
        crowd.broker.publish("y" * 10_000)
    crowd.broker.disconnect("sse")
    crowd.broker.publish("secret")
    received = read_all(client)
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert received.count(b"y") == 100_000
    assert b"secret" not in received


def test_stopping_ends_all_streams_after_what_is_pending_and_those_to_come(crowd: Crowd) -> None:
    assert not crowd.hub.is_busy
    clients = [crowd.join(is_chunked=True) for _ in range(10)]
    plain = crowd.join()
    wait_for(lambda: len(crowd.hub._members.all) == 11)
    assert crowd.hub.is_busy
    crowd.broker.publish("x")
    crowd.hub.stop()
    ends = [read_all(client).partition(b"\n\n\r\n")[2] for client in clients]
    assert ends == [b"a\r\nretry: 11\n\r\n0\r\n\r\n"] * 10
    assert read_all(plain).endswith(b"\n\nretry: 11\n")
    wait_for(lambda: crowd.broker.subscriber_count() == 0)
    assert {owner.reason for owner in crowd.owners} == {endings.STOPPED}
    assert read_all(crowd.join()) == b"retry: 1\n"


def test_stopping_what_does_not_run_is_nothing() -> None:
    SocketHub(MemoryBroker().watch, 1, BEAT, 1, farewell).stop()


def test_it_runs_only_while_it_has_subscribers(crowd: Crowd) -> None:
    gc.collect()
    # Those of other tests may end meanwhile.
    before = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        client = crowd.join()
        wait_for(lambda: set(threading.enumerate()) - before)
        client.close()
        wait_for(lambda: not set(threading.enumerate()) - before)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2)


def test_a_hub_that_is_dropped_leaves_nothing(make: Callable[..., Crowd]) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    crowd = Crowd()
    crowd.join()
    crowd.close()
    del crowd
    wait_for(lambda: gc.collect() >= 0 and len(os.listdir("/proc/self/fd")) <= before)


def test_an_owner_that_fails_to_close_is_logged_and_harms_nobody(
    crowd: Crowd, caplog: pytest.LogCaptureFixture
) -> None:
    clients = [crowd.join(), crowd.join()]
    crowd.owners[0].subscription = None
    for client in clients:
        client.close()
    wait_for(lambda: crowd.owners[1].closed)
    wait_for(lambda: "What was left to do failed" in caplog.text)


def test_a_source_that_fails_ends_the_streams_and_is_logged(
    crowd: Crowd, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = crowd.join(is_chunked=True)
    wait_for(lambda: crowd.hub._members.all)

    def fail(*args: Any) -> None:
        raise RuntimeError("broken")

    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        patch.setattr(MemoryBroker, "read", fail)
        crowd.broker.publish("x")
        assert read_all(client) == b"9\r\nretry: 1\n\r\n0\r\n\r\n"
        wait_for(lambda: crowd.owners[0].reason == endings.FAILED)
    assert "The socket hub failed" in caplog.text
    client = crowd.join()
    crowd.broker.publish("y")
    assert read_until(client, b"y\n\n")


def test_one_subscriber_is_ended_and_the_others_go_on(crowd: Crowd) -> None:
    ended, other = crowd.join(is_chunked=True), crowd.join()
    one = crowd.subscribers[0]
    crowd.broker.publish("x")
    read_until(other, b"x\n\n")
    crowd.hub.end(one)
    assert read_all(ended).endswith(b"\r\n0\r\n\r\n")
    wait_for(lambda: crowd.owners[0].closed)
    crowd.hub.end(one)
    crowd.broker.publish("y")
    assert read_until(other, b"y\n\n")
    assert [owner.closed for owner in crowd.owners] == [1, 0]


def test_a_subscriber_that_is_ended_as_soon_as_it_is_added_ends(crowd: Crowd) -> None:
    for _ in range(50):
        client = crowd.join()
        crowd.hub.end(crowd.subscribers[-1])
        assert read_all(client) == b""
    wait_for(lambda: all(owner.closed == 1 for owner in crowd.owners))
    assert crowd.broker.subscriber_count() == 0


def test_a_forked_child_has_nothing_of_it_and_starts_anew(crowd: Crowd) -> None:
    client = crowd.join()
    wait_for(lambda: crowd.hub._members.all)
    [descriptor] = crowd.hub._members.all
    child = os.fork()
    if child == 0:
        open_still = os.path.exists(f"/proc/self/fd/{descriptor}")
        os._exit(open_still or bool(crowd.hub._members.all) or crowd.hub._is_running)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    crowd.broker.publish("x")
    assert read_until(client, b"x\n\n")


def test_a_subscriber_that_cannot_be_served_stays_its_callers(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("flask_eventstream.concurrency.spawn", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            crowd.join()
    assert not crowd.hub._arrived
    assert not crowd.hub._members.all
    client = crowd.join()
    crowd.broker.publish("x")
    assert read_until(client, b"x\n\n")


UNDER_GEVENT = """
{patch}
import gevent, socket, sys
import gevent.socket
sys.path.insert(0, "tests")
from tests.test_hub import Crowd, data
def main():
    crowd = Crowd(heartbeat=0.4)
    pairs = []
    for n in range(250):
        pairs.append(crowd.join(is_chunked=n % 2 == 0))
    gevent.sleep(0)
    turns = []
    ticker = gevent.spawn(lambda: [turns.append(gevent.sleep(0)) for _ in range(100000)])
    publish = lambda: [crowd.broker.publish(str(n)) for n in range(10)]
    {publish}
    received = [b""] * len(pairs)
    for n, client in enumerate(pairs):
        while b"\\n\\n" not in received[n].partition(b"data: 9\\n")[2]:
            gevent.sleep(0)
            gevent.socket.wait_read(client.fileno(), timeout=20)
            received[n] += client.recv(65536)
    assert turns
    ticker.kill()
    for client in pairs[:100]:
        client.close()
    with gevent.Timeout(20):
        while crowd.broker.subscriber_count() != 150:
            gevent.sleep(0.01)
    gevent.socket.wait_read(pairs[-1].fileno(), timeout=20)
    assert set(pairs[-1].recv(100).splitlines()) == {{b":"}}
    crowd.hub.stop()
    with gevent.Timeout(20):
        while crowd.broker.subscriber_count() or crowd.hub._is_running:
            gevent.sleep(0.01)
gevent.spawn(main).get()
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
@pytest.mark.parametrize("publish", ["publish()", "gevent.get_hub().threadpool.spawn(publish)"])
def test_under_gevent_it_is_a_greenlet_that_lets_others_run(patch: str, publish: str) -> None:
    command = [sys.executable, "-c", UNDER_GEVENT.format(patch=patch, publish=publish)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


class Script:
    """A source that returns what it is told to, or nothing new, and says what it was asked for."""

    end: int | None = None

    def __init__(self, *answers: tuple[bytes, int] | None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int | None]] = []

    def read(
        self, after: int, until: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, int] | None:
        self.asked.append((after, until))
        return self.answers.pop(0) if self.answers else (b"", after)


class Still:
    """A hub whose loop does not run, so that a test can take its steps one by one."""

    def __init__(self, source: Script) -> None:
        self.source = source
        self.reasons: list[str] = []
        self.hub = SocketHub(lambda ring: lambda: [source], 60, BEAT, 30, farewell)
        self.hub._watcher.open()
        self.clients: list[socket.socket] = []

    def take_in(self, position: int, replay: Any = None) -> Subscriber:
        client, server = socket.socketpair()
        self.clients.append(client)
        given = (position, b"", True, math.inf, replay)
        taken = Subscriber(server.detach(), self, self.source, *given)
        self.hub._take_in(taken)
        return taken

    def end(self, reason: str) -> None:
        self.reasons.append(reason)

    def finish(self) -> None:
        self.hub._finish_all(endings.FAILED)
        self.hub._watcher.close_removed()
        self.hub._errands.start()
        for client in self.clients:
            client.close()


@pytest.fixture
def still() -> Iterator[Still]:
    still = Still(Script())
    yield still
    still.finish()


def test_a_gap_without_events_is_no_chunk(still: Still) -> None:
    # It would be an empty one, which ends the body.
    group = still.take_in(9).group
    still.source.answers = [(b"", 9)]
    late = still.take_in(7)
    assert still.source.asked == [(9, None), (7, 9)]
    assert late.group is group
    assert set(group.live[True].values()) == set(still.hub._members.all.values())


class Pages:
    """What history has for a subscriber: some frames, of which each notes that it was read."""

    def __init__(self, name: str, number: int, order: list[str]) -> None:
        self.name, self.left, self.order = name, number, order

    @property
    def is_over(self) -> bool:
        return not self.left

    def read(self, max_bytes: int) -> bytes | None:
        self.left -= 1
        self.order.append(self.name)
        return self.name.encode()


def test_those_that_lag_take_turns_and_what_is_new_comes_first(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_eventstream.hub._CATCH_UP_SECONDS", 0)
    order: list[str] = []
    still.hub._now = time.monotonic()
    still.take_in(0)
    read = still.source.read

    def read_news(*arguments: Any) -> Any:
        order.append("new")
        return read(*arguments)

    still.source.read = read_news  # type: ignore[method-assign, assignment]
    for name in "ab":
        still.take_in(0, Pages(name, 3, order))
    assert order == ["a", "b"]
    while still.hub._members.ready:
        still.hub._turn()
    assert order == ["a", "b", "new", "a", "new", "b", "new", "a", "new", "b"]
    assert not still.hub.lagging
    chunks = b"".join(b"1\r\n%b\r\n" % name for name in [b"a"] * 3)
    assert still.clients[1].recv(100) == chunks


def test_history_that_is_gone_before_it_was_read_cuts_a_subscriber_off(still: Still) -> None:
    gone = Pages("a", 3, [])
    gone.read = lambda max_bytes: None  # type: ignore[method-assign]
    still.take_in(0, gone)
    still.hub._errands.start()
    wait_for(lambda: still.reasons == [endings.LAGGED])


def test_one_that_leaves_has_no_turn_any_more(still: Still) -> None:
    subscriber = still.take_in(0, Pages("a", 9, []))
    still.hub._finish(subscriber, endings.STOPPED, b"retry: 1\n")
    assert not still.hub._members.ready
    # It had all of a frame, so that there is a place for the end behind it.
    assert still.clients[0].recv(100) == b"1\r\na\r\n9\r\nretry: 1\n\r\n0\r\n\r\n"


def test_a_newcomer_gets_history_in_frames_and_then_what_is_new(crowd: Crowd) -> None:
    for n in range(100):
        crowd.broker.publish(f"{n:10000}")
    subscription = crowd.broker.subscribe(history=100)
    subscription.put_behind(b"data: behind\n\n")
    client = crowd.join(subscription=subscription, head=subscription.start, is_chunked=True)
    assert all(len(one.pending) < FRAME_BYTES + 11_000 for one in crowd.subscribers)
    crowd.broker.publish("new")
    received = read_until(client, b"data: new\n\n\r\n")
    got = [one.strip() for one in data(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + received))]
    assert got == [*map(str, range(100)), "behind", "new"]


def test_a_group_that_is_behind_its_newcomer_catches_up_first(still: Still) -> None:
    still.take_in(3)
    still.source.answers = [(b"x", 8)]
    assert still.take_in(8).group.position == 8
    assert still.source.asked == [(3, None), (3, None)]
    assert still.clients[0].recv(100) == b"1\r\nx\r\n"


def test_news_that_only_others_read_is_left_to_them(still: Still) -> None:
    # Those whose sockets could not be had are subscribed to the same broker.
    still.hub.ring()
    still.hub._turn()
    assert still.source.asked == []


def test_one_that_is_found_gone_while_sending_is_forgotten(still: Still) -> None:
    gone, other = still.take_in(0), still.take_in(0)
    still.clients[0].close()
    still.source.answers = [(b"x", 1)]
    still.hub._send_news(gone.group)
    assert list(still.hub._members.all.values()) == [other]
    assert gone.group.size == 1


def test_a_descriptor_is_not_free_before_the_events_of_its_turn_were_looked_at(
    still: Still,
) -> None:
    # The next connection would get it, and with it an event that was not meant for it.
    gone = still.take_in(0)
    still.hub._forget(gone, endings.LEFT)
    assert os.path.exists(f"/proc/self/fd/{gone.descriptor}")
    still.hub._watcher.close_removed()
    assert not os.path.exists(f"/proc/self/fd/{gone.descriptor}")


def test_the_last_of_a_group_takes_it_with_him(still: Still) -> None:
    still.take_in(0)
    still.clients[0].close()
    still.source.answers = [(b"x", 1)]
    still.hub._send_news(still.hub._members.groups[still.source])
    assert still.hub._members.groups == {}


def test_one_that_takes_a_little_all_the_time_is_not_cut_off_before_it_takes_nothing(
    still: Still,
) -> None:
    slow = still.take_in(0)
    still.source.answers = [(b"x" * 10_000_000, 1)]
    still.hub._send_news(slow.group)
    # The longest lag is 30 seconds.
    for now in range(20, 200, 20):
        still.hub._now = now
        assert still.clients[0].recv(1 << 20)
        still.hub._catch_up(slow)
        still.hub._tick()
        assert slow.descriptor in still.hub._members.lagging
    still.hub._now += 31
    still.hub._tick()
    assert still.hub._members.all == {}
    still.hub._errands.start()
    wait_for(lambda: still.reasons == [endings.LAGGED])


def test_one_that_lags_gets_no_heartbeat(still: Still) -> None:
    lagging = still.take_in(0)
    still.source.answers = [(b"x" * 10_000_000, 1), (b"", 1)]
    still.hub._send_news(lagging.group)
    still.hub._now = 20
    for _ in range(still.hub._heartbeats._slots):
        still.hub._tick()
    assert BEAT not in lagging.pending
    assert lagging.descriptor in still.hub._members.lagging


def test_an_event_of_one_that_went_in_this_turn_is_ignored(still: Still) -> None:
    descriptor = still.take_in(0).descriptor
    still.finish()
    still.hub._on_event(descriptor, IS_GONE)
    wait_for(lambda: still.reasons == [endings.FAILED])
