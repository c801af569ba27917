from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from flask_eventstream.history import MOST_PRESENCE, PRESENCE, Entry, History, in_order, joined


def history(size: int = 3, seconds: float = 10, tail_bytes: int = 0, dropped: int = 0) -> History:
    return History(size, seconds, tail_bytes, tail_seconds=5, dropped=dropped)


def entry(
    seq: int, time: float = 0, id: str | None = None, size: int = 1, key: str | None = None
) -> Entry:
    return Entry(seq, time, id, b"x" * size, key)


def filled(kept: History, count: int, keep_tail: bool = False, size: int = 1) -> History:
    for seq in range(1, count + 1):
        kept.append(entry(seq, time=seq, size=size), keep_tail)
    return kept


def seqs(entries: list[Entry]) -> list[int]:
    return [one.seq for one in entries]


def test_it_keeps_the_newest_events_and_knows_what_it_dropped() -> None:
    kept = filled(history(), 5)
    assert seqs(kept.replayable(now=5)) == [3, 4, 5]
    assert kept.dropped == kept.complete_since(now=5) == 2


def test_it_drops_what_is_too_old() -> None:
    kept = filled(history(seconds=2), 3)
    assert seqs(kept.replayable(now=4.5)) == [3]
    assert kept.complete_since(now=4.5) == 2
    kept.trim(4.5, keep_tail=False)
    assert (len(kept), kept.dropped) == (1, 2)


def test_nothing_is_dropped_before_it_has_dropped_something() -> None:
    assert filled(history(), 3).complete_since(now=3) == 0
    assert history(dropped=7).complete_since(now=0) == history(dropped=7).dropped == 7


def test_after_a_sequence_number_comes_all_that_is_higher() -> None:
    assert seqs(filled(history(), 3).after(1)) == [2, 3]
    assert filled(history(), 3).after(3) == []


def test_a_history_of_no_events_replays_none() -> None:
    kept = filled(history(size=0, tail_bytes=1000), 2, keep_tail=True)
    assert kept.replayable(now=2) == []
    assert kept.complete_since(now=2) == 2
    assert seqs(kept.after(0)) == [1, 2]


def test_the_tail_keeps_more_for_those_who_are_connected() -> None:
    kept = filled(history(tail_bytes=10_000), 9, keep_tail=True)
    assert seqs(kept.after(0)) == list(range(4, 10))  # tail_seconds is 5
    assert seqs(kept.replayable(now=9)) == [7, 8, 9]
    assert (kept.dropped, kept.complete_since(now=9)) == (3, 6)


def test_the_tail_is_dropped_once_nobody_is_connected() -> None:
    kept = filled(history(tail_bytes=10_000), 9, keep_tail=True)
    kept.trim(9, keep_tail=False)
    assert seqs(kept.after(0)) == [7, 8, 9]


def test_the_tail_is_bounded_in_bytes() -> None:
    kept = filled(history(size=0, tail_bytes=3000), 4, keep_tail=True, size=1000)
    assert seqs(kept.after(0)) == [3, 4]


def test_the_tail_keeps_the_newest_event_however_large() -> None:
    kept = filled(history(size=0, tail_bytes=10), 2, keep_tail=True, size=1000)
    assert seqs(kept.after(0)) == [2]


def test_an_own_id_is_found_wherever_it_was_used() -> None:
    kept = history()
    for seq, id in enumerate(["a", "b", "a"]):
        kept.append(entry(seq, id=id), keep_tail=False)
    assert (kept.positions("a"), kept.positions("b"), kept.positions("c")) == ([0, 2], [1], [])


def test_channels_are_joined_in_order_and_each_event_once() -> None:
    shared = entry(2)
    entries = in_order([[entry(1), shared], [shared, entry(3)], []])
    assert seqs(entries) == [1, 2, 3]
    assert joined(entries) == b"xxx"
    assert in_order([[shared]]) == [shared]


def test_all_is_bounded_in_bytes_but_for_the_newest() -> None:
    kept = History(99, 99, 0, 0, max_bytes=3000)
    filled(kept, 4, keep_tail=False, size=1000)
    assert seqs(kept.replayable(now=4)) == [3, 4]
    kept.append(entry(5, size=9000), keep_tail=False)
    assert seqs(kept.replayable(now=5)) == [5]
    assert kept.dropped == 4


def keyed(kept: History, keys: str, size: int = 1) -> History:
    """Fill with entries of these keys; a space is an entry without one."""
    for seq, key in enumerate(keys, 1):
        kept.append(entry(seq, size=size, key=key.strip() or None), keep_tail=True)
    return kept


def test_of_a_key_only_the_newest_is_kept_at_its_own_place() -> None:
    kept = keyed(history(size=9), "ab cab")
    assert seqs(kept.after(0)) == seqs(kept.replayable(now=6)) == [3, 4, 5, 6]
    assert seqs(kept.after(4)) == [5, 6]


def test_what_was_replaced_pushes_nothing_out_and_is_not_missing() -> None:
    kept = keyed(history(size=3), " b" + "a" * 100)
    assert seqs(kept.after(0)) == [1, 2, 102]
    assert kept.dropped == kept.complete_since(now=1) == 0


def test_what_was_replaced_takes_no_bytes() -> None:
    kept = keyed(history(size=0, tail_bytes=3000), " " + "a" * 100, size=1000)
    assert seqs(kept.after(0)) == [1, 101]


def test_a_key_whose_entry_was_dropped_is_forgotten_with_it() -> None:
    kept = history(size=40, seconds=5)
    for seq in range(1, 1000):
        kept.append(entry(seq, time=seq, key=str(seq % 7)), keep_tail=False)
        assert seqs(kept.after(0)) == list(range(max(1, seq - 5), seq + 1))
    kept.trim(9999, keep_tail=False)
    assert (len(kept), kept.dropped) == (0, 999)
    kept.append(entry(1000, time=9999, key="6"), keep_tail=False)
    assert seqs(kept.after(0)) == [1000]


@given(
    st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=80),
    st.integers(0, 12),
    st.booleans(),
)
def test_with_keys_it_is_the_history_without_what_was_replaced(
    keys: list[str | None], size: int, keep_tail: bool
) -> None:
    kept = History(size, 1e9, tail_bytes=257 * 15, tail_seconds=1e9)
    every: list[Entry] = []
    for seq, key in enumerate(keys, 1):
        one = entry(seq, key=key)
        kept.append(one, keep_tail)
        every = [other for other in every if key is None or other.key != key] + [one]
        left = kept.after(kept.dropped)
        assert left == [other for other in every if other.seq > kept.dropped]
        assert len(left) == len(kept) >= min(size, len(every))


def come(kept: History, count: int, time: float = 0, keep_tail: bool = True) -> None:
    """Add so many joins and leaves."""
    for seq in range(kept.newest + 1, kept.newest + 1 + count):
        kept.append(entry(seq, time=time, key=PRESENCE), keep_tail)


def test_joins_push_out_no_other_event_and_beyond_a_number_each_other() -> None:
    kept = filled(history(), 3)
    come(kept, MOST_PRESENCE + 7, time=3)
    assert seqs(kept.replayable(now=3)) == [1, 2, 3, *range(11, MOST_PRESENCE + 11)]
    assert (kept.dropped, kept.thinned, kept.complete_since(now=3)) == (0, 10, 10)


def test_who_is_connected_has_all_joins_within_the_limits_of_the_tail() -> None:
    kept = filled(history(tail_bytes=1 << 20), 3)
    come(kept, MOST_PRESENCE + 7, time=3)
    assert (len(kept.after(0)), kept.thinned) == (MOST_PRESENCE + 10, 0)
    shown = [1, 2, 3, *range(11, MOST_PRESENCE + 11)]
    assert seqs(kept.replayable(now=3)) == seqs(kept.replayable_after(0)) == shown
    assert seqs(kept.replayable_after(1, limit=3)) == [2, 3, 11]
    kept.trim(9, keep_tail=True)  # tail_seconds is 5
    assert (seqs(kept.after(0)), kept.thinned) == (shown, 10)


def test_joins_that_only_the_connected_had_are_dropped_once_nobody_is() -> None:
    kept = filled(history(tail_bytes=1 << 20), 3)
    come(kept, MOST_PRESENCE + 7, time=3)
    kept.trim(3, keep_tail=False)
    assert (len(kept.after(0)), kept.thinned) == (MOST_PRESENCE + 3, 10)


def test_joins_that_are_no_longer_replayed_are_thinned_too() -> None:
    kept = filled(history(tail_bytes=1 << 20), 3)
    come(kept, MOST_PRESENCE + 7, time=3)
    for seq in range(kept.newest + 1, kept.newest + 4):
        kept.append(entry(seq, time=3), keep_tail=True)
    # Before the messages that are replayed there are more joins than messages may be.
    assert seqs(kept.replayable(now=3)) == list(range(MOST_PRESENCE + 8, MOST_PRESENCE + 14))
    assert kept.bytes == 257 * len(kept)
    kept.trim(3, keep_tail=False)
    assert kept.thinned == kept.dropped == MOST_PRESENCE + 7
    assert kept.bytes == 257 * len(kept) == 257 * 6


def test_a_value_that_is_replayed_no_more_makes_room_for_its_successor() -> None:
    kept = filled(history(size=1, tail_bytes=2000), 2, keep_tail=True)
    kept.append(entry(3, time=3, key="k"), keep_tail=True)
    kept.append(entry(4, time=3), keep_tail=True)
    assert seqs(kept.replayable(now=3)) == [4]
    kept.append(entry(5, time=3, key="k"), keep_tail=True)
    assert (seqs(kept.after(0)), kept.bytes) == ([1, 2, 4, 5], 257 * 4)
    assert seqs(kept.replayable(now=3)) == [5]
    kept.trim(3, keep_tail=False)
    assert (seqs(kept.after(0)), kept.bytes, kept.dropped) == ([5], 257, 4)


class Few(History):
    """A history that keeps few joins and leaves."""

    __slots__ = ()

    @property
    def _most_presence(self) -> int:
        return max(self._size, 2)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=60),
    st.integers(0, 4),
)
def test_what_is_kept_of_joins_and_messages_adds_up(
    steps: list[tuple[bool, bool, int]], size: int
) -> None:
    kept = Few(size, 10, tail_bytes=3000, tail_seconds=5)
    now = 0.0
    for seq, (is_join, keep_tail, pause) in enumerate(steps, 1):
        now += pause
        kept.append(entry(seq, time=now, key=PRESENCE if is_join else None), keep_tail)
        left = kept.after(0)
        assert kept.bytes == 257 * len(left) == 257 * len(kept)
        shown = kept.replayable(now)
        assert sum(one.key is None for one in shown) <= size
        assert sum(one.key is not None for one in shown) <= max(size, 2)
        assert seqs(kept.after(kept.thinned)) == list(range(kept.thinned + 1, seq + 1))
        times = accumulate(pause for _, _, pause in steps[:seq])
        recent = [
            number
            for number, (time, (is_one, _, _)) in enumerate(zip(times, steps, strict=False), 1)
            if not is_one and now - time <= 10
        ]
        told = [one.seq for one in shown if one.key is None]
        assert told == recent[max(0, len(recent) - size) :]
