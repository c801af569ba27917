"""The contract of every registry of runs: each test here runs against each of them."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker
from flask_eventstream.event import with_id
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.run_registry import (
    ACTIVE,
    CANCELLED,
    LOST,
    MemoryRegistry,
    NoRoomError,
    Write,
)

from .redis_server import PATIENT
from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_eventstream import Subscription
    from flask_eventstream.local_broker import LocalBroker
    from flask_eventstream.run_registry import RunRegistry

    from .redis_server import RedisServer

END = b"event: cancelled\ndata: {}\n\n"


@pytest.fixture(params=["memory", "redis", "valkey"])
def broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    made: LocalBroker = MemoryBroker()
    if request.param != "memory":
        server: RedisServer = request.getfixturevalue(request.param)
        made = RedisBroker(server.url, key_prefix=server.prefix(), timeout=PATIENT)
    yield made
    made.close()


@pytest.fixture
def registry(broker: LocalBroker) -> RunRegistry:
    return broker.registry(600, 15, 100, 3)


def begin(registry: RunRegistry, run: str, key: str = "key", owner: str = "") -> list[str]:
    """Begin a run, and return what gets its id when it has to stop."""
    stopped: list[str] = []
    assert registry.begin(key, run, lambda: stopped.append(run), END, owner).run == run
    return stopped


def finish(registry: RunRegistry, run: str, key: str, n: int = 1) -> None:
    """Write the end of a run, as its producer does."""
    assert registry.write([Write(key, run, n, event(run, n, "end"), "end")]) == [False]


def event(run: str, n: int, type: str = "") -> bytes:
    wire = f"event: {type}\n" if type else ""
    return f"{wire}data: {n}\nid: {run}.{n}\n\n".encode()


def read(broker: LocalBroker, run: str) -> Subscription:
    return broker.subscribe_log(run, 0)


def all_of(subscription: Subscription) -> bytes:
    """Return what is kept, at once."""
    return subscription.start + (subscription.take(0) or b"")


def rest(subscription: Subscription) -> bytes:
    wire = b""
    while (part := subscription.take(5)) is not None:
        assert part, "nothing came, and no end"
        wire += part
    return wire


def test_a_run_is_found_as_it_stands(registry: RunRegistry) -> None:
    assert registry.find("key") is None
    begin(registry, "one")
    found = registry.find("key")
    assert found
    assert found.is_active
    assert not found.is_lost
    assert (found.run, found.state, found.last) == ("one", ACTIVE, 0)
    assert registry.find("other") is None


def test_a_key_has_one_active_run(registry: RunRegistry) -> None:
    begin(registry, "one")
    registry.write([Write("key", "one", 1, event("one", 1))])
    before = registry.begin("key", "two", pytest.fail, END)
    assert before == registry.find("key")
    assert (before.run, before.last) == ("one", 1)
    begin(registry, "two", "other")
    finish(registry, "one", "key", 2)
    begin(registry, "three")
    found = registry.find("key")
    assert found
    assert (found.run, found.last) == ("three", 0)


def test_an_owner_has_as_many_runs_as_are_allowed(registry: RunRegistry) -> None:
    for n in range(3):
        begin(registry, f"run{n}", f"key{n}", "me")
    with pytest.raises(NoRoomError):
        registry.begin("key3", "run3", pytest.fail, END, "me")
    assert registry.find("key3") is None
    # Its own run is found all the same.
    assert registry.begin("key1", "run4", pytest.fail, END, "me").run == "run1"
    begin(registry, "run5", "key5", "you")
    for n in range(6, 12):
        begin(registry, f"run{n}", f"key{n}")
    finish(registry, "run0", "key0")
    begin(registry, "run3", "key3", "me")
    with pytest.raises(NoRoomError):
        registry.begin("key0", "run12", pytest.fail, END, "me")


def test_a_run_that_is_refused_leaves_the_one_before_as_it_was(registry: RunRegistry) -> None:
    begin(registry, "old", "key3", "me")
    finish(registry, "old", "key3")
    before = registry.find("key3")
    for n in range(3):
        begin(registry, f"run{n}", f"key{n}", "me")
    with pytest.raises(NoRoomError):
        registry.begin("key3", "run3", pytest.fail, END, "me")
    assert registry.find("key3") == before


def test_a_run_counts_for_its_owner_until_its_producer_has_ended(registry: RunRegistry) -> None:
    for n in range(3):
        begin(registry, f"run{n}", f"key{n}", "me")
        assert registry.end(f"key{n}", f"run{n}", CANCELLED, END)
    with pytest.raises(NoRoomError):
        registry.begin("key0", "new", pytest.fail, END, "me")
    # Also if its key has another run by then, or none.
    begin(registry, "theirs", "key1")
    registry.write([Write("key1", "run1", 1, event("run1", 1))])
    with pytest.raises(NoRoomError):
        registry.begin("key0", "new", pytest.fail, END, "me")
    finish(registry, "run1", "key1")
    begin(registry, "new", "key0", "me")


def test_of_many_threads_as_many_begin_as_there_is_room_for(registry: RunRegistry) -> None:
    barrier = threading.Barrier(8)
    for round in range(20):
        begun: list[str] = []

        def start(run: str, begun: list[str]) -> None:
            barrier.wait(DEADLINE)
            with suppress(NoRoomError):
                registry.begin(f"key of {run}", run, lambda: None, END, "me")
                begun.append(run)

        threads = [threading.Thread(target=start, args=(f"{round}-{n}", begun)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(begun) == 3
        for run in begun:
            finish(registry, run, f"key of {run}")


def test_what_is_written_is_read_live_and_from_the_start(
    broker: LocalBroker, registry: RunRegistry
) -> None:
    begin(registry, "one")
    early = read(broker, "one")
    both = event("one", 1) + event("one", 2)
    assert registry.write([Write("key", "one", 2, both)]) == [True]
    assert early.take(5) == both
    late = read(broker, "one")
    assert late.start == both
    last = event("one", 3, "end")
    assert registry.write([Write("key", "one", 3, last, "end")]) == [False]
    assert rest(early) == rest(late) == last
    found = registry.find("key")
    assert found
    assert (found.state, found.last) == ("end", 3)
    # Nothing tells who comes now that it has ended but the log itself.
    assert read(broker, "one").start == both + last


def test_many_runs_are_written_at_once(broker: LocalBroker, registry: RunRegistry) -> None:
    for n in range(50):
        begin(registry, f"run{n}", f"key{n}")
    writes = [Write(f"key{n}", f"run{n}", 1, event(f"run{n}", 1)) for n in range(50)]
    writes[7] = writes[7]._replace(state="end")
    writes[9] = writes[9]._replace(run="unknown")
    assert registry.write(writes) == [n not in {7, 9} for n in range(50)]
    assert read(broker, "run8").start == event("run8", 1)
    assert read(broker, "run9").start == b""


def test_a_write_that_was_done_is_not_done_again(
    broker: LocalBroker, registry: RunRegistry
) -> None:
    begin(registry, "one")
    write = Write("key", "one", 2, event("one", 1) + event("one", 2))
    assert registry.write([write, write]) == [True, True]
    assert read(broker, "one").start == write.wire


def test_a_run_that_was_cancelled_takes_nothing_more(
    broker: LocalBroker, registry: RunRegistry
) -> None:
    stopped = begin(registry, "one")
    reader = read(broker, "one")
    registry.write([Write("key", "one", 1, event("one", 1))])
    assert registry.end("key", "one", CANCELLED, END)
    assert stopped == ["one"]
    assert not registry.end("key", "one", CANCELLED, END)
    assert registry.write([Write("key", "one", 2, event("one", 2))]) == [False]
    assert registry.write([Write("key", "one", 3, event("one", 3), "end")]) == [False]
    expected = event("one", 1) + with_id(END, b"one.2")
    assert rest(reader) == expected
    assert read(broker, "one").start == expected
    found = registry.find("key")
    assert found
    assert (found.state, found.last) == (CANCELLED, 2)


def test_only_the_run_that_is_meant_is_ended(registry: RunRegistry) -> None:
    stopped = begin(registry, "two")
    assert not registry.end("key", "one", CANCELLED, END)
    assert not registry.end("other", "two", CANCELLED, END)
    assert not stopped
    found = registry.find("key")
    assert found
    assert found.is_active


def test_a_run_whose_producer_is_alive_is_not_lost(
    broker: LocalBroker, registry: RunRegistry
) -> None:
    stopped = begin(registry, "one")
    assert not registry.end("key", "one", LOST, END)
    found = registry.find("key")
    assert found
    assert found.is_active
    reader = read(broker, "one")
    registry.watch("key", found, END)
    registry.write([Write("key", "one", 1, event("one", 1), "end")])
    assert rest(reader) == event("one", 1)
    reader.close()
    assert not stopped


def test_a_run_that_is_forgotten_is_not_found(broker: LocalBroker, registry: RunRegistry) -> None:
    begin(registry, "one")
    reader = read(broker, "one")
    write = Write("key", "one", 1, event("one", 1, "stream-error"), "stream-error", True)
    assert registry.write([write]) == [False]
    assert registry.find("key") is None
    # Who was there already is told.
    assert rest(reader) == write.wire
    begin(registry, "two")


def test_the_ids_of_a_log_are_no_cursors_of_another_channel(
    broker: LocalBroker, registry: RunRegistry
) -> None:
    begin(registry, "one")
    registry.write([Write("key", "one", 1, event("one", 1))])
    broker.publish("x", channel="news")
    start = broker.subscribe("news", last_event_id="one.1").start
    assert [one.type for one in EventStreamParser().feed(start)] == ["reset", "message"]


def with_one_that_has_ended() -> tuple[MemoryBroker, MemoryRegistry, list[float]]:
    """Return a broker and its registry, and their clock, which tells what its item says."""
    now = [0.0]
    broker = MemoryBroker(clock=lambda: now[0])
    registry = broker.registry(600, 15, 100)
    begin(registry, "one")
    registry.write([Write("key", "one", 1, event("one", 1), "end")])
    return broker, registry, now


def test_what_has_ended_is_kept_for_a_while_and_then_forgotten() -> None:
    broker, registry, now = with_one_that_has_ended()
    now[0] = 599
    assert registry.find("key")
    assert read(broker, "one").start
    now[0] = 600
    assert registry.find("key") is None
    assert read(broker, "one").start == b""


def test_a_run_that_goes_on_is_kept_however_old() -> None:
    now = [0.0]
    broker = MemoryBroker(clock=lambda: now[0], history=1, history_seconds=1)
    registry = broker.registry(600, 15, 100)
    begin(registry, "one")
    for n in range(1, 400):
        now[0] += 10
        registry.write([Write("key", "one", n, event("one", n))])
        broker.publish("something else")
    assert read(broker, "one").start == b"".join(event("one", n) for n in range(1, 400))


def test_the_next_run_takes_the_place_of_one_that_has_ended() -> None:
    broker, registry, now = with_one_that_has_ended()
    begin(registry, "two")
    registry.write([Write("key", "two", 1, event("two", 1))])
    assert read(broker, "one").start == b""
    # The time of the first one is over, and not that of the second.
    now[0] = 601
    found = registry.find("key")
    assert found
    assert found.run == "two"


def test_no_more_are_kept_than_there_is_room_for() -> None:
    registry = MemoryBroker().registry(600, 15, 2)
    for n in range(4):
        begin(registry, f"run{n}", f"key{n}")
        registry.write([Write(f"key{n}", f"run{n}", 1, event("run", 1), "end")])
    assert [bool(registry.find(f"key{n}")) for n in range(4)] == [False, False, True, True]


def test_of_runs_that_have_ended_the_newest_are_kept(
    make_large: Callable[..., LocalBroker],
) -> None:
    broker = make_large(max_idle_bytes=40_000)
    registry = broker.registry(600, 15, 100)
    begin(registry, "active", "active")
    large = b"data: %b\nid: active.1\n\n" % (b"x" * 90_000)
    registry.write([Write("active", "active", 1, large)])
    for n in range(10):
        run, key = f"run{n}", f"key{n}"
        begin(registry, run, key)
        wire = b"data: %b\nid: %b.1\n\n" % (b"x" * 10_000, run.encode())
        registry.write([Write(key, run, 1, wire)])
        finish(registry, run, key, 2)
    assert [n for n in range(10) if registry.find(f"key{n}")] == [7, 8, 9]
    assert [len(read(broker, f"run{n}").start) > 0 for n in (6, 7)] == [False, True]
    assert read(broker, "active").take(0) == large


def test_a_run_that_another_has_replaced_is_not_counted_twice(
    make_large: Callable[..., LocalBroker],
) -> None:
    broker = make_large(max_idle_bytes=40_000)
    registry = broker.registry(600, 15, 100)
    begin(registry, "first", "first")
    finish(registry, "first", "first")
    for n in range(10):
        begin(registry, f"run{n}")
        wire = b"data: %b\nid: run%d.1\n\n" % (b"x" * 1_000, n)
        registry.write([Write("key", f"run{n}", 1, wire)])
        finish(registry, f"run{n}", "key", 2)
    assert registry.find("first")
    found = registry.find("key")
    assert found
    assert found.run == "run9"


def test_the_newest_run_that_has_ended_is_kept_however_large(
    make_large: Callable[..., LocalBroker],
) -> None:
    broker = make_large(max_idle_bytes=1)
    registry = broker.registry(600, 15, 100)
    for n in range(3):
        begin(registry, f"run{n}", f"key{n}")
        finish(registry, f"run{n}", f"key{n}")
    assert [bool(registry.find(f"key{n}")) for n in range(3)] == [False, False, True]


def test_of_a_large_log_the_newest_part_is_kept(make_large: Callable[[], LocalBroker]) -> None:
    broker = make_large()
    registry = broker.registry(600, 15, 100)
    begin(registry, "one")
    for n in range(1, 201):
        wire = b"data: %b\nid: one.%d\n\n" % (b"x" * 1000, n)
        assert registry.write([Write("key", "one", n, wire)]) == [True]
    ids = [one.id for one in EventStreamParser().feed(all_of(read(broker, "one")))]
    assert ids[-1] == "one.200"
    assert 50 < len(ids) < 100
    assert ids == [f"one.{n}" for n in range(201 - len(ids), 201)]


def test_one_event_that_is_larger_than_the_log_is_still_sent(
    make_large: Callable[[], LocalBroker],
) -> None:
    broker = make_large()
    registry = broker.registry(600, 15, 100)
    begin(registry, "one")
    reader = read(broker, "one")
    for n in (1, 2, 3):
        wire = b"data: %b\nid: one.%d\n\n" % (b"x" * 200_000, n)
        assert registry.write([Write("key", "one", n, wire)]) == [True]
        assert wait_for(lambda: reader.take(1)) == wire


@pytest.fixture(params=["memory", "redis"])
def make_large(request: pytest.FixtureRequest) -> Iterator[Callable[..., LocalBroker]]:
    made: list[LocalBroker] = []

    def make(**options: Any) -> LocalBroker:
        if request.param == "memory":
            made.append(MemoryBroker(max_run_bytes=100_000, **options))
        else:
            server = request.getfixturevalue("redis")
            prefix = server.prefix()
            made.append(
                RedisBroker(server.url, key_prefix=prefix, max_run_bytes=100_000, **options)
            )
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_forked_child_has_none_of_its_parents_runs() -> None:
    registry = MemoryBroker().registry(600, 15, 100)
    assert isinstance(registry, MemoryRegistry)
    begin(registry, "one")
    registry._start()  # what os.register_at_fork() calls
    assert registry.find("key") is None
