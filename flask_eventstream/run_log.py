"""The log of a run: its ids, and what a client that returns still has to get of it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from typing import TYPE_CHECKING

from .broker import encode_reset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .history import Entry
    from .run_registry import Standing

_LONGEST_NUMBER = 24


def new_key(url: str, owner: str) -> str:
    """Return what the clients of a run ask for.

    :param url: its URL.
    :param owner: whose it is, ``""`` if it is not for one alone.
    """
    # Both may have any characters, so it is told where one ends and the other begins. JSON brings
    # lone surrogates, too.
    text = f"{len(url)} {url}{owner}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def number_in(cursor: str, run: str) -> int | None:
    """Return the number of an event by its id; ``None`` if it is no id of a run."""
    prefix, _, number = cursor.rpartition(".")
    is_number = number.isascii() and number.isdigit() and len(number) < 20
    return int(number) if prefix == run and is_number else None


def rest_of(
    standing: Standing, number: int, cursor: str, entries: Sequence[Entry]
) -> tuple[bytes, int]:
    """Find where a client goes on in a log.

    :param standing: how its run stood before the log was read.
    :param number: the number of the last event that the client has, 0 for none.
    :param cursor: the cursor that it came with.
    :param entries: the log, as far as it is kept; each entry has one event or several.
    :returns: what comes first, the rest of an entry or a ``reset``, and how many entries are
        left out.
    """
    run = standing.run
    first = _first_number(entries[0].wire) if entries else standing.last + 1
    if number + 1 < first:
        earliest = f"{run}.{first}" if entries else None
        return encode_reset(cursor, earliest, f"{run}.{first - 1}"), 0
    found = bisect_right(entries, number, key=_last_number)
    if found == len(entries):
        return b"", found
    # Exact, since every line of data begins with "data:".
    _, its_id, rest = entries[found].wire.partition(b"\nid: %b.%d\n\n" % (run.encode(), number))
    return (rest, found + 1) if its_id else (b"", found)


def _first_number(wire: bytes) -> int:
    return int(wire.partition(b"\n\n")[0].rpartition(b".")[2])


def _last_number(entry: Entry) -> int:
    return int(entry.wire[-_LONGEST_NUMBER:].rpartition(b".")[2])
