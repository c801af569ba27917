from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_eventstream import EventStreamParser, MemoryBroker, local_broker
from flask_eventstream.errors import InvalidFieldError
from flask_eventstream.history import Entry
from flask_eventstream.local_broker import LOG_PREFIX, seq_of_minted
from flask_eventstream.subscription import FRAME_BYTES, Subscription


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


def frames(subscription: Subscription) -> list[bytes]:
    """Return what a subscription begins with, frame by frame, and what is pending."""
    found = [subscription.start]
    while wire := subscription.take(0, FRAME_BYTES):
        found.append(wire)
    return found


def numbers(wire: bytes) -> list[str]:
    return [event.data.strip() for event in EventStreamParser().feed(wire)]


def test_a_large_history_is_read_in_frames_and_not_copied_for_each() -> None:
    broker = MemoryBroker()
    cursor = broker.last_event_id()
    for n in range(100):
        broker.publish(f"{n:10000}")
    for last_event_id in (None, cursor, "x"):
        subscription = broker.subscribe(last_event_id=last_event_id, history=100)
        assert len(subscription.start) < FRAME_BYTES + 11_000
        assert subscription.cursor == broker.last_event_id()
        found = frames(subscription)
        assert max(map(len, found)) < FRAME_BYTES + 11_000
        assert numbers(b"".join(found))[-100:] == [str(n) for n in range(100)]


def test_what_is_put_behind_history_comes_before_what_is_new() -> None:
    broker = MemoryBroker()
    for n in range(20):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=20)
    subscription.put_behind(b"data: behind\n\n")
    broker.publish("new")
    found = frames(subscription)
    assert numbers(b"".join(found)) == [*map(str, range(20)), "behind", "new"]
    assert subscription.replay is None


def test_a_subscription_whose_history_is_gone_before_it_was_read_ends() -> None:
    broker = MemoryBroker(history=20, max_event_bytes=11_000)
    for n in range(20):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=20)
    for n in range(20, 60):
        broker.publish(f"{n:10000}")
    assert subscription.take(0) is None
    assert not subscription.is_at_end


def test_what_is_replayed_is_kept_for_a_while_though_newer_events_come() -> None:
    broker = MemoryBroker(history=256)
    for n in range(256):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=256)
    # As many as 4 MiB hold.
    for n in range(256, 256 + 300):
        broker.publish(f"{n:10000}")
    assert numbers(b"".join(frames(subscription))) == [str(n) for n in range(556)]


def test_a_subscription_that_is_closed_in_the_middle_of_history_gets_nothing_more() -> None:
    broker = MemoryBroker()
    for n in range(20):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=20)
    subscription.close()
    assert subscription.take(0) is None


def test_a_large_event_is_a_frame_of_its_own_which_all_share() -> None:
    broker = MemoryBroker()
    cursor = broker.last_event_id()
    texts = ["small", "x" * FRAME_BYTES, "small", "y" * FRAME_BYTES, "z" * FRAME_BYTES, "small"]
    for text in texts:
        broker.publish(text)
    one, other = (frames(broker.subscribe(last_event_id=cursor)) for _ in range(2))
    assert [numbers(frame) for frame in one] == [[text] for text in texts]
    assert [ours is theirs for ours, theirs in zip(one, other, strict=True)][1::3] == [True, True]
    # Nothing of it is in what every client has of its own.
    cursor = broker.last_event_id()
    broker.publish("x" * FRAME_BYTES)
    one, other = (frames(broker.subscribe(last_event_id=cursor)) for _ in range(2))
    assert one[0] == b""
    assert one[1] is other[1]
    assert broker.subscribe(last_event_id=cursor).take(0) is one[1]


def test_a_value_that_is_replaced_before_it_is_read_from_history_comes_once() -> None:
    broker = MemoryBroker()
    cursor = broker.last_event_id()
    broker.publish("x" * FRAME_BYTES)
    broker.publish("old", key="k")
    subscription = broker.subscribe(last_event_id=cursor)
    assert numbers(subscription.take(0, FRAME_BYTES) or b"") == ["x" * FRAME_BYTES]
    broker.publish("new", key="k")
    assert subscription.replay is not None
    assert numbers(subscription.take(0, FRAME_BYTES) or b"") == ["new"]


class Counted(list[Entry]):
    """Entries that count how many of them are looked at, in ``found``."""

    found: Counter[str]

    def __getitem__(self, index: Any) -> Any:
        entries = super().__getitem__(index)
        self.found["entries"] += len(entries) if isinstance(index, slice) else 1
        return entries


@pytest.mark.parametrize("cursor", ["the first", "invented", None])
@pytest.mark.parametrize("number", [1, 10])
def test_what_channels_keep_is_looked_at_no_more_than_it_is_sent(
    number: int, cursor: str | None
) -> None:
    names = [f"c{n}" for n in range(number)]
    broker, found = MemoryBroker(history=5000), Counter[str]()
    for name in names:
        broker.publish_many(["x" * 1000] * 5001, name)
    for history in broker._channels.histories(names):
        history._entries = Counted(history._entries)
        history._entries.found = found
    # A cursor from before all that is kept, one that was never given, or none.
    last_event_id = broker.mint(0) if cursor == "the first" else cursor
    subscription = broker.subscribe(*names, last_event_id=last_event_id, history=99)
    assert (b"event: reset" in subscription.start) == (cursor is not None)
    # Some for each channel, to find the place, and the 32 of a frame.
    assert found["entries"] < 600 + 200 * number
    subscription.take(0, FRAME_BYTES)
    assert found["entries"] < 1200 + 300 * number


CHANNELS = st.sets(st.sampled_from("abc"), min_size=1)
SECONDS = st.integers(1, 4)


@given(
    st.lists(SECONDS | st.tuples(CHANNELS, st.sampled_from(["", "", "k", "l"])), max_size=40),
    st.lists(SECONDS | st.tuples(CHANNELS, st.just("")), max_size=3),
    st.integers(0, 12),
    st.integers(-1, 40),
)
def test_history_in_frames_is_what_it_is_at_once(
    acts: list[Any], later: list[Any], history: int, cursor: int
) -> None:
    now = 0.0
    broker = MemoryBroker(history=3, history_seconds=10, clock=lambda: now)
    # Somebody who keeps a tail.
    keep = broker.subscribe("a", "b", "c")
    last_event_id = None if cursor < 0 else broker.mint(cursor)

    def do(acts: list[Any]) -> None:
        nonlocal now
        for act in acts:
            if isinstance(act, int):
                now += act
            else:
                broker.publish("x", channel=sorted(act[0]), key=act[1] or None)

    def subscribe(frame_bytes: int) -> Subscription:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_broker, "FRAME_BYTES", frame_bytes)
            return broker.subscribe("a", "b", last_event_id=last_event_id, history=history)

    do(acts)
    whole, in_frames = subscribe(1 << 20), subscribe(1)
    do(later)
    found = [in_frames.start]
    while wire := in_frames.take(0, 1):
        found.append(wire)
    assert b"".join(found) == whole.start + (whole.take(0) or b"")
    keep.close()
