from __future__ import annotations

import threading
from typing import Any

from flask_eventstream.figures import DELAYS, Deliveries, Figures


def test_events_are_counted_for_each_subscriber_who_got_them() -> None:
    deliveries = Deliveries()
    wire = b"data: a\ndata: \ndata: b\nid: 1\n\ndata: c\nid: 2\n\n"
    deliveries.add(wire, 1000)
    deliveries.add(b":\n", 5)
    assert (deliveries.events, deliveries.bytes) == (2000, 1000 * len(wire) + 10)


def test_the_same_bytes_are_looked_through_once_for_all_who_get_them() -> None:
    class Large(bytes):
        looks = 0

        def count(self, *arguments: Any) -> int:
            Large.looks += 1
            return super().count(*arguments)

    deliveries, wire = Deliveries(), Large(b"data: a\n\n")
    for subscribers in (0, 1, 2):
        deliveries.add(wire, subscribers)
    assert (deliveries.events, Large.looks) == (3, 1)
    deliveries.add(b"data: b\n\ndata: c\n\n", 1)
    assert deliveries.events == 5


def test_delays_are_counted_in_classes_that_end_with_their_bounds() -> None:
    deliveries = Deliveries()
    for seconds in (0.0, DELAYS[0], DELAYS[0] + 1e-9, DELAYS[-1], DELAYS[-1] + 1):
        deliveries.observe(seconds)
    assert deliveries.delays == [2, 1, *[0] * (len(DELAYS) - 3), 1, 1]
    assert abs(deliveries.delay_sum - (2 * DELAYS[0] + 2 * DELAYS[-1] + 1)) < 1e-6


def test_nothing_is_lost_when_many_threads_count() -> None:
    figures = Figures()

    def count() -> None:
        for _ in range(1000):
            figures.connected(b": \nretry: 1\ndata: x\n\n")
            figures.delivered(b"data: y\n\n")
            figures.ended("left")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (figures.connects, figures.replayed) == (8000, 8000)
    assert figures.iterated.events == figures.ends["left"] == 8000
    assert figures.connected(b"") == 8001


def test_a_forked_child_counts_from_the_beginning() -> None:
    figures = Figures()
    figures.connected(b"")
    figures._start()  # what os.register_at_fork() calls
    assert figures.connects == 0
