"""Whatever a client returns with, it gets exactly what came after it, or a reset.

A case is what happens to a broker in memory, whose clock it moves. A cursor comes as bytes, in the
header, in the query or without a request: ids that the broker gave, or that only look so, the ids
of publishers, of runs, and of nobody, and bytes that are no UTF-8. The invariant:

* Who is resumed gets every event of its channels after the one that the cursor names, in order,
  each once, and nothing else. So does who stays subscribed.
* A ``reset`` tells the cursor, and history follows: all of it that was promised, and nothing else.
  It comes only if the cursor names no event, or several, or one after which something may be gone.
* Of a run's log, a client gets what comes after the number in its cursor; ``reset`` and what is
  left, if that is gone; 404 for what is no cursor of the run.
* ``publish`` refuses just the ids that no client could send back, and those that look like the
  broker's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import inputs
from .world import CHANNELS, ROADS, World

if TYPE_CHECKING:
    from random import Random

    Case = tuple[int, int, list[tuple[Any, ...]]]
    """How many events a channel keeps, for how many seconds, and what happens.

    Channels and roads are told by their places in ``CHANNELS`` and ``ROADS``.
    """

OWN_IDS = ("own", "own", "own", "0", "世界", "end", "{epoch}-", "{epoch}-x", "{run}.3", "a b")
CURSORS = (
    b"{epoch}-", b"{epoch}", b"-3", b"{epoch}-03", b"{epoch}-+3", b"{epoch}- 3", b"{epoch}-3 ",
    "{epoch}-³".encode(), "{epoch}-３".encode(), b"{epoch}--3", b"{epoch}-3.0", b"{epoch}-3_0",
    b"{epoch}-18446744073709551616", b"{epoch}-" + b"9" * 30, b"00000000-3", b"{run}.3", b"{run}.",
    b"{run}.03", "{run}.³".encode(), b"{run}.{run}.3", b".", b"..3", b"", b"\xff", b"\xe4\xb8",
    b"{epoch}-3\xff", b"reset", b"undefined", b"null", b"x" * 300,
)  # fmt: skip


def generate(chance: Random) -> Case:
    """Return a case."""
    acts = [_act(chance) for _ in range(chance.randint(1, 16))]
    return chance.choice((0, 1, 2, 4, 9)), chance.choice((10, 1000)), acts


def _act(chance: Random) -> tuple[Any, ...]:
    kind = chance.random()
    if kind < 0.55:
        return "publish", chance.randrange(len(CHANNELS)), _own_id(chance)
    if kind < 0.85:
        channels, history = chance.randrange(len(CHANNELS)), chance.randrange(-1, 4)
        return "return", channels, _cursor(chance), chance.randrange(len(ROADS)), history
    if kind < 0.92:
        texts = [inputs.text(chance, 4, sendable=True) for _ in range(chance.randrange(9))]
        return "run", texts, _cursor(chance, b"{run}."), chance.randrange(len(ROADS) - 1)
    if kind < 0.96:
        return "wait", chance.choice((1, 9, 11, 2000))
    return ("take",) if kind < 0.98 else ("leave",)


def _own_id(chance: Random) -> str | None:
    way = chance.random()
    if way < 0.6:
        return None
    if way < 0.9:
        return chance.choice(OWN_IDS)
    return f"{{epoch}}-{chance.randrange(9)}" if way < 0.93 else inputs.text(chance, 3)


def _cursor(chance: Random, prefix: bytes = b"{epoch}-") -> bytes:
    way = chance.random()
    if way < 0.6:
        # As a rule there have been few events, and higher numbers are those of none.
        return b"%b%d" % (prefix, chance.triangular(0, 10, 0))
    if way < 0.8:
        return chance.choice(OWN_IDS).encode()
    if way < 0.93:
        return chance.choice(CURSORS)
    return inputs.mutated(chance, chance.choice(CURSORS))


def check(case: Case) -> None:
    """Raise if the invariant does not hold."""
    size, seconds, acts = case
    world = World(size, seconds)
    try:
        for name, *arguments in acts:
            getattr(world, f"do_{name}")(*arguments)
        world.do_take()
    finally:
        world.do_leave()
