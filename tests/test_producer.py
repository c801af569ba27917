from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from flask_eventstream import interval
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.producer import _AHEAD, END, NOTHING, Producers

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def as_it_is(function: Callable[[], object]) -> Callable[[], object]:
    return function


def drained(producers: Producers) -> list[Any]:
    items = []
    while (item := producers.get(timeout=20)) is not END:
        items.append(item)
    return items


def test_the_items_of_every_source_arrive_in_its_order() -> None:
    sources = [[(source, n) for n in range(100)] for source in range(3)]
    items = drained(Producers(sources, as_it_is))
    for source in range(3):
        assert [n for one, n in items if one == source] == list(range(100))


def test_no_source_ends_at_once() -> None:
    assert drained(Producers([], as_it_is)) == []


def test_items_that_look_like_signs_are_items() -> None:
    assert drained(Producers([[None, NOTHING, False]], as_it_is)) == [None, NOTHING, False]


def test_a_silent_source_is_told_from_one_that_has_ended() -> None:
    speak = threading.Event()

    def source() -> Iterator[str]:
        speak.wait(20)
        yield "x"

    producers = Producers([source()], as_it_is)
    assert producers.get(timeout=0.01) is NOTHING
    speak.set()
    assert drained(producers) == ["x"]
    assert producers.get(timeout=0) is END


def test_a_source_runs_ahead_by_a_bounded_number_of_items() -> None:
    produced: list[int] = []

    def source() -> Iterator[int]:
        for n in range(1000):
            produced.append(n)
            yield n

    producers = Producers([source()], as_it_is)
    wait_for(lambda: len(produced) == _AHEAD + 1)
    assert producers.get() == 0
    wait_for(lambda: len(produced) == _AHEAD + 2)
    assert drained(producers) == list(range(1, 1000))


@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError(), SystemExit(3)])
def test_what_a_source_raises_is_raised_where_items_are_taken(error: BaseException) -> None:
    def source() -> Iterator[str]:
        yield "before"
        raise error

    producers = Producers([source()], as_it_is)
    assert producers.get(timeout=20) == "before"
    with pytest.raises(type(error)) as caught:
        producers.get(timeout=20)
    assert caught.value is error


def test_closing_closes_the_sources_on_their_own_threads() -> None:
    closed_on: list[str] = []
    started = threading.Event()

    def source(go_on: threading.Event) -> Iterator[int]:
        try:
            started.set()
            go_on.wait(20)
            yield 1
        finally:
            closed_on.append(threading.current_thread().name)

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed_on.append(threading.current_thread().name)

    go_on = threading.Event()
    producers = Producers([source(go_on), endless()], as_it_is)
    started.wait(20)
    producers.close()
    wait_for(lambda: len(closed_on) == 1, what="the one that is ahead to be closed")
    go_on.set()
    wait_for(lambda: len(closed_on) == 2, what="the other one to be closed at its next item")
    assert threading.current_thread().name not in closed_on


def test_a_source_that_fails_while_it_is_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise ValueError("while closing")

    with caplog.at_level(logging.ERROR):
        producers = Producers([source()], as_it_is)
        assert producers.get(timeout=20) == 1
        producers.close()
        wait_for(lambda: "while closing" in caplog.text)


def test_the_end_comes_even_if_closing_a_source_wants_to_end_the_thread() -> None:
    class Source:
        def __iter__(self) -> Iterator[int]:
            return iter([1])

        def close(self) -> None:
            raise SystemExit

    assert drained(Producers([Source()], as_it_is)) == [1]


def test_a_source_runs_with_what_is_carried_over() -> None:
    carried: list[str] = []

    def carry(function: Callable[[], object]) -> Callable[[], object]:
        carried.append("wrapped")
        return function

    assert drained(Producers([[1], [2]], carry)) in ([1, 2], [2, 1])
    assert carried == ["wrapped", "wrapped"]


def test_ticks_are_counted_and_come_at_their_times() -> None:
    ticks = interval(0.02)
    start = time.monotonic()
    assert [next(ticks) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert time.monotonic() - start >= 0.1 - 0.001


def test_missed_ticks_are_not_made_up_for() -> None:
    ticks = interval(0.02)
    next(ticks)
    due = time.monotonic() + 0.1
    while time.monotonic() < due:
        pass
    next(ticks)
    start = time.monotonic()
    next(ticks)
    assert time.monotonic() - start >= 0.02 - 0.001


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_an_interval_without_a_pause_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigurationError) as caught:
        interval(seconds)
    assert caught.value.field == "seconds"


def test_ticks_let_other_greenlets_run_without_monkey_patching() -> None:
    told: list[str] = []

    def tick() -> None:
        told.append("waits")
        next(interval(0.1))
        told.append("ticked")

    greenlets = [gevent.spawn(tick) for _ in range(20)]
    assert len(gevent.joinall(greenlets, timeout=DEADLINE)) == 20
    # One after another, if none had let the others run meanwhile.
    assert told != ["waits", "ticked"] * 20
    assert told[:2] == ["waits", "waits"]
