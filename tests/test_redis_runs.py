from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.event import with_id
from flask_eventstream.local_broker import LOG_PREFIX
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.redis_runs import RedisRegistry
from flask_eventstream.run_registry import CANCELLED, LOST, NoRoomError, Standing, Write
from flask_eventstream.runs import Runs

from .redis_server import given_up_soon
from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .redis_server import RedisServer

LOST_EVENT = b"event: lost\ndata: {}\n\n"
LEASE = 3.0
"""One that can be waited for, in seconds, and that a machine that stands still does not break."""


class Process:
    """What a process has: a broker, a registry, and a run."""

    def __init__(self, url: str, prefix: str, lease: float, **options: Any) -> None:
        self.broker = RedisBroker(url, key_prefix=prefix, **options)
        self.registry = self.broker.registry(600, lease, 100, 3)
        self.stopped: list[str] = []
        self.owner = ""

    @property
    def token(self) -> str:
        """The token of the lease that the process has."""
        return self.registry._tokens[0]

    def begin(self, run: str, key: str = "key") -> bool:
        stop = partial(self.stopped.append, run)
        return self.registry.begin(key, run, stop, LOST_EVENT, self.owner).run == run

    def write(self, run: str, n: int, state: str = "active") -> bool:
        wire = f"data: {n}\nid: {run}.{n}\n\n".encode()
        [goes_on] = self.registry.write([Write("key", run, n, wire, state)])
        return goes_on

    def find(self) -> Standing:
        found = self.registry.find("key")
        assert found
        return found

    def log(self, run: str) -> bytes:
        subscription = self.broker.subscribe_log(run, 0)
        subscription.close()
        return subscription.start

    def lose_lease(self, redis: RedisServer) -> None:
        """Have Redis forget the lease, as if the process had stood still for too long."""
        redis.redis.delete(self.lease)

    @property
    def lease(self) -> bytes:
        """The name of its lease."""
        return self.broker._keys.producer(self.token)

    def die(self) -> None:
        """Renew nothing any more."""
        self.registry._own.clear()


@pytest.fixture
def start(redis: RedisServer) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []
    prefix = redis.prefix()

    def start_process(lease: float = 15, **options: Any) -> Process:
        made.append(Process(redis.url, prefix, lease, **options))
        return made[-1]

    yield start_process
    for process in made:
        process.die()
        process.broker.close()


def test_every_process_sees_the_same_run(start: Callable[..., Process]) -> None:
    one, two = start(), start()
    assert one.begin("run")
    assert not two.begin("other")
    assert one.write("run", 1)
    assert two.find() == one.find() == Standing("run", "active", 1, one.token)
    assert two.log("run") == b"data: 1\nid: run.1\n\n"
    assert not one.write("run", 2, "end")
    assert two.begin("other")


def test_only_the_process_that_began_a_run_can_write_to_it(start: Callable[..., Process]) -> None:
    one, two = start(), start()
    one.begin("run")
    assert not two.write("run", 1)
    assert one.write("run", 1)


def test_any_process_can_cancel_and_the_producer_hears_of_it(
    start: Callable[..., Process],
) -> None:
    one, two = start(lease=LEASE), start()
    one.begin("run")
    one.write("run", 1)
    assert two.registry.end("key", "run", CANCELLED, b"event: cancelled\ndata: {}\n\n")
    # Within a fifth of the lease, without that it has written anything.
    wait_for(lambda: one.stopped == ["run"])
    assert not one.write("run", 2)
    assert one.log("run").endswith(b"event: cancelled\ndata: {}\nid: run.2\n\n")


def test_a_process_without_its_lease_writes_nothing_more(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one, two = start(), start()
    one.begin("run")
    one.write("run", 1)
    one.lose_lease(redis)
    assert two.find().is_lost
    # Nobody has ended it yet, and all the same:
    assert not one.write("run", 2)
    assert two.registry.end("key", "run", LOST, LOST_EVENT)
    assert not two.registry.end("key", "run", LOST, LOST_EVENT)
    assert two.log("run") == b"data: 1\nid: run.1\n\n" + with_id(LOST_EVENT, b"run.2")
    assert two.find() == Standing("run", "lost", 2, two.find().producer)


def test_a_new_lease_is_not_one_for_the_old_runs(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start()
    one.begin("old")
    one.lose_lease(redis)
    assert one.begin("new", "another key")
    [goes_on] = one.registry.write([Write("another key", "new", 1, b"data: 1\nid: new.1\n\n")])
    assert goes_on
    assert not one.write("old", 1)
    assert one.find().is_lost


def test_who_finds_its_lease_gone_stops_its_runs(
    start: Callable[..., Process], redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = start(lease=LEASE)
    one.begin("run")
    one.lose_lease(redis)
    wait_for(lambda: one.stopped == ["run"])
    assert "its 1 runs are lost" in caplog.text


def end_of(redis: RedisServer, lease: bytes) -> float:
    """Return when a lease ends, by the time of Redis, in milliseconds."""
    left = redis.redis.pttl(lease)
    assert left > 0, "the lease has ended"
    seconds, microseconds = redis.redis.time()
    return float(seconds) * 1000 + microseconds / 1000 + left


def is_renewed(redis: RedisServer, lease: bytes, begin: float) -> bool:
    """Tell whether a lease ends later by its own length."""
    return end_of(redis, lease) > begin + LEASE * 1000


def test_a_lease_is_renewed_as_long_as_there_are_runs(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start(lease=LEASE)
    one.begin("run")
    lease = one.lease
    first = end_of(redis, lease)
    # Renewed more than once, so that it is longer than a lease.
    wait_for(lambda: is_renewed(redis, lease, first))
    assert one.write("run", 1, "end") is False
    wait_for(lambda: not redis.redis.exists(lease))
    assert one.stopped == []


def test_readers_of_a_run_whose_producer_dies_get_lost_when_the_lease_ends(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one, two = start(lease=LEASE), start(lease=LEASE)
    one.begin("run")
    one.write("run", 1)
    reader = two.broker.subscribe_log("run", 0)
    two.registry.watch("key", two.find(), LOST_EVENT)
    one.die()
    # Its end is looked for so often that it is found before what was promised is over.
    assert two.registry._lease_ms / 1000 + two.registry._pause < LEASE
    assert redis.redis.exists(one.lease)
    assert reader.take(DEADLINE) == with_id(LOST_EVENT, b"run.2")
    assert not redis.redis.exists(one.lease)
    assert reader.take(DEADLINE) is None
    wait_for(lambda: two.registry._watched == {})


def test_who_reads_a_run_that_has_ended_elsewhere_gets_all_of_it_and_its_end(
    start: Callable[..., Process],
) -> None:
    one, two = start(lease=LEASE), start(lease=LEASE)
    one.begin("run")
    for n, state in ((1, "active"), (2, "end")):
        one.write("run", n, state)
    # Whether it is known that it has ended, or not yet.
    for is_over in (True, False):
        reader = two.broker.subscribe_log("run", 2, is_over=is_over)
        assert reader.start == b"".join(b"data: %d\nid: run.%d\n\n" % (n, n) for n in (1, 2))
        assert reader.take(DEADLINE) is None
        assert reader.is_at_end


def test_a_run_without_readers_is_not_watched(start: Callable[..., Process]) -> None:
    one, two = start(lease=LEASE), start(lease=LEASE)
    one.begin("run")
    reader = two.broker.subscribe_log("run", 0)
    two.registry.watch("key", two.find(), LOST_EVENT)
    reader.close()
    wait_for(lambda: not two.registry._watched)
    one.die()
    wait_for(lambda: two.find().is_lost)


def test_a_process_that_ends_gives_its_runs_up(start: Callable[..., Process]) -> None:
    one, two = start(), start()
    one.registry.close()
    one.begin("run")
    one.registry.close()
    assert two.find().is_lost


def test_a_run_that_nobody_heard_of_again_does_not_stay(
    start: Callable[..., Process], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = start()
    # As if the answer had been lost.
    monkeypatch.setattr(one.registry, "_start_keeper", lambda: None)
    one.begin("run")
    hash_of_it = one.broker._keys.run("key")
    assert 0 < redis.redis.pttl(hash_of_it) <= 15_000
    # The same call again is the same run.
    assert one.begin("run")
    one.write("run", 1)
    assert redis.redis.ttl(hash_of_it) > 500


def test_a_run_lives_as_long_as_its_process_renews_it(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start(lease=LEASE)
    one.begin("run")
    hash_of_it = one.broker._keys.run("key")
    wait_for(lambda: redis.redis.ttl(hash_of_it) > 500)


def test_a_server_that_was_flushed_knows_no_run(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = Process(own_redis.url, "x:", LEASE)
    one.begin("run")
    one.write("run", 1)
    # Scripts too, as a server that was restarted.
    own_redis.redis.flushall()
    own_redis.redis.script_flush()
    assert not one.write("run", 2)
    assert one.registry.find("key") is None
    assert one.begin("new")
    own_redis.redis.flushall()
    wait_for(lambda: one.stopped == ["new"])
    one.broker.close()


def test_while_redis_is_away_everything_says_so(own_redis: RedisServer) -> None:
    one = Process(own_redis.url, "x:", LEASE)
    one.begin("run")
    reader = one.broker.subscribe_log("run", 0)
    one.registry.watch("key", one.find(), LOST_EVENT)
    own_redis.kill()
    with given_up_soon(one.broker._link):
        for act in (lambda: one.write("run", 1), lambda: one.begin("run"), one.find):
            with pytest.raises(BrokerUnavailableError):
                act()
        # The one that looks after leases goes on all the same.
        rounds = one.registry._rounds
        wait_for(lambda: one.registry._rounds > rounds + 2)
        one.registry.close()
    own_redis.start()
    wait_for(lambda: one.stopped == ["run"])
    reader.close()
    one.broker.close()


def test_a_forked_child_has_a_lease_of_its_own(start: Callable[..., Process]) -> None:
    one = start()
    assert isinstance(one.registry, RedisRegistry)
    one.begin("run")
    token = one.token
    one.registry._start()  # what os.register_at_fork() calls
    assert one.token != token
    assert not one.write("run", 1)


def test_a_log_that_a_crash_has_torn_ends_its_run(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one, two = start(), start()
    one.begin("run")
    one.write("run", 1)
    one.write("run", 2)
    # As a server that has come back without the newest event.
    keys = one.broker._keys
    log = keys.channel(LOG_PREFIX + "run")
    entries: Any = redis.redis.xrevrange(log, count=1)
    redis.redis.xdel(log, entries[0][0])
    redis.redis.hset(keys.run("key"), "last", 1)
    assert not one.write("run", 3)
    assert one.stopped == ["run"]
    assert two.log("run") == b"data: 1\nid: run.1\n\n" + with_id(LOST_EVENT, b"run.2")


def test_who_looks_for_a_lost_run_ends_it(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one, two = start(), start()
    one.begin("run")
    runs = Runs(two.registry, 1)
    found = runs.find("key", LOST_EVENT)
    assert found
    assert found.is_active
    one.lose_lease(redis)
    found = runs.find("key", LOST_EVENT)
    assert found
    assert (found.state, found.last) == (LOST, 1)
    assert two.log("run") == with_id(LOST_EVENT, b"run.1")


def test_runs_that_begin_at_the_same_moment_have_one_lease(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start()
    leases = one.broker._keys.producer("*")
    for round in range(20):
        one.lose_lease(redis)
        barrier = threading.Barrier(8)

        def begin(run: str, barrier: threading.Barrier) -> None:
            barrier.wait(DEADLINE)
            assert one.begin(run, run)

        threads = [threading.Thread(target=begin, args=(f"{round}-{n}", barrier)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert redis.redis.keys(leases) == [one.lease]


def test_a_call_that_knows_of_no_newer_lease_takes_the_same_one(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start()
    before = one.registry._tokens
    assert one.begin("run")
    after = one.registry._tokens
    assert after[0] == before[1]
    # As a call that was on its way since before.
    one.registry._tokens = before
    assert one.begin("other", "other key")
    assert one.registry._tokens[0] == after[0]
    assert one.write("run", 1)


def test_all_leases_that_runs_have_are_renewed(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start(lease=LEASE)
    one.begin("old")
    first = one.lease
    one.registry._tokens = "gone", "next"
    one.begin("new", "another key")
    leases = first, one.lease
    begin = [end_of(redis, lease) for lease in leases]
    for n in (0, 1):
        wait_for(partial(is_renewed, redis, leases[n], begin[n]))
    assert one.stopped == []


def test_an_owner_has_so_many_runs_in_all_processes(start: Callable[..., Process]) -> None:
    processes = [start(), start()]
    for one in processes:
        one.owner = "me"
    for n in range(3):
        assert processes[n % 2].begin(f"run{n}", f"key{n}")
    for one in processes:
        with pytest.raises(NoRoomError):
            one.begin("more", "more")
    assert processes[1].registry.end("key0", "run0", CANCELLED, LOST_EVENT)
    with pytest.raises(NoRoomError):
        processes[1].begin("more", "more")
    processes[0].registry.write([Write("key0", "run0", 1, b"data: 1\nid: run0.1\n\n", "end")])
    assert processes[1].begin("more", "more")


def test_the_runs_of_a_process_that_died_count_no_more(start: Callable[..., Process]) -> None:
    one, two = start(lease=LEASE), start(lease=LEASE)
    one.owner = two.owner = "me"
    for n in range(3):
        one.begin(f"run{n}", f"key{n}")
    one.die()

    def has_begun() -> bool:
        with suppress(NoRoomError):
            return two.begin("new", "new key")
        return False

    wait_for(has_begun)


def test_a_run_counts_for_longer_than_a_lease_also_once_it_was_cancelled(
    start: Callable[..., Process],
) -> None:
    one, two = start(lease=LEASE), start()
    one.owner = two.owner = "me"
    for n in range(3):
        one.begin(f"run{n}", f"key{n}")
    assert two.registry.end("key0", "run0", CANCELLED, LOST_EVENT)
    rounds = one.registry._rounds
    wait_for(lambda: one.registry._rounds > rounds + 15)
    with pytest.raises(NoRoomError):
        two.begin("more", "more")


def test_what_is_known_of_ended_runs_goes_with_them(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start(max_idle_bytes=10_000)
    keys = one.broker._keys
    for n in range(3):
        one.begin(f"run{n}")
        one.write(f"run{n}", 1, "end")
    assert redis.redis.zcard(keys.ended) == 3
    assert 0 < redis.redis.ttl(keys.ended) <= 600
    kept = int(redis.redis.hget(keys.state, "ended") or 0)
    assert 3 * 1024 < kept < 10_000
    # As after the time that ended runs are kept.
    command: Any = redis.redis.execute_command
    for old in redis.redis.zrange(keys.ended, 0, 1):
        command("ZADD", keys.ended, 1, old)
    one.begin("run3")
    one.write("run3", 1, "end")
    assert redis.redis.zcard(keys.ended) == 2
    assert int(redis.redis.hget(keys.state, "ended") or 0) == kept // 3 * 2
    # As after a while without runs.
    redis.redis.delete(keys.ended)
    one.begin("run4")
    one.write("run4", 1, "end")
    assert int(redis.redis.hget(keys.state, "ended") or 0) == kept // 3
    assert one.find().run == "run4"


def test_nothing_tells_whose_runs_there_are(
    start: Callable[..., Process], redis: RedisServer
) -> None:
    one = start()
    # No hexadecimal digits, of which the names of keys are full.
    one.owner = "zoe@example.org"
    one.begin("run")
    assert not any(b"zoe" in key for key in redis.redis.keys("*"))
    one.write("run", 1, "end")
    assert not redis.redis.exists(one.broker._keys.owner(one.owner))


def test_a_run_whose_begin_was_not_answered_is_ended(
    start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start(lease=LEASE), start()
    one.owner = "me"
    call = one.registry._link.call

    def lose_answer(*arguments: Any) -> None:
        monkeypatch.undo()
        call(*arguments)
        raise BrokerUnavailableError("redis://test", "no answer")

    monkeypatch.setattr(one.registry._link, "call", lose_answer)
    with pytest.raises(BrokerUnavailableError):
        one.begin("run")
    wait_for(lambda: two.find().state == LOST)
    for n in range(3):
        assert one.begin(f"run{n}", f"key{n}")
    wait_for(lambda: not one.registry._doubtful)


def test_whatever_happens_leases_are_looked_after(
    start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = start(lease=LEASE)

    def fail() -> None:
        raise LookupError("a fault")

    monkeypatch.setattr(one.registry, "_end_lost", fail)
    one.begin("run")
    rounds = one.registry._rounds
    wait_for(lambda: one.registry._rounds > rounds + 2)
    assert "a fault" in caplog.text
    assert one.write("run", 1)
