"""The ``EVENTSTREAM_`` keys of an app's configuration, read once, when the blueprint registers."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .members import PRESENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_CREDENTIALS = r"(?:[^/?#\ud800-\udfff]*@)?"
_SERVER = r"(?:(?:[\w.-]+|\[[\w:.%]+\])(?::[0-9]{1,5})?)?(?:/[0-9]*/?)?"
_PATH = r"/[^?#@\ud800-\udfff]*"
_URL = re.compile(
    rf"(?:(memory://)|(rediss?://){_CREDENTIALS}({_SERVER})|(unix://){_CREDENTIALS}({_PATH}))"
    r"(?:\?[^#@\ud800-\udfff]*)?"
)
_OTHER = re.compile(rf"[a-z]+(?:://{_SERVER})?")
_SCHEME = re.compile(r"(?:memory|rediss?|unix):/{0,2}", re.IGNORECASE)


def _whole(least: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return None
        return f"must be an int of at least {least}"

    return check


def _seconds(value: Any) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # TIMEOUT_MAX is 292 years: what is more cannot be waited for, infinity included.
    if is_number and 0 < value <= threading.TIMEOUT_MAX:
        return None
    return "must be a number of seconds, more than 0"


def _lease(value: Any) -> str | None:
    # It is looked after ten times meanwhile, each time within milliseconds of Redis.
    is_fine = _seconds(value) is None and value >= 1
    return None if is_fine else "must be a number of seconds, at least 1"


def _url(value: Any) -> str | None:
    # The scheme is looked at where the broker is made.
    return None if isinstance(value, str) else "must be a str, such as 'memory://'"


def _prefix(value: Any) -> str | None:
    is_fine = (
        isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
    )
    return None if is_fine and value else "must be a str of ASCII characters without spaces"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "broker_url": _url,
    "history": _whole(0),
    "history_seconds": _seconds,
    "heartbeat": _seconds,
    "retry": _whole(0),
    "max_event_bytes": _whole(1),
    "max_channels": _whole(1),
    "max_subscribers": _whole(1),
    "max_lifetime": _seconds,
    "max_lag": _seconds,
    "hijack": _flag,
    "key_prefix": _prefix,
    "max_runs": _whole(1),
    "max_runs_per_owner": _whole(1),
    "max_run_bytes": _whole(1),
    "max_idle_bytes": _whole(1),
    "run_seconds": _seconds,
    "run_lease": _lease,
    "max_subscribers_per_address": _whole(1),
    "max_subscribers_per_user": _whole(1),
    "presence_seconds": _seconds,
}


@dataclass(frozen=True)
class Config:
    """What an app's configuration says of event streams. Seconds, but for ``retry``.

    :param broker_url: where events go through; ``memory://`` is the process itself, ``redis://``,
        ``rediss://`` and ``unix://`` are a Redis server.
    :param history: how many events of a channel a client that returns can get.
    :param history_seconds: and how old they may be, in seconds.
    :param heartbeat: the longest silence of a subscriber's stream, in seconds. Proxies cut silent
        connections; nginx does after 60 seconds.
    :param retry: when clients reconnect, in **milliseconds**, jittered by 20 %.
    :param max_event_bytes: the largest event, in bytes on the wire.
    :param max_channels: how many channels one connection may read.
    :param max_subscribers: how many subscribers a process may have; by default the limit of file
        descriptors less a reserve.
    :param max_lifetime: after how many seconds a subscriber's stream ends, jittered by 20 %; never
        by default.
    :param max_lag: for how many seconds events beyond the history are kept for subscribers that are
        connected. One that takes nothing for longer may have fallen behind; then its stream ends.
    :param hijack: whether subscribers' sockets are taken out of the server, where that is possible,
        so that they need no thread and no greenlet.
    :param key_prefix: what the names of all keys in Redis begin with. All processes of an app have
        to have the same one.
    :param max_runs: how many runs a process may have at once whose producers go on; a POST beyond
        that is 429. Without Redis, as many that have ended are kept.
    :param max_runs_per_owner: and how many of one owner; with Redis, of all processes together.
    :param max_run_bytes: how much of a run's log is kept, in bytes. Who comes when its beginning
        is gone gets a ``reset``.
    :param max_idle_bytes: how much is kept of what nobody reads, in bytes: of channels without
        subscribers, and as much of runs that have ended; with Redis, of those of all processes. The
        oldest are forgotten first.
    :param run_seconds: how long a run can be read after its end, in seconds.
    :param run_lease: with Redis, after how many seconds a run is lost whose process is silent.
    :param max_subscribers_per_address: how many subscribers of one IP address a process may have,
        where the /64 of an IPv6 address counts as one; any number by default.
    :param max_subscribers_per_user: and how many of one user; any number by default.
    :param presence_seconds: for how long a member without connections stays present, in seconds.
    """

    # Not in what it is shown as, since it may have a password in it.
    broker_url: str = field(default="memory://", repr=False)
    history: int = 256
    history_seconds: float = 300
    heartbeat: float = 15
    retry: int = 3000
    max_event_bytes: int = 1024 * 1024
    max_channels: int = 64
    max_subscribers: int | None = None
    max_lifetime: float | None = None
    max_lag: float = 30
    hijack: bool = True
    key_prefix: str = "eventstream:"
    max_runs: int = 1000
    max_runs_per_owner: int = 10
    max_run_bytes: int = 8 * 1024 * 1024
    run_seconds: float = 600
    run_lease: float = 15
    max_subscribers_per_address: int | None = None
    max_subscribers_per_user: int | None = None
    presence_seconds: float = PRESENCE_SECONDS
    max_idle_bytes: int = 64 * 1024 * 1024

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Config:
        """Read an app's configuration.

        :param config: ``app.config``. A key that is absent has its default, as has one that is
            ``None`` where the default is ``None``.
        :raises ConfigurationError: if a value cannot be used; it names the key.
        """
        given = {}
        for one in fields(cls):
            key = f"EVENTSTREAM_{one.name.upper()}"
            value = config.get(key, one.default)
            if value is not None or one.default is not None:
                _check(key, value, _CHECKS[one.name])
            given[one.name] = value
        return cls(**given)


def check_seconds(name: str, value: Any) -> None:
    """Raise a :class:`ConfigurationError` unless a value is a number of seconds, more than 0."""
    _check(name, value, _seconds)


def is_well_formed(url: str) -> bool:
    """Tell whether a broker's URL is one in every detail.

    In one that is not, what stands for a host, a port, a path or a query may be of the password,
    where that has a ``/``, ``?``, ``#`` or ``@`` that is not percent-encoded.
    """
    return _URL.fullmatch(url) is not None


def without_secrets(url: str) -> str:
    """Return what errors, logs and reports may show of a broker's URL.

    :param url: the URL.
    :returns: it without user, password and query; if it is not well formed, its scheme alone. One
        that has nothing before its host may be of another kind.
    """
    found = _URL.fullmatch(url)
    if found is not None:
        return "".join(filter(None, found.groups()))
    if _OTHER.fullmatch(url):
        return url
    scheme = _SCHEME.match(url)
    return f"{scheme[0] if scheme else ''}…"


def _check(key: str, value: Any, check: Callable[[Any], str | None]) -> None:
    reason = check(value)
    if reason is not None:
        # A URL of another class has a password all the same.
        raise ConfigurationError(key, type(value) if check is _url else value, reason)
