"""What the asyncio peers share: a queue for each subscriber, as their documentation has it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Feed(Generic[T]):
    """Queues of subscribers; what is published is put into each."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[T]] = set()

    def publish(self, item: T) -> None:
        """Put an item into the queue of each subscriber, without waiting for any."""
        for queue in self._queues:
            queue.put_nowait(item)

    @contextmanager
    def subscribed(self) -> Iterator[asyncio.Queue[T]]:
        """Return a queue that gets all that is published as long as the block runs."""
        queue: asyncio.Queue[T] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)


def numbered(count: int, data: str) -> list[str]:
    """Return the data of a burst: ``count`` times the same, each with its number in front."""
    return [f"{number}@{data}" for number in range(count)]
