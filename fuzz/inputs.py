"""Random streams and texts: put together from pieces that matter, and mutated from known ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

PIECES: tuple[bytes, ...] = (
    b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\r\r", b"\n\r", b":", b": ", b" ", b"\t", b"\0",
    b"data", b"data:", b"data: ", b"data:  ", b"data: x\n", b"data\n\n", b"data: x\n\n", b"Data: x",
    b"data : x", b"id", b"id:", b"id: 1\n", b"id: \0\n", b"id: a\0b\n", b"id\n", "id: 世".encode(),
    b"event", b"event: t\n", b"event:\n", b"event: message\n", b"event: \xe2\x80\xa8\n", b"retry",
    b"retry: 7\n", b"retry: -1\n", b"retry: 007\n", b"retry: 1e3\n", b"retry: \xd9\xa1\n",
    b"retry:" + b"9" * 25 + b"\n", b"retry: " + b"9" * 4400 + b"\n", b":\n", b": comment\n",
    b"\xef\xbb\xbf", b"\xef\xbb", b"\xfe\xff", b"\xff", b"\xc0\x80", b"\xe4\xb8", b"\xed\xa0\x80",
    b"\xf0\x9f\x8e", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85", b"\x0b",
    b"\x0c", b"\x1c", b"\x1e", "世界".encode(), "🎉".encode(), b"x" * 70,
)  # fmt: skip
"""What a stream is made of, and what other programs have stumbled over."""

STREAMS: tuple[bytes, ...] = (
    # The examples of WHATWG HTML, section 9.2.6.
    b"data: YHOO\ndata: +2\ndata: 10\n\n",
    b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
    b"data\n\ndata\ndata\n\ndata:",
    b"data:test\n\ndata: test\n\n",
    b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
    # What this package writes.
    b":\nretry: 3000\ndata: Hello!\nid: 1f0c-7\n\n:\n:\nevent: end\ndata: {}\nid: end\n\n",
    b'event: reset\ndata: {"requested": "x", "earliest": null}\nid: 1f0c-9\n\ndata: a\ndata: \n\n',
    # What others write.
    b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\ndata: [DONE]\n\n',
    b'event: message_start\r\ndata: {"type":"start"}\r\n\r\nevent: ping\r\ndata: {}\r\n\r\n',
    b"\xef\xbb\xbfid: 1\rdata: mac\r\rretry: 10\r\ndata: mixed\n\r\n",
)

CHARACTERS: tuple[str, ...] = (
    "a", "0", " ", ":", "\n", "\r", "\r\n", "\0", "\t", "\x0b", "\x1c", "\x85", "\u2028", "\u2029",
    "\ufeff", "\xa0", "é", "ÿ", "世", "🎉", "\U0010ffff", "data: ", "id: 1\n", "\n\n", "event: ",
    "retry: 1", "²", "١", "-", ".", "+", "%", "\\", "{epoch}", "{run}",
)  # fmt: skip
SURROGATES = ("\ud800", "\udfff")


def stream(chance: Random) -> bytes:
    """Return the bytes of a stream, most of them almost valid."""
    way = chance.random()
    if way < 0.35:
        return b"".join(chance.choices(PIECES, k=chance.randrange(16)))
    if way < 0.55:
        lines = chance.choices(PIECES, k=chance.randrange(12))
        return b"".join([line.strip(b"\r\n") + b"\n" * chance.randint(1, 2) for line in lines])
    if way < 0.97:
        return mutated(chance, chance.choice(STREAMS))
    return chance.randbytes(chance.randrange(40))


def mutated(chance: Random, wire: bytes) -> bytes:
    """Return bytes with a few changes: something put in, left out, repeated, changed, cut off."""
    for _ in range(chance.randrange(5)):
        start = chance.randrange(len(wire) + 1)
        end = min(len(wire), start + chance.randrange(12))
        put = chance.choice(
            (b"", chance.choice(PIECES), wire[start:end] * 2, chance.randbytes(1), None)
        )
        wire = wire[:start] if put is None else wire[:start] + put + wire[end:]
    return wire


def text(chance: Random, most: int = 8, sendable: bool = False) -> str:
    """Return a text, of such characters as matter; with lone surrogates, unless it is sendable."""
    characters = CHARACTERS if sendable else CHARACTERS + SURROGATES
    return "".join(chance.choices(characters, k=chance.randint(0, most)))
