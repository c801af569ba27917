"""A process follows a sequence that is cut, trimmed, expired, flushed and restarted at any point.

The server is a model; what is tested is what the process makes of what it hears and reads.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_eventstream import EventStreamParser, MemoryBroker, redis_feeds
from flask_eventstream.channels import Channels, read
from flask_eventstream.history import History, in_order, joined
from flask_eventstream.redis_feeds import BrokenChainError, Feeds
from flask_eventstream.redis_scripts import Message, Record, Sync

if TYPE_CHECKING:
    from flask_eventstream.channels import ChannelSet

KEPT, PAGE = 3, 2
NAMES = "abc"


def new_history(_: str, dropped: int) -> History:
    return History(KEPT, 100, 1 << 20, 100, dropped)


class ModelServer:
    """A Redis with the streams of some channels, and one process that listens."""

    def __init__(self) -> None:
        self.epochs = 0
        self.published: list[tuple[int, str, set[str]]] = []
        self.listener: deque[Message] | None = None
        self.heard: set[str] = set()
        self.between: list[set[str]] = []
        self.restart(is_flushed=True)

    def restart(self, is_flushed: bool) -> None:
        self.epochs += 1
        self.epoch = f"{self.epochs:08x}"
        if is_flushed:
            self.seq = self.bound = 0
            self.streams: dict[str, list[Record]] = {}
            self.events: list[tuple[int, set[str]]] = []
        self.base = self.seq

    def publish(self, names: set[str], is_end: bool = False) -> None:
        self.seq += 1
        number = len(self.published)
        self.published.append((number, "end" if is_end else "event", names))
        wire = b"" if is_end else b"data: %d\n\n" % number
        self.events += [] if is_end else [(self.seq, names)]
        streams = {name: self.streams.setdefault(name, []) for name in names}
        prevs = {name: one[-1].seq if one else -self.bound for name, one in streams.items()}
        for name, stream in streams.items():
            stream.append(Record(self.seq, 0, prevs[name], None, wire))
            del stream[:-KEPT]
        for _ in names & self.heard:
            self.send(Message(self.epoch, self.seq, None, list(prevs.items()), wire))

    def send(self, message: Message) -> None:
        if self.listener is not None:
            self.listener.append(message)

    def sync(self) -> Sync:
        self.send(Message(self.epoch, self.seq, None, [], b""))
        return Sync(self.epoch, self.seq, 0, self.base, self.bound)

    def expire(self, name: str) -> None:
        for record in self.streams.pop(name, []):
            self.bound = max(self.bound, record.seq)


class Process:
    """What a reader does, one step at a time."""

    def __init__(self, server: ModelServer, max_idle_bytes: int = 1 << 20) -> None:
        self.now = 0.0
        self.books = Channels(new_history, 100)
        self.feeds = Feeds(self.books, lambda: self.now, 100, max_idle_bytes)
        self.server = server
        self.pages: list[tuple[str, int]] = []

    def connect(self, stops_early: bool = False) -> None:
        self.server.listener = deque()
        self.server.heard = set(self.feeds.connect())
        while missed := self.feeds.next_missed():
            self.read_page(missed)
            if stops_early:
                return
        self.read_page([])

    def read_page(self, names: list[str]) -> None:
        size = PAGE * self.feeds.page_scale(names)
        firsts = {name: self.feeds.first_wanted(name) for name in names}
        sync = self.server.sync()
        # Publishers do not wait.
        between, self.server.between = self.server.between, []
        for channels in between:
            self.server.publish(channels)
        if self.feeds.begin(sync):
            return
        for name, first in firsts.items():
            seq = int(first.split("-")[0])
            left = [one for one in self.server.streams.get(name, []) if one.seq >= seq]
            self.pages.append((name, len(left[:size])))
            self.feeds.load(name, sync, left[:size], len(left) <= size)

    def hear(self, most: int) -> None:
        listener = self.server.listener
        for _ in range(most):
            if not listener:
                break
            try:
                self.feeds.hear(listener.popleft())
            except BrokenChainError:
                self.connect()
                listener = self.server.listener
        if listener is not None and self.feeds.unloaded:
            names = self.feeds.next_unloaded()
            self.server.heard |= set(names)
            self.read_page(names)

    def catch_up(self) -> None:
        if self.server.listener is None:
            self.connect()
        while self.server.listener or self.feeds.unloaded:
            self.hear(1)

    def tick(self) -> None:
        self.feeds.take_changed()
        self.server.heard &= set(self.feeds)


class Reader:
    """A subscriber, with what it has to get."""

    def __init__(self, process: Process, names: str) -> None:
        self.names = set(names)
        self.process = process
        process.feeds.use(tuple(names))
        process.catch_up()
        assert process.feeds.are_ready(tuple(names))
        self.channel_set: ChannelSet = process.books.join(
            MemoryBroker(), [process.books.touch(name, 0) for name in names]
        )
        process.feeds.release(tuple(names))
        self.position = process.books.position
        self.check_history()
        self.started = len(process.server.published)
        self.got: list[int] = []
        self.is_reset = self.is_over = False

    def leave(self) -> None:
        self.process.books.leave(self.channel_set, self.process.now)
        self.process.feeds.changed |= self.names

    def check_history(self) -> None:
        """Check that of each channel there is all that it claims to have."""
        for name in self.names:
            [history] = self.process.books.histories([name])
            first, offset = history.complete_since(self.process.now), self.process.feeds._offset
            there = [one.seq for one in history.after(first) if one.seq <= self.position]
            events = [offset + seq for seq, names in self.process.server.events if name in names]
            assert there == [seq for seq in events if first < seq <= self.position]

    def read(self) -> None:
        if self.is_over:
            return
        found = read(self.channel_set, self.position, self.process.books.position, None)
        if found is None:
            self.is_over = True
            return
        entries, self.position = found
        for event in EventStreamParser().feed(joined(entries)):
            if event.type == "reset":
                self.is_reset = True
            else:
                assert not self.is_reset
                self.got.append(int(event.data))

    def expected(self) -> list[int]:
        wanted = []
        for number, kind, names in self.process.server.published[self.started :]:
            if names & self.names:
                if kind == "end":
                    break
                wanted.append(number)
        return wanted

    def check(self) -> None:
        self.read()
        self.read()
        wanted = self.expected()
        assert self.got == wanted[: len(self.got)]
        left = wanted[len(self.got) :]
        if self.is_reset:
            assert self.is_over
        elif left:
            # The reset was in the place of another channel's event. Who returns with the cursor of
            # that one gets what is left, or is told then.
            assert self.is_over
            assert self.comes_too_late() or self.replay()[: len(left)] == left

    def comes_too_late(self) -> bool:
        position = self.process.feeds.position_of(self.process.feeds.mint(self.position))
        histories = self.process.books.histories(self.names)
        return position is None or any(one.complete_since(0) > position for one in histories)

    def replay(self) -> list[int]:
        histories = self.process.books.histories(self.names)
        left = in_order(one.after(self.position) for one in histories)
        return [int(event.data) for event in EventStreamParser().feed(joined(left))]


channels = st.sets(st.sampled_from(NAMES), min_size=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), channels),
        st.tuples(st.just("publish"), channels),
        st.tuples(st.just("between"), channels, st.integers(1, 6)),
        st.tuples(st.just("end"), channels),
        st.tuples(st.just("subscribe"), channels),
        st.tuples(st.just("hear"), st.integers(1, 4)),
        st.tuples(st.just("expire"), st.sampled_from(NAMES)),
        st.tuples(st.sampled_from(["cut", "connect", "cut short", "restart", "flush", "read"])),
        st.tuples(st.sampled_from(["leave", "tick", "tick"])),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_subscriber_gets_every_event_once_or_a_reset(steps: list[tuple[Any, ...]]) -> None:
    server = ModelServer()
    process = Process(server)
    process.connect()
    readers: list[Reader] = []
    for step, *arguments in steps:
        if step == "publish":
            server.publish(*arguments)
        elif step == "between":
            server.between += [arguments[0]] * arguments[1]
        elif step == "end":
            server.publish(arguments[0], is_end=True)
        elif step == "subscribe":
            readers.append(Reader(process, "".join(sorted(arguments[0]))))
        elif step == "hear":
            process.hear(*arguments)
        elif step == "expire":
            server.expire(*arguments)
        elif step in {"cut", "restart", "flush"}:
            server.listener = None
            if step != "cut":
                server.restart(is_flushed=step == "flush")
        elif step in {"connect", "cut short"}:
            process.connect(stops_early=step == "cut short")
            server.listener = server.listener if step == "connect" else None
        elif step == "leave" and readers:
            readers.pop().leave()
        elif step == "tick":
            process.tick()
        for reader in readers if step == "read" else []:
            reader.read()
    process.catch_up()
    for reader in readers:
        reader.check()


@pytest.fixture
def server() -> ModelServer:
    return ModelServer()


@pytest.fixture
def process(server: ModelServer) -> Process:
    one = Process(server)
    one.connect()
    return one


def test_what_a_short_cut_missed_is_read_from_the_stream(
    server: ModelServer, process: Process
) -> None:
    reader = Reader(process, "a")
    server.listener = None
    for _ in range(KEPT):
        server.publish({"a"})
    process.catch_up()
    reader.check()
    assert not reader.is_over


def test_what_was_trimmed_meanwhile_is_a_reset_and_the_end(
    server: ModelServer, process: Process
) -> None:
    readers = [Reader(process, "a"), Reader(process, "b")]
    server.listener = None
    for _ in range(KEPT + 1):
        server.publish({"a"})
    process.catch_up()
    for reader in readers:
        reader.check()
    assert [reader.is_reset for reader in readers] == [True, False]
    assert [reader.is_over for reader in readers] == [True, False]


def test_a_channel_that_nobody_reads_is_followed_no_longer(process: Process) -> None:
    reader = Reader(process, "ab")
    assert process.feeds.take_changed() == {"a": 1, "b": 1}
    process.feeds.use(("a",))
    process.books.leave(reader.channel_set, 0)
    process.feeds.changed |= {"a", "b", "unknown"}
    assert process.feeds.take_changed() == {"a": 0, "b": 0, "unknown": 0}
    assert list(process.feeds) == ["a"]
    process.feeds.release(("a",))
    assert process.feeds.take_changed() == {"a": 0}
    assert list(process.feeds) == list(process.books) == []


def test_a_cursor_tells_its_epoch_however_many_there_were(
    server: ModelServer, process: Process
) -> None:
    assert re.fullmatch("[0-9a-f]{8}-0", process.feeds.mint(0))
    cursors = []
    for _ in range(20):
        Reader(process, "a")
        server.publish({"a"})
        process.catch_up()
        position = process.books.position
        cursors.append((server.epoch, server.seq, position))
        assert process.feeds.mint(position) == f"{server.epoch}-{server.seq}"
        assert process.feeds.position_of(process.feeds.mint(position)) == position
        server.restart(is_flushed=True)
        server.listener = None
        process.catch_up()
        assert process.feeds.position_of(f"{cursors[-1][0]}-1") is None
    for epoch, seq, position in cursors[-5:]:
        assert process.feeds.mint(position) == f"{epoch}-{seq}"
    assert process.feeds.mint(0).endswith("-0")


def test_before_the_first_word_of_redis_no_cursor_is_known() -> None:
    feeds = Feeds(Channels(new_history, 1), lambda: 0, 1, 1)
    assert feeds.mint(0) == "none-0"
    assert feeds.position_of("-1") is None
    assert feeds.position_of("none-0") is None


def test_an_own_id_from_before_the_epoch_is_no_cursor(
    server: ModelServer, process: Process
) -> None:
    server.publish({"a"})
    [record] = server.streams["a"]
    server.streams["a"] = [record._replace(id="mine", wire=b"data: 0\nid: mine\n\n")]
    server.restart(is_flushed=False)
    server.listener = None
    Reader(process, "a")
    [history] = process.books.histories(["a", "unknown"])
    [entry] = history.after(0)
    assert (entry.id, entry.wire) == (None, b"data: 0\nid: mine\n\n")


def test_what_is_newer_than_the_number_that_was_asked_for_comes_by_messages(
    server: ModelServer, process: Process
) -> None:
    server.publish({"a"})
    sync = server.sync()
    server.publish({"a"})
    process.feeds.use(("a",))
    process.feeds.load("a", sync, server.streams["a"], True)
    [history] = process.books.histories(["a"])
    assert [entry.seq for entry in history.after(0)] == [1]


@pytest.mark.parametrize(
    ("left_out", "until", "thinned"),
    [((), 9, 0), ((2, 3), 9, 3), ((2, 3), 2, 2), ((5,), 3, 0), ((3, 6), 9, 6)],
)
def test_what_a_stream_lacks_among_its_entries_is_known_to_be_gone(
    process: Process, left_out: tuple[int, ...], until: int, thinned: int
) -> None:
    records = [Record(seq, 0, seq - 1, None, b"data: x\n\n") for seq in range(1, 8)]
    left = [record for record in records if record.seq not in left_out]
    process.feeds.begin(Sync("00000001", 9, 0, 0, 0))
    process.feeds.use(("a",))
    process.feeds.load("a", Sync("00000001", until, 0, 0, 0), left, True)
    [history] = process.books.histories(["a"])
    assert history.thinned == max(thinned, history.dropped)
    assert redis_feeds._missing(left, until) == thinned


def test_what_somebody_else_wrote_into_a_stream_is_no_hole() -> None:
    records = [Record(seq, 0, seq - 1, None, b"data: x\n\n") for seq in (1, 3)]
    foreign = Record(2, 0, 2, None, b"")
    assert redis_feeds._missing([records[0], foreign, records[1]], 3) == 0


# Streams that are read in pages


def publish(server: ModelServer, name: str, count: int) -> None:
    for _ in range(count):
        server.publish({name})


def numbers(process: Process, name: str) -> list[int]:
    [history] = process.books.histories([name])
    return [entry.seq for entry in history.after(history.complete_since(process.now))]


def test_what_comes_between_two_pages_is_heard_before_the_second(
    server: ModelServer, process: Process
) -> None:
    reader = Reader(process, "b")
    publish(server, "a", KEPT)
    process.feeds.use(("a",))
    process.hear(1)
    assert process.pages[-1] == ("a", PAGE)
    publish(server, "b", 1)
    while not reader.got:
        assert server.listener
        process.feeds.hear(server.listener.popleft())
        reader.read()
    assert not process.feeds.are_ready(("a",))
    process.catch_up()
    assert process.feeds.are_ready(("a",))
    assert numbers(process, "a") == [1, 2, 3]


def test_channels_have_pages_read_in_turns(server: ModelServer, process: Process) -> None:
    server.listener = None
    for name in "ab":
        publish(server, name, KEPT)
        process.feeds.use((name,))
    process.catch_up()
    assert process.pages == [("a", 2), ("b", 2), ("a", 2), ("b", 2)]
    names = [str(n) for n in range(20)]
    process.feeds.use(names)
    assert process.feeds.next_unloaded() == names[:16]


def test_what_is_gone_between_two_pages_has_the_stream_read_anew_and_in_larger_pages(
    server: ModelServer, process: Process
) -> None:
    publish(server, "a", KEPT)
    process.feeds.use(("a",))
    process.hear(1)
    assert process.feeds.page_scale(["a"]) == 1
    publish(server, "a", KEPT)
    process.hear(1)
    assert process.feeds.page_scale(["a"]) == 2
    process.catch_up()
    assert numbers(process, "a") == [4, 5, 6]
    assert process.feeds.page_scale(["a"]) == 1


def test_what_was_missed_is_read_in_pages_before_any_message_is_heard(
    server: ModelServer, process: Process
) -> None:
    readers = [Reader(process, "a"), Reader(process, "b")]
    server.listener = None
    for name in "ab":
        publish(server, name, KEPT)
    process.pages.clear()
    process.feeds.use(("c",))
    process.connect()
    # The one that nobody waits for comes later.
    assert process.pages == [("a", 2), ("b", 2), ("a", 2), ("b", 2)]
    process.catch_up()
    for reader in readers:
        reader.check()
        assert reader.got == reader.expected()


# Channels that nobody reads any more


def leave_and_tick(process: Process, reader: Reader) -> None:
    reader.leave()
    process.tick()
    process.pages.clear()


def test_who_comes_back_to_a_channel_has_only_what_is_new_read(
    server: ModelServer, process: Process
) -> None:
    publish(server, "a", KEPT)
    leave_and_tick(process, Reader(process, "a"))
    process.feeds.use(("a",))
    assert not process.feeds.are_ready(("a",))
    Reader(process, "a")
    assert process.pages == [("a", 1)]
    assert numbers(process, "a") == [1, 2, 3]


def test_what_was_published_meanwhile_is_there_for_who_comes_back(
    server: ModelServer, process: Process
) -> None:
    publish(server, "a", 1)
    reader = Reader(process, "a")
    publish(server, "a", 1)
    process.catch_up()
    leave_and_tick(process, reader)
    publish(server, "a", 1)
    process.catch_up()
    Reader(process, "a")
    assert process.pages == [("a", 2)]
    assert numbers(process, "a") == [1, 2, 3]


def test_a_channel_that_went_on_for_too_long_is_read_anew(
    server: ModelServer, process: Process
) -> None:
    publish(server, "a", 1)
    leave_and_tick(process, Reader(process, "a"))
    publish(server, "a", KEPT + 1)
    Reader(process, "a")
    assert numbers(process, "a") == [3, 4, 5]


def test_who_leaves_in_the_middle_of_a_stream_comes_back_to_the_rest(
    server: ModelServer, process: Process
) -> None:
    publish(server, "a", KEPT)
    process.feeds.use(("a",))
    process.hear(1)
    process.feeds.release(("a",))
    process.tick()
    assert process.pages == [("a", 2)]
    Reader(process, "a")
    assert process.pages == [("a", 2), ("a", 2)]
    assert numbers(process, "a") == [1, 2, 3]


def test_what_is_kept_is_forgotten_after_its_time(server: ModelServer, process: Process) -> None:
    publish(server, "a", 1)
    leave_and_tick(process, Reader(process, "a"))
    process.now = 100.0
    process.tick()
    assert list(process.books) == ["a"]
    process.now = 100.1
    process.tick()
    assert list(process.books) == []


def test_of_what_is_kept_beyond_its_bytes_the_oldest_is_forgotten(server: ModelServer) -> None:
    process = Process(server, max_idle_bytes=3000)
    process.connect()
    for name in "abc":
        publish(server, name, 1)
        leave_and_tick(process, Reader(process, name))
    assert list(process.books) == ["b", "c"]
    # One that is read does not count.
    Reader(process, "b")
    publish(server, "a", 1)
    leave_and_tick(process, Reader(process, "a"))
    assert sorted(process.books) == ["a", "b", "c"]


def test_the_newest_of_what_is_kept_stays_however_large_it_is(server: ModelServer) -> None:
    process = Process(server, max_idle_bytes=0)
    process.connect()
    for name in "ab":
        publish(server, name, 1)
        leave_and_tick(process, Reader(process, name))
    assert list(process.books) == ["b"]


def test_nothing_is_kept_over_an_epoch(server: ModelServer, process: Process) -> None:
    publish(server, "a", 2)
    leave_and_tick(process, Reader(process, "a"))
    server.restart(is_flushed=True)
    server.listener = None
    publish(server, "a", 3)
    process.catch_up()
    assert list(process.books) == []
    Reader(process, "a")
    assert len(numbers(process, "a")) == 3


def test_what_has_expired_in_the_books_is_read_anew(server: ModelServer, process: Process) -> None:
    publish(server, "a", KEPT)
    leave_and_tick(process, Reader(process, "a"))
    process.books.discard("a")
    Reader(process, "a")
    assert numbers(process, "a") == [1, 2, 3]
