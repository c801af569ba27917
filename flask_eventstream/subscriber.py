"""What the hub knows of a subscriber: a socket, a position, and the bytes in between."""

from __future__ import annotations

from typing import Protocol


class Source(Protocol):
    """What the subscribers of a group read.

    :ivar end: the position where it ends; ``None`` as long as it goes on.
    """

    end: int | None

    def read(
        self, after: int, until: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, int] | None:
        """Return the bytes behind a position, and the position behind them.

        At least ``max_bytes`` are returned if there are as many, and no more than needed for that.
        ``None`` if there is nothing more to come, or some of it is gone.
        """


class Owner(Protocol):
    """What a subscriber belongs to."""

    def close(self) -> None:
        """Called once the client is gone, on another thread or greenlet than the hub's."""


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
    """

    __slots__ = (
        "deadline",
        "descriptor",
        "group",
        "is_chunked",
        "is_half_closed",
        "moved",
        "offset",
        "owner",
        "pending",
        "position",
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
        self.deadline = deadline


def framed(wire: bytes, is_chunked: bool) -> bytes:
    """Return bytes, not empty, as they go over the wire."""
    return b"%x\r\n%b\r\n" % (len(wire), wire) if is_chunked else wire
