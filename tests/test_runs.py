from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flask_eventstream import interval
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.shutdown import StreamStopped

from .servers import wait_for
from .test_run import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.wait()


def test_runs_that_are_given_up_end_as_lost_after_what_they_have_produced(stage: Stage) -> None:
    one, other = (stage.begin(interval(0.01), key) for key in ("one", "other"))
    for run in (one, other):
        run.wait(20)
    assert stage.runs.is_busy
    stage.runs.stop()
    for run in (one, other):
        *items, last = stage.read(run)
        assert [item.data for item in items] == [str(n) for n in range(len(items))]
        assert [item.id for item in (*items, last)] == [
            f"{run.id}.{n + 1}" for n in range(len(items) + 1)
        ]
        assert last.type == "lost"
    wait_for(lambda: not stage.runs.is_busy)


def test_a_run_that_has_come_to_its_end_is_not_lost(stage: Stage) -> None:
    stage.registry.error = BrokerUnavailableError("redis://test", "is away")
    run = stage.begin(iter("ab"))
    wait_for(lambda: not stage.runs.is_busy)
    stage.registry.error = None
    stage.runs.stop()
    assert [event.type for event in stage.read(run)] == ["message", "message", "end"]


def test_a_view_that_is_thrown_out_of_its_wait_is_a_run_that_is_lost(stage: Stage) -> None:
    def view() -> Iterator[str]:
        yield "a"
        raise StreamStopped

    assert [event.type for event in stage.read(stage.begin(view()))] == ["message", "lost"]
    assert stage.reported == []


def test_giving_up_does_not_wait_for_a_broker_that_is_away(stage: Stage) -> None:
    stage.registry.error = BrokerUnavailableError("redis://test", "is away")
    run = stage.begin(interval(0.01))
    stage.runs.stop()
    assert not run.is_over
    stage.registry.error = None
    assert [event.type for event in stage.read(run)][-1] == "lost"
