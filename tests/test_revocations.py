from __future__ import annotations

import logging
import math
import re
import threading
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from flask import request

from flask_eventstream import revocations as room
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.places import Place, Places
from flask_eventstream.redis_link import RedisLink
from flask_eventstream.redis_scripts import Keys
from flask_eventstream.revocations import MAX_USERS, NO_FLOOR, RevocationLog, Revocations

from .redis_server import given_up_soon
from .servers import serving, wait_for
from .test_roads import Client, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask
    from werkzeug.test import TestResponse

    from flask_eventstream import EventStream

    from .redis_server import RedisServer

    MakeApp = Callable[..., Flask]
    MakeProcess = Callable[[RedisServer, str], "Process"]

pytestmark = pytest.mark.beside


class Process:
    """What a process has: places, and what it knows of revocations."""

    def __init__(self, url: str, prefix: str) -> None:
        self.link = RedisLink(url, 5, 4)
        self.places = Places()
        self.key = Keys(prefix, 0).revoked
        self.revocations = Revocations(self.places, RevocationLog(self.link, self.key))
        self.revoke = self.revocations.revoke

    def take(self, user: str, issued: float | None = None) -> Place:
        place = self.places.take("192.0.2.1", user, issued)
        self.revocations.follow()
        return place

    def knows(self, user: str) -> bool:
        self.revocations._fresh_until = 0
        self.revocations.refresh()
        return self.revocations.is_revoked(user, 0)


class Clock:
    """The time of day, which goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeProcess]:
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.1)
    with ExitStack() as links:

        def start_process(redis: RedisServer, prefix: str) -> Process:
            process = Process(redis.url, prefix)
            links.enter_context(closing(process.link))
            return process

        yield start_process


# --- In one process


def test_what_was_issued_before_is_revoked_and_what_comes_after_is_not() -> None:
    revocations = Revocations(Places())
    before = time.time()
    assert not revocations.is_revoked("me", before)
    revocations.revoke("me")
    assert revocations.is_revoked("me", before)
    assert not revocations.is_revoked("you", before)
    between = time.time()
    assert not revocations.is_revoked("me", between)
    revocations.revoke("me")
    assert revocations.is_revoked("me", between)
    revocations.refresh()
    revocations.follow()
    assert not revocations._is_followed


def test_what_no_token_outlives_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    revocations = Revocations(Places())
    now = time.time()
    for n in range(20):
        revocations.revoke(str(n))
    monkeypatch.setattr(time, "time", lambda: now + 30 * 24 * 3600)
    revocations.revoke("me")
    assert len(revocations._times) == 21
    monkeypatch.setattr(time, "time", lambda: now + 31 * 24 * 3600)
    revocations.revoke("me")
    revocations.revoke("you")
    assert set(revocations._times) == {"me", "you"}


def test_beyond_a_number_of_users_the_oldest_is_forgotten_and_its_tokens_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "MAX_USERS", 3)
    clock = Clock(monkeypatch)
    revocations = Revocations(Places())
    for user in ("a", "b", "c", "a", "a", "c"):
        revocations.revoke(user)
        clock.now += 1
    assert not revocations.is_revoked("somebody", 0)
    first, second = clock.now, clock.now + 1
    revocations.revoke("d")
    assert len(revocations._times) == 3
    # That of "b" is known no more, and so nobody's is who has one of its time.
    assert revocations.is_revoked("b", 1)
    assert revocations.is_revoked("somebody", 1)
    assert not revocations.is_revoked("somebody", 1.5)
    assert revocations.is_revoked("d", first)
    assert not revocations.is_revoked("d", second)


def test_a_hundred_thousand_users_are_remembered() -> None:
    revocations = Revocations(Places())
    for n in range(MAX_USERS + 10):
        revocations.revoke(str(n))
    assert len(revocations._times) == MAX_USERS


# --- In many


def test_in_redis_no_more_users_are_remembered_than_in_a_process(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_USERS", 3)
    clock = Clock(monkeypatch)
    prefix = redis.prefix()
    one = start(redis, prefix)
    # As often as somebody likes, and it is one that is remembered.
    for user in ("a", "b", "c", *"a" * 20):
        one.revoke(user)
        clock.now += 1
    late = start(redis, prefix)
    assert not late.knows("somebody")
    one.revoke("d")
    assert redis.redis.xlen(one.key) == 3
    assert redis.redis.hlen(one.key + b":users") == 3 + 2
    for process in (one, late, start(redis, prefix)):
        assert process.knows("somebody")
        assert process.revocations.is_revoked("b", 1)
        assert not process.revocations.is_revoked("somebody", 1.5)
        assert process.revocations.is_revoked("c", 2)
        assert not process.revocations.is_revoked("c", 2.5)


def test_a_clock_that_is_behind_takes_nothing_back(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    prefix = redis.prefix()
    one = start(redis, prefix)
    clock.now = 100
    one.revoke("me")
    clock.now = 50
    one.revoke("me")
    late = start(redis, prefix)
    assert late.knows("me")
    assert late.revocations.is_revoked("me", 99)


def test_what_is_too_old_is_forgotten_in_redis_and_is_no_floor(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = redis.prefix()
    one = start(redis, prefix)
    for n in range(20):
        redis.redis.xadd(one.key, {"user": f"old{n}", "at": "5"}, id=f"{n + 1}-0")
    redis.redis.hset(one.key + b":users", "user:old1", "2-0 5")
    one.revoke("me")
    one.revoke("you")
    assert redis.redis.xlen(one.key) == 2
    assert set(redis.redis.hkeys(one.key + b":users")) == {b"user:me", b"user:you"}
    late = start(redis, prefix)
    assert late.knows("me")
    assert not late.knows("somebody")


def test_who_did_not_hear_what_was_forgotten_ends_all_it_may_concern(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_USERS", 3)
    clock = Clock(monkeypatch)
    prefix = redis.prefix()
    one, two, three = (start(redis, prefix) for _ in range(3))
    one.revoke("first")
    for process in (two, three):
        assert process.knows("first")
    old, new, own = (two.places.take("192.0.2.1", *who) for who in (("a", 1), ("b", 9), ("c",)))
    heard = three.places.take("192.0.2.1", "a", 1)
    clock.now = 2
    for n in range(6):
        one.revoke(str(n))
        three.knows("first")
    two.knows("first")
    assert [place.is_finished for place in (old, new, own, heard)] == [True, False, True, False]


def test_what_one_process_revokes_the_others_learn(redis: RedisServer, start: MakeProcess) -> None:
    prefix = redis.prefix()
    one, two = start(redis, prefix), start(redis, prefix)
    one.revoke("me")
    assert two.knows("me")
    assert not two.knows("you")
    two.revoke("you")
    assert one.knows("you")
    for user in ("a\nb\0", "\ud800", "數\u2028"):
        one.revoke(user)
        assert two.knows(user)
    assert not two.knows("\udfff")
    late = start(redis, prefix)
    assert late.knows("me")
    assert late.knows("you")
    assert 29 * 86400 < redis.redis.ttl(one.key) < 31 * 86400
    assert not start(redis, redis.prefix()).knows("me")


def test_it_is_asked_for_once_a_second_at_most(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_POLL_SECONDS", 60)
    prefix = redis.prefix()
    one, two = start(redis, prefix), start(redis, prefix)
    two.revocations.refresh()
    one.revoke("me")
    two.revocations.refresh()
    assert not two.revocations.is_revoked("me", 0)
    assert two.knows("me")


def test_many_revocations_are_read_in_parts(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_READ_AT_ONCE", 3)
    prefix = redis.prefix()
    one, two = start(redis, prefix), start(redis, prefix)
    for n in range(7):
        one.revoke(str(n))
    assert all(two.knows(str(n)) for n in range(7))


def test_others_are_asked_once_a_second_and_before_a_token_opens_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert room._POLL_SECONDS == 1
    log, pauses = RevocationLog(RedisLink("redis://127.0.0.1:1", 5, 1), b"key"), []
    read = iter([[("me", time.time())], []])
    monkeypatch.setattr(log, "behind", lambda last: (next(read), b"", NO_FLOOR))
    revocations = Revocations(Places(), log)
    revocations.refresh()
    assert revocations.is_revoked("me", 0)
    # As long as a user has a place, and no longer.
    is_over = iter([False, False, True])
    monkeypatch.setattr(revocations, "_is_over", lambda: next(is_over))
    monkeypatch.setattr(revocations, "_read", lambda log: pauses.append("read"))
    monkeypatch.setattr(time, "sleep", pauses.append)
    revocations._run(log)
    assert pauses == [1, "read", 1, "read"]


def test_who_is_revoked_elsewhere_ends_and_then_nobody_asks_any_more(
    redis: RedisServer, start: MakeProcess
) -> None:
    prefix = redis.prefix()
    one, two = start(redis, prefix), start(redis, prefix)
    place, other = two.take("me"), two.take("you")
    newer = two.take("me", time.time() + 60)
    one.revoke("me")
    wait_for(lambda: place.is_finished)
    assert (other.is_finished, newer.is_finished) == (False, False)
    assert two.revocations._is_followed
    for each in (place, other, newer):
        each.release()
    wait_for(lambda: not two.revocations._is_followed)


def test_what_is_revoked_while_redis_comes_and_goes_is_made_good(
    own_redis: RedisServer, start: MakeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    one, two = start(own_redis, "x:"), start(own_redis, "x:")
    place = two.take("me")
    own_redis.kill()
    with given_up_soon(one.link, two.link):
        wait_for(lambda: "could not be read" in caplog.text)
        with pytest.raises(BrokerUnavailableError):
            one.revoke("me")
        assert one.revocations.is_revoked("me", 0)
        assert not place.is_finished
        before = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="no answer"):
            one.revocations.refresh()
        assert one.revocations._away_until >= before + room._POLL_SECONDS
        one.revocations._away_until = math.inf  # however long the next line takes
        with pytest.raises(BrokerUnavailableError, match="a moment ago"):
            one.revocations.refresh()
    own_redis.start()
    one.revoke("me")
    wait_for(lambda: place.is_finished)


def test_what_cannot_be_understood_is_logged_and_left_out(
    redis: RedisServer, start: MakeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(redis, redis.prefix())
    redis.redis.xadd(process.key, {"other": "x"})
    place = process.take("me")
    wait_for(lambda: "left out" in caplog.text)
    start(redis, process.key.decode().removesuffix("0:revoked")).revoke("me")
    wait_for(lambda: place.is_finished)


def test_whatever_fails_is_logged_and_tried_again(
    redis: RedisServer,
    start: MakeProcess,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = start(redis, redis.prefix())
    with monkeypatch.context() as patch:
        patch.setattr(RevocationLog, "behind", None)
        place = process.take("me")
        wait_for(lambda: "tried again" in caplog.text)
    start(redis, process.key.decode().removesuffix("0:revoked")).revoke("me")
    wait_for(lambda: place.is_finished)


def test_for_want_of_a_thread_the_next_one_tries_again(
    redis: RedisServer, start: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    process = start(redis, redis.prefix())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            process.take("me")
    place = process.take("me")
    assert process.revocations._is_followed
    process.revoke("me")
    assert place.is_finished


def test_a_forked_child_knows_what_its_parent_knew_and_follows_anew(
    redis: RedisServer, start: MakeProcess
) -> None:
    process = start(redis, redis.prefix())
    process.revoke("me")
    place = process.take("you")
    process.revocations._mutex.acquire()  # held by a thread that the child does not have
    process.revocations._start()  # what os.register_at_fork() calls
    assert process.revocations.is_revoked("me", 0)
    assert not process.revocations._is_followed
    place.release()


# --- In an app


@pytest.fixture(params=[True, False], ids=["hub", "iterator"])
def make_site(request: pytest.FixtureRequest) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**config: Any) -> Site:
        site = Site({"EVENTSTREAM_HIJACK": request.param, "SECRET_KEY": "secret", **config})
        site.eventstream.identify(user)
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.close()


def user() -> str | None:
    return request.headers.get("X-User")


def revoke(site: Site) -> None:
    with site.app.app_context():
        site.eventstream.revoke("me")


def token(site: Site) -> str:
    with site.app.app_context():
        return site.eventstream.token("sse", user="me")


def test_revoking_ends_the_streams_of_a_user_and_of_nobody_else(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    old = f"/stream?token={token(site)}"
    mine = [site.connect(**{"X-User": "me"}), site.connect(old), site.connect(old)]
    others = [site.connect(**{"X-User": "you"}), site.connect()]
    site.publish("x")
    for client in mine:
        client.read_event(b"x")
    revoke(site)
    for client in mine:
        client.read_all()
    wait_for(lambda: site.count() == 2)
    site.publish("y")
    for client in others:
        client.read_event(b"y")
    refused = site.connect(old)
    assert refused.response.status == 401
    assert b"This token was revoked." in refused.response.read()
    # Whether it may read is decided anew, and a new token is one.
    for client in (site.connect(**{"X-User": "me"}), site.connect(f"/stream?token={token(site)}")):
        assert client.response.status == 200
        site.publish("z")
        client.read_event(b"z")


def test_a_token_that_is_revoked_while_a_place_is_taken_opens_nothing(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    wire = token(site)
    places = site.app.extensions["eventstream"].places
    take = places.take

    def revoke_and_take(*arguments: Any) -> Place:
        revoke(site)
        place: Place = take(*arguments)
        return place

    monkeypatch.setattr(places, "take", revoke_and_take)
    assert site.connect(f"/stream?token={wire}").response.status == 401
    assert (places.taken, site.count()) == (0, 0)


def test_who_connects_while_his_rights_are_revoked_does_not_stay(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    app = make_app()
    app.secret_key = "secret"
    with app.app_context():
        wire = eventstream.token(user="me")
    answers: list[TestResponse] = []
    statuses: list[int] = []

    def connect() -> None:
        while 401 not in statuses:
            answers.append(app.test_client().get(f"/stream?token={wire}", buffered=False))
            statuses.append(answers[-1].status_code)

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(statuses) > 50)
    with app.app_context():
        eventstream.revoke("me")
    for thread in threads:
        thread.join()
    for answer in answers:
        assert list(answer.response)
    assert set(statuses) == {200, 401}
    assert app.extensions["eventstream"].places.taken == 0


def test_another_process_ends_streams_and_refuses_tokens_soon(
    make_site: Callable[..., Site], redis: RedisServer
) -> None:
    keys = {"EVENTSTREAM_BROKER_URL": redis.url, "EVENTSTREAM_KEY_PREFIX": redis.prefix()}
    one, two = make_site(**keys), make_site(**keys)
    wire = token(one)
    mine = [two.connect(**{"X-User": "me"}), two.connect(f"/stream?token={wire}")]
    other = two.connect(**{"X-User": "you"})
    revoke(one)
    for client in mine:
        client.read_all()
    for site in (one, two):
        assert site.connect(f"/stream?token={wire}").response.status == 401
    assert two.connect(f"/stream?token={token(one)}").response.status == 200
    one.publish("x")
    other.read_event(b"x")


def test_without_redis_at_first_use_a_client_with_a_user_is_sent_away_for_a_while(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    app = make_app(BROKER_URL="redis://127.0.0.1:1")
    app.secret_key = "secret"
    eventstream.identify(user)
    app.add_url_rule(
        "/own",
        view_func=lambda: eventstream.subscribe(*eventstream.current_token().channels),
        methods=["GET", "POST"],
    )
    with app.app_context():
        wire = eventstream.token(user="me")
    client = app.test_client()
    answers = [
        client.get(f"/stream?token={wire}"),
        client.get(f"/own?token={wire}"),
        client.get("/stream", headers={"X-User": "me"}),
    ]
    for answer in answers:
        assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
        assert re.fullmatch(r":\nretry: \d+\n", answer.text)
    answer = client.post(f"/own?token={wire}")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert app.extensions["eventstream"].places.taken == 0
    app.extensions["eventstream"].broker.close()


# --- On real servers


def test_all_workers_end_the_streams_of_a_user_soon(redis: RedisServer) -> None:
    environ = {"REDIS_URL": redis.url, "PREFIX": redis.prefix()}
    app = "tests.access_app:create_app()"
    with serving(app, "gevent", "--workers=2", environ=environ) as server, ExitStack() as open_:

        def ask(path: str, method: str = "GET", **headers: str) -> Client:
            client = Client(server.port, path, headers, method)
            return open_.enter_context(closing(client))

        wire = ask("/token").response.read().decode()
        workers: dict[str, list[Client]] = {}

        def has_both() -> bool:
            for client in (ask("/stream", **{"X-User": "me"}), ask(f"/stream?token={wire}")):
                workers.setdefault(client.response.headers["X-Pid"], []).append(client)
            return len(workers) == 2 and all(len(clients) > 1 for clients in workers.values())

        wait_for(has_both)
        assert ask("/revoke", "POST").response.status == 200
        for clients in workers.values():
            for client in clients:
                client.read_all()
        asked = [ask(f"/stream?token={wire}").response for _ in range(6)]
        assert {answer.status for answer in asked} == {401}
        assert ask("/stream", **{"X-User": "me"}).response.status == 200


def test_behind_a_proxy_the_limit_is_for_the_address_of_the_client() -> None:
    app = "tests.access_app:create_app()"
    with serving(app, "gthread", "--threads=8") as server, ExitStack() as open_:

        def status_from(address: str) -> int:
            client = Client(server.port, "/stream", {"X-Forwarded-For": address}, "GET")
            return open_.enter_context(closing(client)).response.status

        some = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"]
        assert [status_from(address) for address in some] == [200, 200, 429, 200]
        # Who puts one in front of it gains nothing: the proxy's own word is the last one.
        assert status_from("192.0.2.9, 2001:db8::1") == 429
