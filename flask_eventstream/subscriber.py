"""What the hub knows of a subscriber: a socket, a position, and the bytes in between."""

from __future__ import annotations

from typing import Protocol

_LAST_CHUNK = b"0\r\n\r\n"
_PIECE_BYTES = 32 * 1024
"""How much is framed at once. A chunk is a copy, and what it is made of is shared."""


class Source(Protocol):
    """What the subscribers of a group read.

    :ivar end: the position where it ends; ``None`` as long as it goes on.
    """

    end: int | None

    def read(
        self, after: int, until: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, int] | None:
        """Return the bytes behind a position, and the position behind them.

        At least ``max_bytes`` are returned if there are as many, and no more than needed for that;
        with ``until``, a large event comes alone, whatever is before it.
        ``None`` if there is nothing more to come, or some of it is gone.
        """


class Replay(Protocol):
    """What a subscriber gets before its source."""

    @property
    def is_over(self) -> bool:
        """Whether all of it was read."""

    def read(self, max_bytes: int) -> bytes | None:
        """Return what comes next, as :meth:`Source.read`; ``None`` if some of it is gone."""


class Owner(Protocol):
    """What a subscriber belongs to."""

    def end(self, reason: str) -> None:
        """Called once the stream is over, on another thread or greenlet than the hub's."""


class Group:
    """Those who read the same source from the same position.

    :ivar position: up to where its live members have everything.
    :ivar live: its members but for those that lag: the unframed ones, and those in chunks.
    :ivar size: how many members it has, with those that lag.
    :ivar sent: when something was sent to them last.
    :ivar is_over: whether its source has ended.
    """

    __slots__ = ("is_over", "live", "position", "sent", "size", "source")

    def __init__(self, source: Source, position: int) -> None:
        self.source = source
        self.position = position
        self.is_over = False
        self.size = 0
        self.sent = 0.0
        self.live: tuple[dict[int, Subscriber], dict[int, Subscriber]] = ({}, {})


class Subscriber:
    """A client's socket, and what it still has to get.

    :param descriptor: the socket's file descriptor, which the hub closes.
    :param owner: what is closed when the client is gone.
    :param source: where its bytes come from.
    :param position: from where on they are read.
    :param pending: what has to be sent before, as it goes over the wire.
    :param is_chunked: whether the bytes are framed in chunks (RFC 9112, section 7.1).
    :param deadline: when the stream ends, by :func:`time.monotonic`.
    :param replay: what comes between ``wire`` and the source, if anything.
    :param wire: what comes behind ``pending`` and is not framed yet.
    """

    __slots__ = (
        "deadline",
        "descriptor",
        "group",
        "is_chunked",
        "is_half_closed",
        "is_revoked",
        "moved",
        "offset",
        "owner",
        "pending",
        "position",
        "replay",
        "taken",
        "wire",
    )

    def __init__(
        self,
        descriptor: int,
        owner: Owner,
        source: Source,
        position: int,
        pending: bytes,
        is_chunked: bool,
        deadline: float,
        replay: Replay | None = None,
        wire: bytes = b"",
    ) -> None:
        self.descriptor = descriptor
        self.owner = owner
        self.group = Group(source, position)
        self.position = position
        self.pending = pending
        self.offset = 0
        self.moved = 0.0
        self.is_chunked = is_chunked
        self.is_half_closed = False
        self.is_revoked = False
        self.deadline = deadline
        self.replay = replay
        self.wire = wire
        self.taken = 0
        if wire:
            # In one packet with the head.
            self.pending += self.next_piece()

    def next_piece(self) -> bytes:
        """Return what is to be sent next of ``wire``, framed; ``b""`` if nothing is left."""
        piece = self.wire[self.taken : self.taken + _PIECE_BYTES]
        self.taken += len(piece)
        if self.taken == len(self.wire):
            self.wire, self.taken = b"", 0
        return framed(piece, self.is_chunked) if piece else b""

    @property
    def has_all(self) -> bool:
        """Whether it was given all that its group has."""
        return self.replay is None and self.position >= self.group.position


class Members:
    """The subscribers of a hub, and the groups that they are in.

    :ivar all: all of them, by their descriptors.
    :ivar lagging: those who have not everything yet that their group has.
    :ivar ready: those of the lagging ones whose sockets have room, in the order of their turns.
    :ivar groups: the groups whose sources go on.
    """

    def __init__(self) -> None:
        self.all: dict[int, Subscriber] = {}
        self.lagging: dict[int, Subscriber] = {}
        self.ready: dict[int, Subscriber] = {}
        self.groups: dict[Source, Group] = {}

    def join(self, subscriber: Subscriber, now: float) -> Group:
        """Take in a subscriber, which is lagging at first, and return the group of its source."""
        group = self.groups.setdefault(subscriber.group.source, subscriber.group)
        if not group.size:
            group.sent = now
        group.size += 1
        subscriber.group = group
        subscriber.moved = now
        self.all[subscriber.descriptor] = self.lagging[subscriber.descriptor] = subscriber
        return group

    def fall_behind(self, subscriber: Subscriber, now: float) -> None:
        """Take note that a subscriber, which is not in its group's ``live`` any more, lags."""
        subscriber.position = subscriber.group.position
        subscriber.moved = now
        self.lagging[subscriber.descriptor] = subscriber

    def catch_up(self, subscriber: Subscriber) -> None:
        """Take note that a subscriber has all that its group has."""
        del self.lagging[subscriber.descriptor]
        self.ready.pop(subscriber.descriptor, None)
        subscriber.group.live[subscriber.is_chunked][subscriber.descriptor] = subscriber

    def leave(self, subscriber: Subscriber) -> None:
        """Let a subscriber go."""
        descriptor, group = subscriber.descriptor, subscriber.group
        del self.all[descriptor]
        self.lagging.pop(descriptor, None)
        self.ready.pop(descriptor, None)
        group.live[subscriber.is_chunked].pop(descriptor, None)
        group.size -= 1
        if not group.size and not group.is_over:
            del self.groups[group.source]


class Frames:
    """Puts what goes to many groups into a chunk once."""

    def __init__(self) -> None:
        self._wire = self._chunk = b""

    def in_chunk(self, wire: bytes) -> bytes:
        """Return some bytes in a chunk."""
        # One event that goes to many groups is the same object each time.
        if wire is not self._wire:
            self._wire, self._chunk = wire, framed(wire, True)
        return self._chunk


def framed(wire: bytes, is_chunked: bool) -> bytes:
    """Return bytes, not empty, as they go over the wire."""
    return b"%x\r\n%b\r\n" % (len(wire), wire) if is_chunked else wire


def ending(farewell: bytes, is_chunked: bool) -> bytes:
    """Return the last bytes of a stream as they go over the wire, with what ends its body."""
    return (framed(farewell, is_chunked) if farewell else b"") + (
        _LAST_CHUNK if is_chunked else b""
    )
