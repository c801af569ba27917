"""The seam between replay and live: publishers at full speed, subscribers that drop and return.

Run as a program it does the same with greenlets: ``python -m tests.hammer``.
"""

from __future__ import annotations

import random
import re
import sys
import threading
from collections import Counter

from flask_eventstream import Broker, MemoryBroker

PUBLISHERS = 3
SUBSCRIBERS = 8
_EVENT = re.compile(rb"data: (\d+):(\d+)\nid: (\S+)\n\n")


class Hammer:
    def __init__(self, broker: Broker, returns: int) -> None:
        self.broker = broker
        self.returns_each = returns // SUBSCRIBERS
        self.published = [0] * PUBLISHERS
        self.failures: list[str] = []
        self.received: Counter[str] = Counter()
        self._is_over = False

    def publish(self, publisher: int) -> None:
        channels = [["a"], ["b"], ["a", "b"]]
        while not self._is_over:
            number = self.published[publisher]
            self.broker.publish(f"{publisher}:{number}", channel=channels[number % 3])
            self.published[publisher] += 1
            if number % 50 == 0:
                # Full speed, but for a chance to run for the others; under gevent it is the only
                # one they have.
                pause()

    def subscribe(self, subscriber: int) -> None:
        chance = random.Random(subscriber)
        cursor = self.broker.last_event_id()
        expected: dict[int, int] = {}
        for _ in range(self.returns_each):
            subscription = self.broker.subscribe("a", "b", last_event_id=cursor)
            if not subscription.resumed:
                self.failures.append(f"{cursor} was not resumed")
            wire = subscription.start
            for _ in range(chance.randrange(3)):
                wire += subscription.take(1) or b""
            subscription.close()
            seen = self.check(wire, expected, chance)
            cursor = seen or cursor

    def check(self, wire: bytes, expected: dict[int, int], chance: random.Random) -> str | None:
        events = _EVENT.findall(wire)
        # A connection breaks anywhere: what came after the break was never seen.
        events = events[: chance.randrange(len(events) + 1)]
        for publisher, number, _ in events:
            wanted = expected.get(int(publisher), int(number))
            if int(number) != wanted:
                self.failures.append(f"{publisher!r}: {number!r} came instead of {wanted}")
            expected[int(publisher)] = int(number) + 1
        self.received["events"] += len(events)
        self.received["connections"] += 1
        return events[-1][2].decode() if events else None

    def run(self) -> None:
        publishers = [spawn(self.publish, n) for n in range(PUBLISHERS)]
        for subscriber in [spawn(self.subscribe, n) for n in range(SUBSCRIBERS)]:
            subscriber.join()
        self._is_over = True
        for publisher in publishers:
            publisher.join()


def spawn(function: object, number: int) -> threading.Thread:
    thread = threading.Thread(target=function, args=(number,), daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def pause() -> None:
    import time

    time.sleep(0)


def hammer(returns: int) -> Hammer:
    # Larger than what is published meanwhile: a reset would be right, and would prove nothing.
    broker = MemoryBroker(history=1_000_000, history_seconds=3600, max_idle_bytes=1 << 40)
    run = Hammer(broker, returns)
    run.run()
    broker.close()
    return run


if __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()
    done = hammer(int(sys.argv[1]))
    print(dict(done.received), sum(done.published), done.failures[:5])
    sys.exit(1 if done.failures or not done.received["events"] else 0)
