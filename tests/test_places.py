from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from typing import Any

import pytest

from flask_eventstream.places import NoPlaceError, Place, Places, network_of

THREADS = 32
NO_ADDRESSES = (
    "unknown", "unix:", "_hidden", "_hidden:1", "x", "x:1", "999.1.1.1", "1.2.3.4.5:80", "::1::2",
    "203.0.113.9, 192.0.2.1", "203.000.113.009", "１.２.３.４", "[", "[]:80", ":", ":80", '"',
    "[2001:db8::1", '"[2001:db8::1], 192.0.2.1', '"203.0.113.9:, 192.0.2.1', "[2001:db8::1]x:80",
    "203.0.113.9:x", "%eth0", "203.0.113.9%eth0", "2001:db8::/64", "\0", "a" * 10_000,
)  # fmt: skip


class Body:
    def __init__(self) -> None:
        self.finished = 0

    def finish(self) -> None:
        self.finished += 1


def refusal(places: Places, *arguments: Any) -> str:
    with pytest.raises(NoPlaceError) as caught:
        places.take(*arguments)
    return caught.value.whose


def test_there_are_as_many_places_as_the_limits_say() -> None:
    places = Places(max_all=5, max_per_address=3, max_per_user=2)
    kept = [places.take("192.0.2.1", "me"), places.take("192.0.2.1", "me")]
    assert refusal(places, "192.0.2.2", "me") == "user"
    kept += [places.take("192.0.2.1"), places.take("192.0.2.2")]
    assert refusal(places, "192.0.2.1") == refusal(places, "192.0.2.1", "you") == "address"
    kept += [places.take("192.0.2.2", "you")]
    assert refusal(places, "192.0.2.3") == "process"
    assert places.taken == 5


def test_without_limits_there_is_a_place_for_all() -> None:
    places = Places()
    kept = [places.take("192.0.2.1", "me") for _ in range(1000)]
    assert places.taken == len(kept)


def test_who_releases_a_place_more_than_once_gives_back_one() -> None:
    places = Places(max_all=2, max_per_address=2, max_per_user=2)
    one, _two = places.take("192.0.2.1", "me"), places.take("192.0.2.1", "me")
    for _ in range(3):
        one.release()
    del one
    assert places.taken == 1
    _three = places.take("192.0.2.1", "me")
    assert refusal(places, "192.0.2.1", "me") == "process"


def test_a_place_that_many_threads_release_is_given_back_once() -> None:
    places = Places()
    kept = places.take("192.0.2.1")
    for _ in range(50):
        place = places.take("192.0.2.1")
        together(place.release)
        assert places.taken == 1
    kept.release()


def test_a_place_that_nobody_has_any_more_is_given_back() -> None:
    places = Places(max_all=1)
    place: Any = places.take("192.0.2.1", "me")
    cycle = [place]
    cycle.append(cycle)
    del place, cycle
    gc.collect()
    assert places.taken == 0
    assert not places.has_users


def test_the_garbage_collector_may_release_one_while_the_books_are_held() -> None:
    places = Places(max_all=1)
    place: Any = places.take("192.0.2.1")
    with places._mutex:  # as if the collector had run in the middle of take()
        del place
    places.take("192.0.2.1").release()


def test_many_threads_that_come_at_once_get_just_as_many_as_there_are() -> None:
    places = Places(max_all=40, max_per_address=20, max_per_user=10)
    taken: list[Place] = []
    refused: list[str] = []

    def try_one(address: str, user: str | None) -> None:
        try:
            taken.append(places.take(address, user))
        except NoPlaceError as error:
            refused.append(error.whose)

    def come() -> None:
        for n in range(20):
            try_one(f"192.0.2.{n % 4}", ("me", "you", None)[n % 3])

    together(come)
    assert len(taken) == places.taken == 40
    assert len(refused) == THREADS * 20 - 40
    assert sum(place.user == "me" for place in taken) <= 10

    def leave() -> None:
        for place in taken:
            place.release()

    together(leave)
    assert places.taken == 0


def test_threads_that_come_and_go_never_exceed_the_limit() -> None:
    places = Places(max_all=3)
    present: list[None] = []
    most: list[int] = []

    def come_and_go() -> None:
        for _ in range(200):
            try:
                place = places.take("192.0.2.1", "me")
            except NoPlaceError:
                continue
            present.append(None)
            most.append(len(present))
            present.pop()
            place.release()

    together(come_and_go)
    assert 0 < max(most) <= 3
    assert places.taken == 0


def together(act: Any) -> None:
    gate = threading.Barrier(THREADS)

    def run() -> None:
        gate.wait()
        act()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::1", "::2", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "", True),
        ("unix:", "192.0.2.1", False),
        # As some proxies write it, and clients that are believed.
        ("203.0.113.9:50000", "203.0.113.9:50001", True),
        ("203.0.113.9:50000", "203.0.113.9", True),
        ("203.0.113.9:50000", "203.0.113.8:50000", False),
        ("[2001:db8::1]:443", "2001:DB8::FFFF", True),
        ("[2001:db8::1]", '"[2001:db8::2]:80"', True),
        ("[2001:db8::1]:443", "[2001:db8:0:1::1]:443", False),
        ("2001:db8:0:0:1:2:3:4:443", "2001:db8::1", True),
        ("[::ffff:203.0.113.9]:50000", " 203.0.113.9 ", True),
        ("::ffff:203.0.113.9%eth0", "203.0.113.9", True),
        ("[fe80::1%eth0]:443", "fe80::1%eth1", True),
        ("2002:cb00:7109:1::1", "2002:cb00:7109:2::1", True),
        ("2002:cb00:7109::1", "203.0.113.9", True),
        ("64:ff9b::203.0.113.9", "203.0.113.9", True),
        ("64:ff9b::203.0.113.9", "64:ff9b::203.0.113.8", False),
        # All that is no address is one client.
        *((garbage, "", True) for garbage in NO_ADDRESSES),
    ],
)
def test_one_host_counts_once_whatever_addresses_it_has(
    one: str, other: str, is_same: bool
) -> None:
    assert (network_of(one) == network_of(other)) is is_same


def test_a_forked_child_has_none_of_its_parents_places() -> None:
    places = Places(max_all=1, max_per_address=1, max_per_user=1)
    place = places.take("192.0.2.1", "me")
    places._mutex.acquire()  # held by a thread that the child does not have
    child = os.fork()
    if child == 0:
        kept = places.take("192.0.2.1", "me")
        place.release()
        is_right = places.taken == 1 and kept.user == "me"
        os._exit(0 if is_right else 1)
    places._mutex.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert places.taken == 1


def test_a_block_gives_its_place_back_unless_a_body_has_it() -> None:
    places = Places()
    with pytest.raises(ValueError), places.take("192.0.2.1"):
        raise ValueError
    assert places.taken == 0
    body = Body()
    with places.take("192.0.2.1") as place:
        place.keep_for(body)
    assert places.taken == 1
    place.release()
    assert (places.taken, body.finished) == (0, 0)


def test_the_streams_of_a_user_are_finished_but_for_newer_tokens() -> None:
    places = Places()
    taken = [
        *(places.take("192.0.2.1", "me", issued) for issued in (None, 9.0, 10.0, 11.0)),
        places.take("192.0.2.1", "you"),
        places.take("192.0.2.1"),
    ]
    bodies = [Body() for _ in taken]
    for place, body in zip(taken, bodies, strict=True):
        place.keep_for(body)
    places.finish("me", 10.0)
    places.finish("nobody", 10.0)
    assert [body.finished for body in bodies] == [1, 1, 1, 0, 0, 0]
    assert [place.is_finished for place in taken] == [True, True, True, False, False, False]


def test_who_is_finished_before_he_has_a_body_ends_with_it() -> None:
    places, body = Places(), Body()
    place = places.take("192.0.2.1", "me")
    places.finish("me", 10.0)
    place.keep_for(body)
    assert body.finished == 1


def test_a_place_keeps_no_body_and_a_body_that_is_gone_is_not_finished() -> None:
    places, body = Places(), Body()
    place = places.take("192.0.2.1", "me")
    place.keep_for(body)
    gone = weakref.ref(body)
    del body
    assert gone() is None
    places.finish("me", 10.0)
    assert place.is_finished


def test_a_subscriber_costs_little_and_shares_its_address() -> None:
    places = Places(max_per_address=10)
    address = "2001:db8::1"
    taken = [places.take(address, "".join(["m", "e"])) for _ in range(2)]
    one, two = [place._seat for place in taken]
    assert one.address is two.address
    assert one.user is two.user
    assert not hasattr(one, "__dict__")
    assert sys.getsizeof(one) + sys.getsizeof(taken[0]) < 200
