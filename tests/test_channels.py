from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_eventstream import MemoryBroker
from flask_eventstream import channels as channels_module
from flask_eventstream.channels import _CHANNEL_BYTES, Channels, read
from flask_eventstream.history import Entry, History

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask_eventstream.channels import ChannelSet


def books(seconds: float = 10) -> Channels:
    channels = Channels(lambda name, dropped: History(3, seconds, 0, 1, dropped), seconds)
    channels.position = 10
    return channels


def entry(seq: int, now: float = 0) -> Entry:
    return Entry(seq, now, None, b"%d" % seq)


def join(channels: Channels, *names: str) -> ChannelSet:
    return channels.join(MemoryBroker(), [channels.touch(name, 0) for name in names])


def names(sets: Iterable[ChannelSet]) -> set[tuple[str, ...]]:
    return {channel_set.names for channel_set in sets}


def test_who_reads_the_same_channels_shares_a_set() -> None:
    channels = books()
    assert join(channels, "a", "b") is join(channels, "a", "b")
    assert join(channels, "a") is not join(channels, "b")
    assert channels.subscriptions == 4


def test_a_watch_is_told_of_the_sets_that_have_news_and_of_no_others() -> None:
    channels = books()
    rung: list[int] = []
    watch = channels.watch(lambda: rung.append(1))
    for each in (["a"], ["a", "b"], ["b"], ["c"]):
        join(channels, *each)
    assert channels.append(["a"], entry(1))
    assert not channels.append(["nobody"], entry(2))
    channels.ring()
    assert rung == [1]
    assert names(channels.news(watch)) == {("a",), ("a", "b")}
    assert channels.news(watch) == set()


def test_what_lies_ahead_of_the_position_is_news_once_that_gets_there() -> None:
    channels = books()
    watch = channels.watch(print)
    sets = [join(channels, "a"), join(channels, "b")]
    channels.append(["a"], entry(12))
    channels.end([sets[1]], 13)
    assert channels.news(watch) == set()
    assert not channels.advance(11)
    assert channels.advance(12)
    assert channels.news(watch) == {sets[0]}
    assert channels.advance(20)
    assert channels.news(watch) == {sets[1]}
    assert not channels.advance(15)
    assert channels.position == 20


def test_a_discarded_channel_gives_its_readers_one_last_event() -> None:
    channels = books()
    channel_set = join(channels, "a")
    watch = channels.watch(print)
    channels.discard("a", entry(11))
    channels.discard("unknown", entry(11))
    assert list(channels) == []
    assert channels.count("a") == 0
    assert channels.advance(11)
    assert channels.news(watch) == {channel_set}
    assert channel_set.channels[0].history.after(10) == [entry(11)]
    assert channel_set.end == 11
    again = join(channels, "a")
    channels.leave(channel_set, now=0)
    assert (channels.subscriptions, channels.count("a")) == (1, 1)
    assert again is not channel_set


def test_each_watch_has_news_of_its_own() -> None:
    channels = books()
    watches = [channels.watch(print), channels.watch(print)]
    join(channels, "a")
    channels.append(["a"], entry(1))
    assert [names(channels.news(watch)) for watch in watches] == [{("a",)}] * 2


def test_the_last_who_leaves_takes_the_set_and_an_empty_channel_with_him() -> None:
    channels = books()
    channel_set = join(channels, "a", "b")
    join(channels, "a", "b")
    channels.append(["b"], entry(1))
    channels.leave(channel_set, now=0)
    assert list(channels) == ["a", "b"]
    channels.leave(channel_set, now=0)
    assert (list(channels), channels.subscriptions) == (["b"], 0)
    assert join(channels, "a", "b") is not channel_set


def test_an_ended_set_stays_until_its_last_has_left_and_nobody_joins_it() -> None:
    channels = books()
    ended = join(channels, "a")
    watch = channels.watch(print)
    assert channels.end([ended], 5) == channels.end([ended], 9) == 1
    assert ended.end == 5
    assert names(channels.news(watch)) == {("a",)}
    assert join(channels, "a") is not ended
    channels.leave(ended, now=0)
    assert channels.subscriptions == 1


def test_a_channel_that_is_finished_ends_those_who_come_later_too() -> None:
    channels = books()
    early = join(channels, "a")
    channels.finish_channel("a", 10)
    channels.finish_channel("a", 12)
    channels.finish_channel("unknown", 12)
    late = join(channels, "a")
    assert (early.end, late.end) == (10, 10)
    assert join(channels, "a") is not late
    assert channels.sets() == []
    for channel_set in (early, late):
        channels.leave(channel_set, now=0)
    assert channels.subscriptions == 1


def test_a_set_of_other_books_is_not_on_these() -> None:
    parent, child = books(), books()
    inherited = join(parent, "a")
    join(child, "a")
    child.leave(inherited, now=0)
    assert child.subscriptions == 1


def test_a_forgotten_channel_is_no_news() -> None:
    channels = books(seconds=1)
    watch = channels.watch(print)
    channel_set = join(channels, "a")
    channels.append(["a"], entry(1))
    channels.leave(channel_set, now=5)
    assert list(channels) == []
    assert channels.news(watch) == set()


WIRES = st.lists(st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.integers(1, 300)))


def test_of_channels_that_have_much_one_event_after_another_is_taken() -> None:
    broker = MemoryBroker(history=100)
    subscription = broker.subscribe("a", "b")
    channel_set = subscription.channel_set
    for n in range(30):
        broker.publish("x" * 90, channel=[["a", "b"], ["a"], ["b"], ["c"]][n % 4])
    whole, _ = channel_set.read(0) or (b"", 0)
    size = len(whole)
    for until, most, position in ((None, size, 30), (None, size + 1, 30), (9, size, 9)):
        wire, reached = channel_set.read(0, until, most) or (b"", 0)
        assert (whole.startswith(wire), reached) == (True, position)
    assert channel_set.read(0, None, 1) == (whole[: whole.index(b"\n\n") + 2], 1)
    assert channel_set.read(0, 30, size, [0, 0]) == (whole, 30)


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("few", [1, 2, 16])
@given(WIRES, st.integers(1, 500), st.data())
def test_reading_in_frames_gives_what_reading_at_once_does(
    few: int, names: str, published: list[tuple[set[str], int]], max_bytes: int, data: Any
) -> None:
    broker = MemoryBroker(history=1000)
    subscription = broker.subscribe(*names)
    for channels, size in published:
        broker.publish("x" * size, channel=channels)
    whole = subscription.channel_set.read(0)
    until = data.draw(st.integers(0, len(published)))
    frames, position = b"", 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels_module, "_FEW", few)
        patch.setattr(channels_module, "_MANY", 2 * few)
        for stop in (until, None):
            while found := subscription.channel_set.read(position, stop, max_bytes):
                wire, position = found
                frames += wire
                if len(wire) < max_bytes:
                    break
            assert stop is None or position == stop
    assert (frames, position) == whole


def test_a_reader_who_lacks_something_is_told_so() -> None:
    broker = MemoryBroker(history=1, max_event_bytes=100)
    subscription = broker.subscribe()
    for _ in range(50):
        broker.publish("x" * 50)
    assert subscription.channel_set.read(0) is None
    assert subscription.channel_set.read(49)


def test_an_ended_set_is_read_up_to_its_end() -> None:
    broker = MemoryBroker()
    subscription = broker.subscribe()
    broker.publish("1", id="one")
    broker.disconnect("sse")
    broker.publish("2")
    assert subscription.channel_set.read(0) == (b"data: 1\nid: one\n\n", 1)
    assert subscription.channel_set.read(1) is None


def test_an_end_behind_the_last_event_comes_after_it() -> None:
    channels = books()
    channel_set = join(channels, "a")
    channels.append(["a"], entry(11))
    channels.position = 12
    assert channels.end_channel("a", 12) == 1
    # Who has all but the end is not taken for one that lacks something.
    assert read(channel_set, 10, 12, None) == ([entry(11)], 12)
    assert read(channel_set, 11, 12, None) == ([], 12)
    assert read(channel_set, 12, 12, None) is None


# --- Channels that nobody reads


def bounded(size: float) -> Channels:
    """Return books with room for so many channels of one event that nobody reads."""
    one = _CHANNEL_BYTES + 1 + 256 + 2
    return Channels(lambda name, dropped: History(3, 10, 0, 1, dropped), 10, size * one)


def test_of_channels_that_nobody_reads_those_used_last_are_kept() -> None:
    channels = bounded(3.5)
    for seq, name in enumerate("abcaded", 10):
        channels.append([name], entry(seq))
    assert list(channels) == ["a", "e", "d"]
    # What was forgotten may have had all that came before.
    assert channels.touch("b", 0).history.dropped == 12
    assert [one.newest for one in channels.histories("a")] == [13]


def test_a_channel_that_is_read_is_kept_and_counts_once_nobody_reads_it() -> None:
    channels = bounded(2)
    for seq, name in enumerate("abc", 10):
        one = join(channels, name)
        channels.append([name], entry(seq))
        if name != "a":
            channels.leave(one, 0)
    first = channels.sets()[0]
    for seq, name in enumerate("defgh", 13):
        channels.append([name], entry(seq))
    assert list(channels) == ["a", "g", "h"]
    channels.leave(first, 0)
    assert set(channels) == {"h", "a"}


def test_the_newest_channel_is_kept_however_large() -> None:
    channels = bounded(0.5)
    for seq, name in enumerate("ab", 10):
        channels.append([name], entry(seq))
    assert list(channels) == ["b"]


def test_what_is_kept_until_it_is_forgotten_counts_not() -> None:
    channels = Channels(lambda _, dropped: History(3, math.inf, 0, 1, dropped), 10, 0)
    for seq, name in enumerate("abc", 10):
        channels.append([name], entry(seq))
    assert list(channels) == ["a", "b", "c"]


ACTS = st.tuples(
    st.sampled_from(["append", "join", "leave", "discard", "sweep"]), st.sampled_from("abcdef")
)


@given(st.lists(ACTS, max_size=60))
def test_whatever_happens_what_nobody_reads_is_counted_exactly(acts: list[tuple[str, str]]) -> None:
    channels = bounded(2)
    joined: list[ChannelSet] = []
    for now, (act, name) in enumerate(acts, 1):
        if act == "append":
            channels.append([name], entry(now + 10, now))
        elif act == "join":
            joined.append(join(channels, name))
        elif act == "leave" and joined:
            channels.leave(joined.pop(0), now)
        elif act == "discard":
            channels.discard(name)
        else:
            channels.sweep(now)
        found = [channels._channels[name] for name in channels]
        idle = [one for one in found if not one.sets and one.history]
        assert sum(one.bytes for one in found) == channels._idle_bytes
        assert {one.name for one in idle} <= set(channels._idle) <= set(channels)
        assert len(channels._idle) < 2 or channels._idle_bytes <= channels._max_idle_bytes
