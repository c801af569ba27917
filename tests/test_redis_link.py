from __future__ import annotations

import math
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import redis_link
from flask_eventstream.errors import BrokerUnavailableError, ConfigurationError
from flask_eventstream.redis_link import LOST, MintedIdError, RedisLink, Repeats
from flask_eventstream.redis_scripts import Script

from .redis_server import PATIENT
from .servers import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .redis_server import RedisServer

ONE = Script("return ARGV[1]")


@pytest.fixture
def link(redis: RedisServer) -> Iterator[RedisLink]:
    one = RedisLink(redis.url, PATIENT, 2)
    yield one
    one.close()


class Clock:
    """A clock that goes on only while somebody sleeps, or when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(redis_link, "time", clock)
    return clock


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


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = RedisLink(f"redis://127.0.0.1:{silent.getsockname()[1]}", 0.4, 2)
        with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.4 s"):
            link.pipeline([("PING",)])
        link.close()


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.0])
def test_attempts_that_fail_are_repeated_for_half_the_time_and_end_within_it(
    clock: Clock, seconds: float
) -> None:
    link = RedisLink("redis://127.0.0.1:1", 4, 1)
    # Each may take that long to connect, and once more for the answer.
    options = link._pool.connection_kwargs
    assert options["socket_timeout"] == options["socket_connect_timeout"] == link.patience == 1
    begun: list[float] = []

    def fail(is_repeated: bool) -> None:
        assert is_repeated is bool(begun)
        begun.append(clock.now - 100)
        clock.now += seconds
        raise ConnectionResetError("lost")

    with pytest.raises(BrokerUnavailableError, match="no answer within 4 s: lost"):
        link._attempt(fail, None)
    assert clock.now - 100 <= 4
    assert begun[-1] <= 2
    # The pauses are 0.2 s at most.
    assert 2 - (begun[-1] + seconds) < 0.2


def test_a_ping_is_one_attempt_and_tells_how_long_it_took(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = RedisLink("redis://127.0.0.1:1", 4, 1)
    attempts: list[float] = []

    def answer(commands: Any, begin: float) -> None:
        # An attempt is not repeated that begins so late.
        attempts.append(begin)
        clock.now += 0.5

    monkeypatch.setattr(link, "pipeline", answer)
    assert (link.ping(), attempts) == (0.5, [-math.inf])
    with pytest.raises(BrokerUnavailableError):
        RedisLink("redis://127.0.0.1:1", 4, 1).ping()
    assert clock.now == 100.5


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
    assert listener.has_message(DEADLINE)
    assert listener.read() == [b"message", b"news", b"x"]
    redis.redis.client_kill_filter(_type="pubsub", skipme=True)
    with pytest.raises(LOST):
        listener.has_message(DEADLINE)
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
    link = RedisLink(redis.url, PATIENT, 1)
    link.pipeline([("PING",)])
    closing = threading.Timer(0.05, link.close)
    closing.start()
    with suppress(BrokerUnavailableError):
        link.pipeline([("BLPOP", "nothing", 0.2)], begin=-math.inf)
    closing.join()

    def closed(_: bool) -> None:
        raise ValueError("I/O operation on closed file")

    with pytest.raises(BrokerUnavailableError, match="closed file"):
        link._attempt(closed, -math.inf)
    link.close()
