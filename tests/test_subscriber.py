from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.subscriber import Frames, Subscriber, ending, framed

if TYPE_CHECKING:
    from flask_eventstream.subscriber import Source


@pytest.mark.parametrize("size", [1, 15, 16, 255, 65536])
def test_a_chunk_has_its_size_in_front(size: int) -> None:
    wire = b"x" * size
    length, _, rest = framed(wire, is_chunked=True).partition(b"\r\n")
    assert (int(length, 16), rest) == (size, wire + b"\r\n")


def test_without_chunks_the_bytes_stay_what_they_are() -> None:
    wire = b"data: x\n\n"
    assert framed(wire, is_chunked=False) is wire


@pytest.mark.parametrize(
    ("farewell", "is_chunked", "end"),
    [
        (b"", False, b""),
        (b"", True, b"0\r\n\r\n"),
        (b"retry: 1\n", False, b"retry: 1\n"),
        (b"retry: 1\n", True, b"9\r\nretry: 1\n\r\n0\r\n\r\n"),
    ],
)
def test_a_stream_ends_with_its_farewell_and_the_last_chunk(
    farewell: bytes, is_chunked: bool, end: bytes
) -> None:
    assert ending(farewell, is_chunked) == end


@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_follows_the_head_goes_with_it_and_is_framed_piece_by_piece(is_chunked: bool) -> None:
    source, size = MemoryBroker().subscribe().channel_set, 32 * 1024
    wire = b"data: %b\n\n" % (b"x" * 2 * size)

    def framed_piece(number: int) -> bytes:
        return framed(wire[number * size : (number + 1) * size], is_chunked)

    one = Subscriber(-1, Mock(), source, 0, b"head", is_chunked, 0, None, wire)
    assert one.pending == b"head" + framed_piece(0)
    assert [one.next_piece() for _ in range(3)] == [framed_piece(1), framed_piece(2), b""]
    assert one.wire == b""


def test_the_channels_of_a_subscription_are_a_source() -> None:
    source: Source = MemoryBroker().subscribe().channel_set
    assert source.read(0) == (b"", 0)


def test_an_event_goes_to_many_groups_in_the_same_frame() -> None:
    frames, wire = Frames(), b"data: x\n\n"
    assert frames.in_chunk(wire) is frames.in_chunk(wire)
    assert frames.in_chunk(b":\n") == b"2\r\n:\n\r\n"
