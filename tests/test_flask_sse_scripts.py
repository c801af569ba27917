from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from redis.exceptions import ResponseError

from flask_eventstream.flask_sse_scripts import COPY, TAKE
from flask_eventstream.redis_scripts import Keys

if TYPE_CHECKING:
    from .redis_server import RedisServer


def take(server: RedisServer, keys: Keys, round: str, number: int, id: str = "") -> Any:
    names = [keys.state, keys.marks, keys.channel("a"), keys.taken(round, "a")]
    return server.redis.eval(TAKE, 4, *names, 256, 60, number, id, b"data: x\n\n")


def test_a_number_of_a_round_is_taken_once(redis: RedisServer) -> None:
    keys = Keys(redis.prefix(), 0)
    # Some may be left out, and then who is behind has nothing to offer any more.
    numbers = [("r", 1), ("r", 1), ("r", 3), ("r", 2), ("r", 4), ("other", 1), ("r", 4)]
    assert [take(redis, keys, *each) for each in numbers] == [1, 0, 1, 0, 1, 1, 0]
    assert redis.redis.xlen(keys.channel("a")) == 4
    assert 0 < redis.redis.ttl(keys.taken("r", "a")) <= 300


def test_an_id_that_the_broker_gives_is_refused(redis: RedisServer) -> None:
    keys = Keys(redis.prefix(), 0)
    assert take(redis, keys, "r", 1, "own") == 1
    client: Any = redis.redis
    epoch = client.hget(keys.state, "epoch").decode()
    with pytest.raises(ResponseError, match=f"MINTED {epoch}-9"):
        take(redis, keys, "r", 2, f"{epoch}-9")
    assert take(redis, keys, "r", 2, f"{epoch}-") == 1


def test_a_full_server_takes_nothing_and_can_be_asked_again(own_redis: RedisServer) -> None:
    keys = Keys("full:", 0)
    own_redis.redis.config_set("maxmemory", 1)
    with pytest.raises(ResponseError):
        take(own_redis, keys, "r", 1)
    own_redis.redis.config_set("maxmemory", 0)
    assert take(own_redis, keys, "r", 1) == 1


def test_a_copy_comes_right_behind_its_note(redis: RedisServer) -> None:
    client: Any = redis.redis
    with client.pubsub() as pubsub:
        pubsub.subscribe("script-notes", "script-copies")
        redis.redis.eval(COPY, 0, "script-notes", "copy a", "script-copies", "the copy")
        messages = pubsub.listen()
        found = [next(messages) for _ in range(4)]
    assert [one["data"] for one in found] == [1, 2, b"copy a", b"the copy"]
