"""The log of a run: its ids, and what a client that returns still has to get of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .broker import encode_reset

if TYPE_CHECKING:
    from .run_registry import Standing


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


def rest_of(log: bytes, standing: Standing, number: int, cursor: str) -> bytes:
    """Return what a client still has to get of what there is of a log.

    :param log: the log, as far as it is kept.
    :param standing: how its run stood before the log was read.
    :param number: the number of the last event that the client has, 0 for none.
    :param cursor: the cursor that it came with.
    :returns: the events after that, or a ``reset`` and all there are.
    """
    first = _first_number(log) or standing.last + 1
    if number + 1 == first:
        return log
    if number + 1 < first:
        earliest = f"{standing.run}.{first}" if log else None
        return encode_reset(cursor, earliest, f"{standing.run}.{first - 1}") + log
    # Exact, since every line of data begins with "data:".
    return log.partition(b"\nid: %b.%d\n\n" % (standing.run.encode(), number))[2]


def has_end_of(log: bytes, standing: Standing) -> bool:
    """Tell whether what there is of a log has the last event of its run."""
    return log.endswith(b"\nid: %b.%d\n\n" % (standing.run.encode(), standing.last))


def _first_number(log: bytes) -> int | None:
    first, _, _ = log.partition(b"\n\n")
    return int(first.rpartition(b".")[2]) if first else None
