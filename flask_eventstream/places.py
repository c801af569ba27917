"""The places that a process has for subscribers: how many there are, and whose they are.

To look whether there is a place and to take it is one step, since many threads come at once.
"""

from __future__ import annotations

import ipaddress
import re
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from . import concurrency

if TYPE_CHECKING:
    from collections.abc import Collection


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""What IPv4 addresses are mapped to on their way to a server that has IPv6 alone (RFC 6052)."""

_HOST_AND_PORT = re.compile(r"\[([^]]*)\](?::[0-9]+)?|(.+):[0-9]+")


class Body(Protocol):
    """What a place is taken for."""

    def finish(self) -> None:
        """End the stream, from any thread."""


class NoPlaceError(Exception):
    """There is no place left.

    :param whose: ``"address"`` or ``"user"`` if one of them has too many, ``"process"`` if all are
        taken.
    """

    def __init__(self, whose: str) -> None:
        super().__init__(whose)
        self.whose = whose


class Places:
    """The places of one process, and who has them.

    :param max_all: how many there are; ``None`` for any number.
    :param max_per_address: how many one address may have; ``None`` for any number.
    :param max_per_user: how many one user may have; ``None`` for any number.

    A forked child has none of its parent's subscribers, and begins with none.
    """

    def __init__(
        self,
        max_all: int | None = None,
        max_per_address: int | None = None,
        max_per_user: int | None = None,
    ) -> None:
        self.max_all = max_all
        self.max_per_address = max_per_address
        self.max_per_user = max_per_user
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # In a forked child, what its copies of the parent's places release goes to the copy of the
        # parent's list, where nobody looks.
        self._mutex = concurrency.new_mutex()
        self._released: deque[_Seat] = deque()
        self._taken = 0
        self._of_addresses = _Seats()
        self._of_users = _Seats()

    @property
    def taken(self) -> int:
        """How many are taken."""
        with self._mutex:
            self._remove_released()
            return self._taken

    @property
    def has_users(self) -> bool:
        """Whether one is taken by somebody who is known."""
        with self._mutex:
            self._remove_released()
            return bool(self._of_users)

    def take(self, address: str, user: str | None = None, issued: float | None = None) -> Place:
        """Take a place.

        :param address: the client's IP address.
        :param user: the key of its user, if it is known.
        :param issued: when its token was issued, by :func:`time.time`; ``None`` without a token.
        :raises NoPlaceError: if there is none, for anybody, this address, or this user.
        """
        network = None if self.max_per_address is None else network_of(address)
        with self._mutex:
            self._remove_released()
            self._check(network, user)
            seat = _Seat(self._of_addresses.shared(network), self._of_users.shared(user), issued)
            self._of_addresses.add(seat.address, seat)
            self._of_users.add(seat.user, seat)
            self._taken += 1
            return Place(seat, self._released)

    def _check(self, network: str | None, user: str | None) -> None:
        numbers = (
            ("process", self._taken, self.max_all),
            ("address", len(self._of_addresses.of(network)), self.max_per_address),
            ("user", len(self._of_users.of(user)), self.max_per_user),
        )
        for whose, number, limit in numbers:
            if limit is not None and number >= limit:
                raise NoPlaceError(whose)

    def finish(self, user: str | None, revoked: float) -> None:
        """End every stream of a user, but for those with a token that is newer.

        :param user: the user's key; ``None`` for every user that is known.
        :param revoked: when its tokens were revoked, by :func:`time.time`.
        """
        with self._mutex:
            self._remove_released()
            seats = self._of_users.all() if user is None else tuple(self._of_users.of(user))
        for seat in seats:
            if seat.issued is None or seat.issued <= revoked:
                seat.finish()

    def _remove_released(self) -> None:
        while self._released:
            seat = self._released.popleft()
            self._taken -= 1
            self._of_addresses.remove(seat.address, seat)
            self._of_users.remove(seat.user, seat)


class _Seat:
    # What the books have of a place. They do not keep the place itself, which would then never be
    # garbage, nor its stream.
    __slots__ = ("address", "body", "is_finished", "issued", "user")

    def __init__(self, address: str | None, user: str | None, issued: float | None) -> None:
        self.address = address
        self.user = user
        self.issued = issued
        self.is_finished = False
        self.body: weakref.ref[Body] | None = None

    def finish(self) -> None:
        # Who attaches a body looks at this after it has done so: one of the two sees the other.
        self.is_finished = True
        body = None if self.body is None else self.body()
        if body is not None:
            body.finish()


class _Seats:
    # The seats of each address, or of each user; of those who are not known, none.
    def __init__(self) -> None:
        self._found: dict[str, tuple[str, set[_Seat]]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def of(self, key: str | None) -> Collection[_Seat]:
        return () if key is None or key not in self._found else self._found[key][1]

    def all(self) -> tuple[_Seat, ...]:
        return tuple([seat for _, seats in self._found.values() for seat in seats])

    def shared(self, key: str | None) -> str | None:
        # Of a thousand subscribers behind one address, each would have a copy of it.
        return key if key is None or key not in self._found else self._found[key][0]

    def add(self, key: str | None, seat: _Seat) -> None:
        if key is not None:
            self._found.setdefault(key, (key, set()))[1].add(seat)

    def remove(self, key: str | None, seat: _Seat) -> None:
        if key is not None:
            self._found[key][1].discard(seat)
            if not self._found[key][1]:
                del self._found[key]


class Place:
    """A place that is taken, until :meth:`release`; get it from :meth:`Places.take`.

    As a context manager it is released at the end of the block, unless a body has it by then.
    """

    __slots__ = ("_is_kept", "_released", "_seat")

    def __init__(self, seat: _Seat, released: deque[_Seat]) -> None:
        self._seat = seat
        self._released = released
        self._is_kept = False

    @property
    def user(self) -> str | None:
        """The key of the user who has it, if it is known."""
        return self._seat.user

    @property
    def is_finished(self) -> bool:
        """Whether the stream has to end, since its user's rights were revoked."""
        return self._seat.is_finished

    def keep_for(self, body: Body) -> None:
        """Keep the place until a body releases it, which is ended with its user's rights."""
        self._is_kept = True
        if self._seat.user is None:
            return
        self._seat.body = weakref.ref(body)
        if self._seat.is_finished:
            body.finish()

    def release(self) -> None:
        """Give the place back; from anywhere, and more than once.

        That takes no lock, since the garbage collector may do it at any point, also while this very
        thread takes a place. Who needs the numbers next counts it out.
        """
        try:
            released = self._released
            # One step, so that of many threads only one releases it.
            del self._released
        except AttributeError:
            return
        released.append(self._seat)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._is_kept:
            self.release()

    def __del__(self) -> None:
        # A response may be dropped before any server iterates or closes it.
        self.release()


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 of an IPv6 address.

    One host can have all the addresses of a /64. Some proxies write a port behind the address,
    which is another one for each connection. All that is no address counts as one client.

    :param address: what the server or a proxy says, such as ``[2001:db8::1]:443``.
    """
    text = address.strip(' \t"')
    parts = _HOST_AND_PORT.fullmatch(text)
    ip = _ip(text) or (_ip(parts[1] or parts[2] or "") if parts else None)
    if ip is None:
        return ""
    if ip.version == 4:
        return str(ip)
    embedded = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return str(embedded or ipaddress.IPv6Address(int(ip) >> 64 << 64))


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
