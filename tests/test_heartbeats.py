from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, cast

from flask_eventstream import MemoryBroker
from flask_eventstream.heartbeats import Heartbeats
from flask_eventstream.subscriber import Subscriber

if TYPE_CHECKING:
    from flask_eventstream.subscriber import Owner


def subscriber(descriptor: int, sent: float) -> Subscriber:
    source, owner = MemoryBroker().subscribe().channel_set, cast("Owner", None)
    one = Subscriber(descriptor, owner, source, 0, b"", True, math.inf)
    one.group.sent = sent
    return one


def test_everybody_who_is_silent_is_due_once_within_three_quarters_of_the_interval() -> None:
    heartbeats = Heartbeats(16, b":\n")
    everybody = {n: subscriber(n, sent=0) for n in range(100)}
    now, due = 100.0, []
    while now < 112:
        due.append([one.descriptor for one in heartbeats.due(everybody, now)])
        now = heartbeats.next_tick
    assert sorted(chain.from_iterable(due)) == list(range(100))
    assert max(map(len, due)) <= 9


def test_who_got_something_a_moment_ago_is_not_due() -> None:
    heartbeats = Heartbeats(1, b":\n")
    busy = {7: subscriber(7, sent=99.9)}
    assert not any(heartbeats.due(busy, 100) for _ in range(20))
    assert any(heartbeats.due(busy, 100.2) for _ in range(20))


def test_a_beat_is_a_comment_also_in_a_chunk() -> None:
    assert Heartbeats(15, b":\n").wires == (b":\n", b"2\r\n:\n\r\n")
