"""Publish to a Redis server as a script does, and time it: ``redis_publishers.py WORK URL ...``.

What it found goes to the standard output, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import redis
from flask_sse import sse
from flask_sse_app import create_app
from ours import CHANNEL

from flask_eventstream.redis_broker import RedisBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Act = Callable[[Sequence[str]], object]

CHUNK = 100
PAUSE = 0.001
"""Between two calls that are timed, so that one call's event is out before the next."""
WARM_UPS = 50


def publish_every(url: str, events: str, interval: str, data: str) -> None:
    """Publish data some times, ``interval`` seconds apart, with number and time in front."""
    broker = RedisBroker(url)
    start = time.monotonic()
    for number in range(int(events)):
        time.sleep(max(0.0, start + number * float(interval) - time.monotonic()))
        broker.publish(f"{number}@{time.monotonic_ns()}@{data}", channel=CHANNEL)


def time_calls(url: str, rounds: str, calls: str, data: str) -> list[dict[str, object]]:
    """Return for each round and each way what its calls took, as pairs of ns: wall and CPU."""
    alone, heard = (RedisBroker(url, key_prefix=prefix) for prefix in ("alone:", "heard:"))
    ways: dict[str, Callable[[str], object]] = {
        "PUBLISH": partial(redis.Redis.from_url(url).publish, "bare"),
        "alone": alone.publish,
        "heard": heard.publish,
        "Flask-SSE": sse.publish,
    }
    with heard_by_a_thread(heard), create_app(url).app_context():
        for _ in range(WARM_UPS):
            _time_each(ways, data, 1)
        return [_time_each(ways, data, int(calls)) for _ in range(int(rounds))]


@contextmanager
def heard_by_a_thread(broker: RedisBroker) -> Iterator[None]:
    """Have a thread of this process read what a broker brings."""
    subscription = broker.subscribe()

    def read() -> None:
        while subscription.take(timeout=60) is not None:
            pass

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        subscription.close()
        thread.join()


def _time_each(
    ways: dict[str, Callable[[str], object]], data: str, calls: int
) -> dict[str, object]:
    return {name: [_time(way, data) for _ in range(calls)] for name, way in ways.items()}


def _time(way: Callable[[str], object], data: str) -> tuple[int, int]:
    time.sleep(PAUSE)
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    way(data)
    return time.perf_counter_ns() - wall, time.thread_time_ns() - cpu


def measure_rates(url: str, rounds: str, seconds: str, data: str) -> list[dict[str, object]]:
    """Return for each round and each way: events per second, and the CPU us of an event.

    The CPU time is that of this process and that of Redis.
    """
    client = redis.Redis.from_url(url)
    with create_app(url).app_context():
        ways = _ways_to_publish_many(client, RedisBroker(url, key_prefix="alone:"))
        turn = partial(_rate, client, events=[data] * CHUNK, seconds=float(seconds))
        return [{name: turn(act) for name, act in ways.items()} for _ in range(int(rounds))]


def _ways_to_publish_many(client: redis.Redis, broker: RedisBroker) -> dict[str, Act]:
    def pipelined(events: Sequence[str]) -> None:
        with client.pipeline(transaction=False) as pipeline:
            for event in events:
                pipeline.publish("bare", event)
            pipeline.execute()

    return {
        "PUBLISH": partial(_one_by_one, partial(client.publish, "bare")),
        "pipeline": pipelined,
        "publish": partial(_one_by_one, broker.publish),
        "publish_many": broker.publish_many,
        "Flask-SSE": partial(_one_by_one, sse.publish),
    }


def _one_by_one(publish: Callable[[str], object], events: Sequence[str]) -> None:
    for event in events:
        publish(event)


def _rate(client: redis.Redis, act: Act, events: Sequence[str], seconds: float) -> dict[str, float]:
    act(events)
    before, cpu, start = _redis_seconds(client), time.process_time(), time.perf_counter()
    count = len(events) * sum(1 for _ in _repeated(act, events, start + seconds))
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    spent = _redis_seconds(client) - before
    return {"per_second": count / taken, "us": cpu / count * 1e6, "redis_us": spent / count * 1e6}


def _repeated(act: Act, events: Sequence[str], end: float) -> Iterator[None]:
    while time.perf_counter() < end:
        yield act(events)


def _redis_seconds(client: redis.Redis) -> float:
    found = client.info("cpu")
    return found["used_cpu_sys"] + found["used_cpu_user"]


if __name__ == "__main__":
    works = {"publish-every": publish_every, "calls": time_calls, "rates": measure_rates}
    print(json.dumps(works[sys.argv[1]](*sys.argv[2:])))
