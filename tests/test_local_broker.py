from __future__ import annotations

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.errors import InvalidFieldError
from flask_eventstream.history import Entry
from flask_eventstream.local_broker import LOG_PREFIX, seq_of_minted


@pytest.mark.parametrize("id", ["ab-1", "ab-0", "ab-0042", "ab-9999999999999999999"])
def test_an_id_of_the_epoch_has_a_number(id: str) -> None:
    assert seq_of_minted(id, "ab") == int(id[3:])


@pytest.mark.parametrize(
    "id", ["", "ab", "ab-", "abc-1", "-1", "ab--1", "ab-x", "ab-٣", "ab-" + "9" * 20]
)
def test_every_other_id_has_none(id: str) -> None:
    assert seq_of_minted(id, "ab") is None


def test_what_lies_ahead_of_the_books_is_not_replayed_but_comes_as_news() -> None:
    broker = MemoryBroker()
    cursor = broker.last_event_id()
    keep = broker.subscribe()
    for seq in (1, 2):
        broker._channels.append(["sse"], Entry(seq, broker._clock(), None, b"data: %d\n\n" % seq))
    broker._channels.advance(1)
    subscriptions = [broker.subscribe(history=9), broker.subscribe(last_event_id=cursor)]
    assert [one.start for one in subscriptions] == [b"data: 1\n\n"] * 2
    broker._channels.advance(2)
    assert [one.take(0) for one in subscriptions] == [b"data: 2\n\n"] * 2
    assert keep.take(0) == b"data: 1\n\ndata: 2\n\n"


def test_a_log_is_kept_as_a_whole_and_has_a_name_that_nobody_can_give() -> None:
    broker = MemoryBroker(history=1, history_seconds=1, max_run_bytes=1 << 20)
    for n in range(1, 301):
        broker.write_log("run", b"data: x\nid: run.%d\n\n" % n)
        broker.publish("x", channel="news")
    assert broker.published == 300
    start = broker.subscribe_log("run", 300).start
    assert start.count(b"\n\n") == 300
    with pytest.raises(InvalidFieldError, match="control character"):
        broker.subscribe(LOG_PREFIX + "run")
    with pytest.raises(InvalidFieldError, match="control character"):
        broker.publish("x", channel=LOG_PREFIX + "run")
    broker.forget_log("run")
    assert broker.subscribe_log("run", 0).start == b""
