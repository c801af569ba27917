from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.redis_link import RedisLink
from flask_eventstream.redis_presence import LEASE_SECONDS, Presence
from flask_eventstream.redis_scripts import Keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .redis_server import RedisServer


@pytest.fixture
def link(redis: RedisServer) -> Iterator[RedisLink]:
    one = RedisLink(redis.url, 1, 2)
    yield one
    one.close()


@pytest.fixture
def pair(link: RedisLink, redis: RedisServer) -> tuple[Presence, Presence]:
    keys = Keys(redis.prefix(), 0)
    return Presence(link, keys), Presence(link, keys)


def test_what_one_tells_the_other_counts(pair: tuple[Presence, Presence]) -> None:
    one, two = pair
    one.tell({"a": 2, "b": 1}, 3)
    assert [two.count_others(name) for name in ("a", "b", "c", "")] == [2, 1, 0, 3]
    assert one.count_others("a") == 0
    one.tell({"a": 0, "b": 5}, 5)
    assert [two.count_others(name) for name in ("a", "b", "")] == [0, 5, 5]
    one.leave()
    assert two.count_others("") == 0


def test_all_channels_of_the_others_are_told_at_once(pair: tuple[Presence, Presence]) -> None:
    one, two = pair
    assert two.counts_of_others() == {}
    one.tell({"a": 2, "数": 1}, 3)
    two.tell({"a": 7}, 7)
    assert two.counts_of_others() == {"a": 2, "数": 1}
    two._link.pipeline([("DEL", one.key)])
    assert two.counts_of_others() == {}
    assert one.counts_of_others() == {"a": 7}


def test_who_does_not_renew_the_lease_is_forgotten(
    pair: tuple[Presence, Presence], redis: RedisServer
) -> None:
    one, two = pair
    one.tell({"a": 1}, 1)
    assert 0 < redis.redis.ttl(one.key) <= LEASE_SECONDS
    redis.redis.delete(one.key)
    processes = two._keys.processes.decode()
    assert redis.redis.scard(processes) == 1
    assert two.count_others("a") == 0
    assert redis.redis.scard(processes) == 0


def test_nothing_is_told_while_there_is_nothing_new(pair: tuple[Presence, Presence]) -> None:
    one, two = pair
    one.tell({"a": 1}, 1)
    calls = spy(one)
    one.tell({"a": 1, "b": 0}, 1)
    assert calls == []
    one._next_renewal = 0
    one.tell({}, 1)
    assert len(calls) == 1
    assert two.count_others("a") == 1


def test_what_could_not_be_told_is_told_with_the_next_renewal(
    pair: tuple[Presence, Presence],
) -> None:
    one, two = pair
    one.tell({"a": 1, "b": 1}, 2)
    link, one._link = one._link, RedisLink("redis://127.0.0.1:1", 0.1, 1)
    with pytest.raises(BrokerUnavailableError):
        one.tell({"a": 2, "b": 0}, 2)
    one.tell({}, 2)  # not at once
    one._link, one._next_renewal = link, 0
    one.tell({}, 2)
    assert [two.count_others(name) for name in ("a", "b")] == [2, 0]


def spy(presence: Presence) -> list[Any]:
    calls: list[Any] = []
    pipeline = presence._link.pipeline

    def note(commands: Any) -> list[Any]:
        calls.append(commands)
        return pipeline(commands)

    presence._link.pipeline = note  # type: ignore[assignment]
    return calls
