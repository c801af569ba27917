from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker, ServerSentEvent, concurrency
from flask_eventstream import runs as runs_module
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.event import to_json
from flask_eventstream.format import stream_format
from flask_eventstream.run import Run
from flask_eventstream.run_registry import (
    ACTIVE,
    CANCELLED,
    MemoryRegistry,
    NoRoomError,
    Standing,
    Write,
)
from flask_eventstream.runs import JOIN_SECONDS, Runs

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

CANCEL = b"event: cancelled\ndata: {}\n\n"


class Registry(MemoryRegistry):
    """A registry that notes what is written, and can be away."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, 600, 100, 2)
        self.writes: list[Write] = []
        self.error: Exception | None = None

    def write(self, writes: Any) -> list[bool]:
        if self.error is not None:
            raise self.error
        self.writes += writes
        return super().write(writes)


class Stage:
    """The runs of a process, and what becomes of them."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.registry = Registry(self.broker)
        self.runs = Runs(self.registry, 3)
        self.reported: list[str] = []

    def new(self, key: str = "key", owner: str = "", format: str = "sse") -> Run:
        return Run(key, owner, stream_format(format, to_json, 1 << 21), self._report)

    def _report(self, error: BaseException) -> str:
        self.reported.append(repr(error))
        return "told"

    def begin(self, source: Any, key: str = "key", **options: Any) -> Run:
        run = self.new(key, **options)
        assert self.runs.begin(run, source, lambda function: function).run == run.id
        return run

    def has_room(self, owner: str = "") -> bool:
        """Tell whether one more run may begin, by beginning one that ends at once."""
        try:
            run = self.begin(iter(()), f"room of {owner}", owner=owner)
        except NoRoomError:
            return False
        wait_for(lambda: run.id not in self.runs._active)
        list(self.read(run))
        return True

    def read(self, run: Run) -> Iterator[ServerSentEvent]:
        """Yield the events of a run up to its end."""
        parser = EventStreamParser()
        subscription = self.broker.subscribe_log(run.id, 0)
        yield from parser.feed(subscription.start)
        standing = self.registry.find(run.key)
        if standing is not None and not standing.is_active:
            # It may have ended since it was subscribed to.
            yield from parser.feed(subscription.take(0) or b"")
            return
        while True:
            wire = subscription.take(DEADLINE)
            assert wire != b"", "nothing came, and no end"
            if wire is None:
                return
            yield from parser.feed(wire)

    def cancel(self, run: Run) -> None:
        assert self.registry.end(run.key, run.id, CANCELLED, CANCEL)

    def wait(self) -> None:
        """Wait until no producer runs and nothing is left to write."""
        wait_for(lambda: not self.runs._active and not self.runs._due)


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    one.wait()


def fields(events: Iterator[ServerSentEvent]) -> list[tuple[str, str]]:
    return [(event.type, event.data) for event in events]


class Gate:
    """A generator that yields when it is told to, and tells when it was closed."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.next = threading.Semaphore(0)
        self.closed = threading.Event()

    def __call__(self) -> Iterator[Any]:
        try:
            for item in self.items:
                assert self.next.acquire(timeout=DEADLINE)
                yield item
            assert self.next.acquire(timeout=DEADLINE)
        finally:
            self.closed.set()


def test_a_run_is_read_to_its_end_by_ids_without_a_gap(stage: Stage) -> None:
    run = stage.begin(iter(["a", {"b": 1}, ServerSentEvent("c", "own", id="mine", retry=9), ""]))
    events = list(stage.read(run))
    assert [(event.type, event.data) for event in events] == [
        ("message", "a"),
        ("message", '{"b": 1}'),
        ("own", "c"),
        ("message", ""),
        ("end", "{}"),
    ]
    assert [event.id for event in events] == [f"{run.id}.{n}" for n in range(1, 6)]
    assert events[2].retry == 9


def test_the_first_item_is_written_at_once_and_the_others_are_joined(stage: Stage) -> None:
    def produce() -> Iterator[str]:
        yield "first"
        assert run.started.wait(DEADLINE)
        for n in range(100):
            yield str(n)

    run, begin = stage.new(), time.monotonic()
    stage.runs.begin(run, produce(), lambda function: function)
    assert len(list(stage.read(run))) == 102
    stage.wait()
    assert stage.registry.writes[0].last == 1
    # One write for what came within 25 ms, and one for each end of a wait that is late.
    assert len(stage.registry.writes) <= 3 + (time.monotonic() - begin) / JOIN_SECONDS


def test_a_second_run_does_not_wait_for_the_pause_of_the_first(stage: Stage) -> None:
    gate = Gate("a")
    stage.begin(gate(), "one")
    run = stage.begin(iter(["x"]), "two")
    assert fields(stage.read(run)) == [("message", "x"), ("end", "{}")]
    gate.next.release(2)


def test_a_hundred_thousand_items_arrive_in_order_in_few_writes(stage: Stage) -> None:
    def produce() -> Iterator[str]:
        for n in range(100_000):
            yield str(n)
            most.append(run._given - run._taken)

    most: list[int] = []
    run, begin = stage.new(), time.monotonic()
    stage.runs.begin(run, produce(), lambda function: function)
    events = stage.read(run)
    for n in range(100_000):
        event = next(events)
        assert (event.data, event.id) == (str(n), f"{run.id}.{n + 1}")
    assert next(events).type == "end"
    # One for each 25 ms, on a machine that is busy as well, and one for each some hundred items.
    rounds = (time.monotonic() - begin) / JOIN_SECONDS
    assert len(stage.registry.writes) < rounds + 100_000 / 200
    # It waits for what it has handed over, and not for its clients.
    assert max(most) < 300_000


def test_a_large_item_arrives_whole(stage: Stage) -> None:
    large = "x" * (1 << 20)
    run = stage.begin(iter([large, "small", large]))
    assert fields(stage.read(run)) == [
        ("message", large),
        ("message", "small"),
        ("message", large),
        ("end", "{}"),
    ]


def test_a_producer_that_never_yields_ends_at_once(stage: Stage) -> None:
    run = stage.begin(iter(()))
    run.wait(DEADLINE)
    assert fields(stage.read(run)) == [("end", "{}")]


def test_none_says_that_it_has_begun_and_is_no_event(stage: Stage) -> None:
    gate = Gate(None, "a")
    run = stage.begin(gate())
    run.wait(0.01)
    gate.next.release()
    assert run.started.wait(DEADLINE)
    gate.next.release(2)
    assert fields(stage.read(run)) == [("message", "a"), ("end", "{}")]


def test_what_is_raised_before_the_first_item_is_told_who_waits(stage: Stage) -> None:
    def produce() -> Iterator[str]:
        raise LookupError("early")
        yield ""

    run = stage.begin(produce())
    with pytest.raises(LookupError, match="early"):
        run.wait(DEADLINE)
    # As if there had been no run.
    assert stage.registry.find("key") is None
    assert stage.reported == []


def test_if_nobody_waits_any_more_it_is_reported(stage: Stage) -> None:
    def produce() -> Iterator[str]:
        assert go.wait(DEADLINE)
        raise LookupError("late")
        yield ""

    go = threading.Event()
    run = stage.begin(produce())
    run.wait(0.01)
    go.set()
    assert fields(stage.read(run)) == [("stream-error", '{"message": "told"}')]
    assert stage.reported == ["LookupError('late')"]


@pytest.mark.parametrize("error", [RuntimeError("tenth"), SystemExit("tenth")])
def test_what_is_raised_at_the_tenth_item_ends_the_run(stage: Stage, error: BaseException) -> None:
    def produce() -> Iterator[int]:
        yield from range(9)
        raise error

    run = stage.begin(produce())
    *items, last = fields(stage.read(run))
    assert items == [("message", str(n)) for n in range(9)]
    assert last == ("stream-error", '{"message": "told"}')
    assert stage.reported == [repr(error)]


def test_an_item_that_cannot_be_sent_ends_the_run(stage: Stage) -> None:
    run = stage.begin(iter(["a", b"binary"]))
    assert fields(stage.read(run))[1:] == [("stream-error", '{"message": "told"}')]
    assert "ServerSentEvent.binary" in stage.reported[0]


def test_a_cancelled_producer_is_closed_at_its_next_item(stage: Stage) -> None:
    gate = Gate("a", "b", "c")
    run = stage.begin(gate())
    events = stage.read(run)
    gate.next.release()
    assert next(events).data == "a"
    stage.cancel(run)
    assert fields(events) == [("cancelled", "{}")]
    assert not gate.closed.is_set()
    gate.next.release()
    assert gate.closed.wait(DEADLINE)
    stage.wait()
    # What it yielded then is nowhere.
    assert [event.data for event in stage.read(run)] == ["a", "{}"]


def test_who_waits_for_the_first_item_of_a_cancelled_run_waits_no_longer(stage: Stage) -> None:
    gate = Gate()
    run = stage.begin(gate())
    threading.Timer(0.01, stage.cancel, [run]).start()
    run.wait(DEADLINE)
    assert fields(stage.read(run)) == [("cancelled", "{}")]
    gate.next.release()


def test_a_producer_may_take_its_time_to_close(stage: Stage) -> None:
    def produce() -> Iterator[str]:
        try:
            yield "a"
            assert go.wait(DEADLINE)
            yield "b"
        finally:
            closing.set()
            assert done.wait(DEADLINE)

    go, closing, done = threading.Event(), threading.Event(), threading.Event()
    run = stage.begin(produce(), owner="me")
    run.wait(DEADLINE)
    stage.cancel(run)
    go.set()
    assert closing.wait(DEADLINE)
    # Nobody waits for it: the key is free, and its owner's place is.
    again = stage.begin(iter(["new"]), owner="me")
    assert fields(stage.read(again)) == [("message", "new"), ("end", "{}")]
    done.set()


def test_what_is_raised_on_closing_is_logged(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def produce() -> Iterator[str]:
        try:
            yield "a"
            assert go.wait(DEADLINE)
            yield "b"
        finally:
            raise RuntimeError("on closing")

    go = threading.Event()
    run = stage.begin(produce())
    run.wait(DEADLINE)
    stage.cancel(run)
    go.set()
    stage.wait()
    assert "on closing" in caplog.text
    assert fields(stage.read(run)) == [("message", "a"), ("cancelled", "{}")]


def test_a_source_may_be_any_iterable(stage: Stage) -> None:
    assert fields(stage.read(stage.begin([1, 2]))) == [
        ("message", "1"),
        ("message", "2"),
        ("end", "{}"),
    ]


def test_while_the_broker_is_away_the_producer_waits_and_nothing_is_lost(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def produce() -> Iterator[str]:
        yield "first"
        assert go.wait(DEADLINE)
        for n in range(1000):
            yield f"{n:>1000}"
            given.append(n)

    go = threading.Event()
    given: list[int] = []
    run = stage.begin(produce())
    run.wait(DEADLINE)
    stage.registry.error = BrokerUnavailableError("redis://there", "no answer")
    go.set()
    wait_for(lambda: "wait for their broker" in caplog.text)
    wait_for(lambda: len(given) > 200)
    assert len(given) < 300
    stage.registry.error = None
    assert [event.data for event in stage.read(run)][1:-1] == [f"{n:>1000}" for n in range(1000)]


def test_a_run_that_cannot_be_written_at_all_is_over(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate("a", "b")
    run = stage.begin(gate())
    stage.registry.error = RuntimeError("a fault")
    gate.next.release()
    wait_for(lambda: run.is_over)
    assert "a fault" in caplog.text
    gate.next.release()
    assert gate.closed.wait(DEADLINE)


def test_a_key_has_one_run_at_a_time(stage: Stage) -> None:
    gate = Gate()
    run = stage.begin(gate())
    found = stage.runs.begin(stage.new(), iter(()), lambda _: pytest.fail("it was begun"))
    assert found == Standing(run.id, ACTIVE, 0)
    gate.next.release()


def test_there_is_room_for_some_runs_and_for_fewer_of_one_owner(stage: Stage) -> None:
    gates = [Gate("a") for _ in range(3)]
    runs = []
    for n, gate in enumerate(gates[:2]):
        assert stage.has_room("me")
        runs.append(stage.begin(gate(), f"key{n}", owner="me"))
    assert not stage.has_room("me")
    assert stage.has_room("you")
    stage.begin(gates[2](), "key2", owner="you")
    assert not stage.has_room("you")
    assert not stage.has_room()
    for gate in gates:
        gate.next.release(2)
    stage.wait()
    assert stage.has_room("me")


def test_a_cancelled_run_counts_until_its_producer_has_ended(stage: Stage) -> None:
    gates = [Gate("a") for _ in range(2)]
    runs = [stage.begin(gate(), f"key{n}", owner="me") for n, gate in enumerate(gates)]
    for run in runs:
        stage.cancel(run)
    assert not stage.has_room("me")
    assert stage.has_room("you")
    gates[0].next.release(2)
    wait_for(lambda: stage.has_room("me"))
    gates[1].next.release(2)


def test_where_the_end_of_a_run_is_read_there_is_room_again(stage: Stage) -> None:
    for _ in range(200):
        gates = [Gate() for _ in range(3)]
        runs = [stage.begin(gate(), f"key{n}", owner="me"[:n]) for n, gate in enumerate(gates)]
        for run, gate in zip(runs, gates, strict=True):
            gate.next.release()
            assert fields(stage.read(run)) == [("end", "{}")]


def test_a_key_that_is_busy_takes_no_room_from_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, other = Gate(), Gate()
    first = stage.begin(gate())
    stage.begin(other(), "other")
    begin, arrived, may_ask = stage.registry.begin, threading.Event(), threading.Event()

    def begin_late(key: str, *arguments: Any) -> Standing:
        if key == "key":
            arrived.set()
            assert may_ask.wait(DEADLINE)
        return begin(key, *arguments)

    monkeypatch.setattr(stage.registry, "begin", begin_late)
    found: list[Standing] = []
    threads = [
        threading.Thread(
            target=lambda key=key: found.append(
                stage.runs.begin(stage.new(key), iter(()), lambda function: function)
            )
        )
        for key in ("key", "third")
    ]
    threads[0].start()
    assert arrived.wait(DEADLINE)
    threads[1].start()
    wait_for(lambda: stage.runs._progress._waiting)
    may_ask.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert [one.run == first.id for one in found] == [True, False]
    for one in (gate, other):
        one.next.release()


def test_whoever_waits_for_room_that_others_may_not_need_does_so_for_a_while(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "_ROOM_SECONDS", 0.01)
    stage.runs._placed = stage.runs._asking = {"a", "b", "c"}
    assert not stage.has_room()
    stage.runs._placed.clear()


@pytest.mark.parametrize("owner", ["me", ""])
def test_of_many_at_the_same_moment_as_many_begin_as_there_is_room_for(
    stage: Stage, owner: str
) -> None:
    limit = 2 if owner else 3
    for _ in range(20):
        gates = [Gate() for _ in range(8)]
        barrier = threading.Barrier(8)
        begun: list[Run] = []

        def begin(n: int, gates: list[Gate], barrier: threading.Barrier, begun: list[Run]) -> None:
            barrier.wait(DEADLINE)
            with suppress(NoRoomError):
                begun.append(stage.begin(gates[n](), f"key{n}", owner=owner))

        threads = [
            threading.Thread(target=begin, args=(n, gates, barrier, begun)) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(begun) == limit
        for gate in gates:
            gate.next.release()
        for run in begun:
            assert fields(stage.read(run)) == [("end", "{}")]


def test_ids_cannot_be_guessed_and_are_short(stage: Stage) -> None:
    ids = {stage.new().id for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(id) for id in ids} == {12}


def test_in_openais_format_a_run_ends_as_the_api_does(stage: Stage) -> None:
    run = stage.begin(iter([{"id": "x"}]), format="openai")
    assert fields(stage.read(run)) == [("message", '{"id": "x"}'), ("message", "[DONE]")]


def test_the_joiner_ends_with_the_last_run_and_starts_with_the_next(stage: Stage) -> None:
    list(stage.read(stage.begin(iter("ab"))))
    wait_for(lambda: stage.runs._joiner._bell is None)
    assert len(list(stage.read(stage.begin(iter("ab"))))) == 3


def test_a_forked_child_produces_nothing(stage: Stage) -> None:
    runs = Runs(stage.registry, 1)
    runs._active["x"] = stage.new()
    runs._placed.add("x")
    with pytest.raises(NoRoomError):
        runs.begin(stage.new(), iter(()), lambda function: function)
    runs._reset()  # what os.register_at_fork() calls
    runs.begin(stage.new(), iter(()), lambda function: function)
    wait_for(lambda: not runs.is_busy)


def test_a_run_for_which_there_is_no_thread_does_not_keep_its_key(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(concurrency, "spawn", spawn)
        with pytest.raises(RuntimeError, match="new thread"):
            stage.begin(iter("a"), owner="me")
    assert stage.registry._owners == {}
    assert not stage.runs._placed
    found = stage.registry.find("key")
    assert found
    assert found.state == "stream-error"
    assert fields(stage.read(stage.begin(iter("a")))) == [("message", "a"), ("end", "{}")]
