from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from flask_eventstream.errors import BrokerUnavailableError, ConfigurationError
from flask_eventstream.redis_link import LOST, MintedIdError, RedisLink, Repeats
from flask_eventstream.redis_scripts import Script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .redis_server import RedisServer

ONE = Script("return ARGV[1]")


@pytest.fixture
def link(redis: RedisServer) -> Iterator[RedisLink]:
    one = RedisLink(redis.url, 1, 2)
    yield one
    one.close()


def test_a_script_is_called_by_its_hash_and_sent_once(link: RedisLink, redis: RedisServer) -> None:
    redis.redis.script_flush()
    assert link.call(ONE, (), lambda _: ("x",)) == b"x"
    assert redis.redis.script_exists(ONE.sha) == [True]
    assert link.call(ONE, (), lambda is_repeated: (str(is_repeated),)) == b"False"


def test_an_attempt_that_fails_is_repeated_and_says_so(link: RedisLink) -> None:
    attempts: list[bool] = []

    def arguments(is_repeated: bool) -> tuple[str]:
        attempts.append(is_repeated)
        if len(attempts) < 4:
            raise ConnectionResetError
        return ("x",)

    assert link.call(ONE, (), arguments) == b"x"
    assert attempts == [False, True, True, True]


def test_an_error_of_a_script_is_a_refusal(link: RedisLink) -> None:
    with pytest.raises(BrokerUnavailableError, match="refused: BROKEN") as caught:
        link.call(Script("return redis.error_reply('BROKEN by design')"), (), lambda _: ())
    assert caught.value.is_refusal
    with pytest.raises(MintedIdError) as minted:
        link.call(Script("return redis.error_reply('MINTED a-1')"), (), lambda _: ())
    assert minted.value.id == "a-1"


def test_more_callers_than_connections_wait_for_their_turn(link: RedisLink) -> None:
    results: list[bytes] = []

    def call(n: int) -> None:
        results.append(link.call(ONE, (), lambda _: (n,)))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(b"%d" % n for n in range(20))


def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = RedisLink(f"redis://127.0.0.1:{silent.getsockname()[1]}", 0.4, 2)
        begin = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.4 s"):
            link.pipeline([("PING",)])
        assert time.monotonic() - begin < 0.6
        link.close()


def test_a_ping_is_one_attempt_and_tells_how_long_it_took(link: RedisLink) -> None:
    assert 0 < link.ping() < 1
    away = RedisLink("redis://127.0.0.1:1", 2, 1)
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailableError):
        away.ping()
    assert time.monotonic() - begin < 0.5


def test_the_server_tells_its_version_and_what_it_does_when_it_is_full(link: RedisLink) -> None:
    info = link.info()
    assert info["redis_version"]
    assert (info["maxmemory"], info["maxmemory_policy"]) == (0, "noeviction")


def test_a_call_that_failed_is_known_when_the_same_thread_makes_it_again() -> None:
    repeats, other = Repeats(60), []
    nonce, is_doubtful = repeats.begin("a")
    assert not is_doubtful
    assert repeats.begin("a") == (nonce, True)
    thread = threading.Thread(target=lambda: other.append(repeats.begin("a")))
    thread.start()
    thread.join()
    assert other[0][1] is False
    repeats.end()
    assert repeats.begin("a")[1] is False
    assert repeats.begin("b")[1] is False
    late = Repeats(0)
    late.begin("a")
    assert late.begin("a")[1] is False


def test_a_listener_hears_what_it_is_subscribed_to(link: RedisLink, redis: RedisServer) -> None:
    listener = link.listen()
    listener.connect()
    listener.send("SUBSCRIBE", [b"news"])
    assert listener.read() == [b"subscribe", b"news", 1]
    assert not listener.has_message(0)
    redis.redis.publish("news", "x")
    assert listener.has_message(5)
    assert listener.read() == [b"message", b"news", b"x"]
    redis.redis.client_kill_filter(_type="pubsub", skipme=True)
    with pytest.raises(LOST):
        listener.has_message(5)
    listener.close()


@pytest.mark.parametrize("url", ["http://x", "redis://x/0?socket_timeout=soon", "redis://x:port"])
def test_a_url_that_cannot_be_used_is_an_error_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used") as caught:
        RedisLink(url.replace("//", "//:secret@"), 1, 1)
    assert "secret" not in str(caught.value)


def test_the_database_is_known_without_asking() -> None:
    urls = ["redis://x", "redis://x/3", "unix:///x?db=4", "redis://x?db=5"]
    assert [RedisLink(url, 1, 1).database for url in urls] == [0, 3, 4, 5]


def test_a_script_is_called_many_times_at_once_also_where_it_is_new(
    link: RedisLink, redis: RedisServer
) -> None:
    script = Script("return {KEYS[1], ARGV[1] + 1} -- for this test alone")
    calls = [([b"key"], (n,)) for n in range(3)]
    assert link.call_many(script, calls) == [[b"key", n + 1] for n in range(3)]
    assert link.call_many(script, []) == []
    failing = Script("return redis.call('NOTHING') -- for this test alone")
    for _ in range(2):
        with pytest.raises(BrokerUnavailableError, match="refused"):
            link.call_many(failing, [([], ())])


def test_a_connection_that_is_closed_while_it_waits_is_a_lost_one(redis: RedisServer) -> None:
    link = RedisLink(redis.url, 2, 1)
    link.pipeline([("PING",)])
    waiting = threading.Timer(0.05, link.close)
    waiting.start()
    with suppress(BrokerUnavailableError):
        link.pipeline([("BLPOP", "nothing", 0.2)], begin=-math.inf)
    waiting.join()

    def closed(_: bool) -> None:
        raise ValueError("I/O operation on closed file")

    with pytest.raises(BrokerUnavailableError, match="closed file"):
        link._attempt(closed, -math.inf)
    link.close()
