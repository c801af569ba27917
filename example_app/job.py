"""A job that tells how far it is, in whichever process it runs."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask_eventstream.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from flask_eventstream import Broker

PARTS = 40


@dataclass(frozen=True)
class Job:
    """Counts the primes below a limit, part by part.

    :param id: what tells it from all others.
    :param owner: who may see and cancel it.
    :param limit: the limit.
    :param pause: how long it rests between two parts, in seconds.
    """

    id: str
    owner: str
    limit: int
    pause: float

    def run(self, broker: Broker) -> None:
        """Work, and rest where an order may come."""
        size, found = self.limit // PARTS, 0
        orders = broker.subscribe(f"orders:{self.owner}:{self.id}", history=1)
        with closing(orders):
            is_cancelled = bool(orders.start)  # before it has begun
            for part in range(PARTS):
                if is_cancelled:
                    return self.tell(broker, "cancelled", f"{found:,} primes until then.")
                first = part * size
                self.tell(broker, "running", f"From {first:,}.", 100 * part // PARTS)
                found += primes_in(first, first + size)
                is_cancelled = orders.take(self.pause) != b""
        return self.tell(broker, "finished", f"{found:,} primes.", 100)

    def tell(self, broker: Broker, state: str, words: str, percent: int | None = None) -> None:
        """Publish everything there is to know, so that the last event is enough."""
        about = {
            "id": self.id,
            "limit": self.limit,
            "process": os.getpid(),
            "state": state,
            "words": words,
            "percent": percent,
        }
        channels = [f"job:{self.id}", f"jobs:{self.owner}"]
        broker.publish(about, type="job", channel=channels)


def primes_in(first: int, end: int) -> int:
    """Count the primes from one number to another, by a sieve."""
    is_prime = bytearray([1]) * (end - first)
    is_prime[: max(0, 2 - first)] = bytes(max(0, 2 - first))
    for factor in range(2, math.isqrt(end) + 1):
        begin = max(factor * factor, -(-first // factor) * factor) - first
        is_prime[begin::factor] = bytes(len(range(begin, end - first, factor)))
    return sum(is_prime)


def run_alone() -> None:
    """Read a job from the standard input, and publish without an app."""
    from flask_eventstream.redis_broker import RedisBroker

    job = Job(**json.load(sys.stdin))
    url, prefix = os.environ["REDIS_URL"], os.environ["KEY_PREFIX"]
    # Both mean that the server ends, and its Redis with it.
    with suppress(BrokerUnavailableError, KeyboardInterrupt):
        with closing(RedisBroker(url, key_prefix=prefix)) as broker:
            job.run(broker)
