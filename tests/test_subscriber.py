from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.subscriber import Subscriber, framed

if TYPE_CHECKING:
    from flask_eventstream.subscriber import Owner, Source


@pytest.mark.parametrize("size", [1, 15, 16, 255, 65536])
def test_a_chunk_has_its_size_in_front(size: int) -> None:
    wire = b"x" * size
    length, _, rest = framed(wire, is_chunked=True).partition(b"\r\n")
    assert (int(length, 16), rest) == (size, wire + b"\r\n")


def test_without_chunks_the_bytes_stay_what_they_are() -> None:
    wire = b"data: x\n\n"
    assert framed(wire, is_chunked=False) is wire


def test_a_subscription_is_an_owner_and_its_channels_are_a_source() -> None:
    subscription = MemoryBroker().subscribe()
    owner: Owner = subscription
    source: Source = subscription.channel_set
    subscriber = Subscriber(7, owner, source, 0, b"", False, math.inf)
    assert subscriber.group.source is source
    assert subscriber.group.size == 0
