"""Who may read which channel, and whether there is room for one more."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flask import abort, request
from werkzeug.exceptions import ServiceUnavailable

from .broker import DEFAULT_CHANNEL, channel_names
from .errors import InvalidFieldError

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY_AFTER = 5
"""When a client that found no room may come again, in seconds."""

_RESERVED_DESCRIPTORS = 100


def requested_channels(max_channels: int) -> tuple[str, ...]:
    """Return the channels that the current request names: ``?channel=a&channel=b``.

    :param max_channels: how many it may name.
    :returns: their names; the default channel if it names none.
    :raises BadRequest: 400, in words, for a name that no channel can have, or too many of them.
    """
    asked = request.args.getlist("channel") or [DEFAULT_CHANNEL]
    if len(asked) > max_channels:
        abort(400, f"{len(asked)} channels were asked for; at most {max_channels} are allowed.")
    try:
        return channel_names(asked)
    except InvalidFieldError as error:
        abort(400, str(error))


def check_may_read(channels: tuple[str, ...], judges: list[Callable[[str], bool]]) -> None:
    """Refuse the current request unless it may read every one of some channels.

    :param channels: the names.
    :param judges: the app's own functions, all of which must allow it; without any, only the
        default channel is open.
    :raises Forbidden: 403, in words. What a judge raises is passed on.
    """
    for channel in channels:
        is_open = bool(judges) or channel == DEFAULT_CHANNEL
        if not (is_open and all(may_read(channel) for may_read in judges)):
            abort(403, f"Reading the channel {channel!r} is not allowed.")


def check_room(subscribers: int, max_subscribers: int | None) -> None:
    """Refuse the current request if the process has as many subscribers as it can hold.

    :param subscribers: how many it has.
    :param max_subscribers: how many it may have; ``None`` for any number.
    :raises ServiceUnavailable: 503 with ``Retry-After``.
    """
    if max_subscribers is not None and subscribers >= max_subscribers:
        raise ServiceUnavailable("All places for subscribers are taken.", retry_after=RETRY_AFTER)


def default_max_subscribers() -> int | None:
    """Return how many subscribers the limit of file descriptors leaves room for.

    A tenth of the descriptors, and at least 100, stay free for ordinary requests, log files and
    databases. ``None`` where the system has no such limit.
    """
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(1, limit - max(_RESERVED_DESCRIPTORS, limit // 10))
