"""Who may read which channel: by the app's own judgement, or by a token; and who gets a place."""

from __future__ import annotations

import inspect
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from uuid import UUID

from flask import abort, current_app, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests, Unauthorized
from werkzeug.local import LocalProxy

from .broker import DEFAULT_CHANNEL, channel_names
from .errors import ConfigurationError, InvalidFieldError, RightsError
from .places import NoPlaceError
from .tokens import PREFIX, Token, TokenError, verified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .places import Place, Places
    from .revocations import Revocations

RETRY_AFTER = 5
"""When a client that found no room may come again, in seconds."""

_RESERVED_DESCRIPTORS = 100
_TOKEN_KEY = "eventstream.token"
_VERDICT = "return True or False, from an async function too"
_KEY = (
    "a key is a str that is not empty, an int or a UUID, such as current_user.get_id(), and None "
    "stands for nobody"
)


class Authority(Protocol):
    """What may tell who reads what; it may also have a method ``user() -> str | None``."""

    def may_read(self, channel: str) -> bool:
        """Tell whether the current request may read a channel."""


def requested_channels(max_channels: int, signed_for: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the channels that the current request names: ``?channel=a&channel=b``.

    :param max_channels: how many it may name.
    :param signed_for: the channels of its token.
    :returns: their names; if it names none, those of its token, else the default channel.
    :raises BadRequest: 400, in words, for a name that no channel can have, or too many of them.
    """
    asked = request.args.getlist("channel") or signed_for or (DEFAULT_CHANNEL,)
    if len(asked) > max_channels:
        abort(400, f"{len(asked)} channels were asked for; at most {max_channels} are allowed.")
    try:
        return channel_names(asked)
    except InvalidFieldError as error:
        abort(400, str(error))


def check_may_read(channels: Iterable[str], judges: list[Callable[[str], bool]]) -> None:
    """Refuse the current request unless it may read every one of some channels.

    :param channels: the names.
    :param judges: the app's own functions, all of which must allow it; without any, only the
        default channel is open.
    :raises Forbidden: 403, in words. What a judge raises is passed on.
    :raises RightsError: if a judge returns anything but a ``bool``.
    """
    for channel in channels:
        is_open = bool(judges) or channel == DEFAULT_CHANNEL
        if not (is_open and all(_verdict(may_read(channel)) for may_read in judges)):
            abort(403, f"Reading the channel {channel!r} is not allowed.")


def _verdict(answer: bool) -> bool:
    # Most of what is no answer is true: a response that refuses, a coroutine.
    if type(answer) is not bool:
        raise _no_answer("what the function given to authorize() returned", answer, _VERDICT)
    return answer


def _no_answer(what: str, value: object, advice: str) -> RightsError:
    if inspect.iscoroutine(value):
        # Or Python warns, at some later time, that it was never awaited.
        value.close()
    return RightsError(what, value, advice)


def judge_of(authority: Any) -> Callable[[str], bool]:
    """Return the function of an authority, which is one itself or has a ``may_read``."""
    judge: Callable[[str], bool] = getattr(authority, "may_read", authority)
    return current_app.ensure_sync(judge)


def resolved(value: Any) -> Any:
    """Return what a proxy stands for in the current context, or the value if it is none."""
    while isinstance(value, LocalProxy):
        value = value._get_current_object()
    return value


def key_of(what: str, value: Any) -> str | None:
    """Return the text of a key that the app gives for a user or an owner.

    The text of any other object has its address in it, as a rule, which is another one in the next
    request, and somebody else's later.

    :param what: where the key comes from, as the beginning of a sentence.
    :param value: a ``str``, an ``int``, a :class:`uuid.UUID`, or ``None``; or a proxy of one.
    :returns: its text; ``None`` for nobody.
    :raises RightsError: if it is anything else, or an empty ``str``.
    """
    value = resolved(value)
    if value is None:
        return None
    if isinstance(value, UUID):
        return str(value)
    # A subclass may have another text, an enumeration for one.
    if isinstance(value, str) and value:
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    raise _no_answer(what, value, _KEY)


def signing_keys() -> list[str | bytes]:
    """Return the current app's secret keys, the one that signs last.

    :raises ConfigurationError: if it has none.
    """
    if not current_app.secret_key:
        raise ConfigurationError("SECRET_KEY", None, "is needed for tokens; set it to random text")
    return _secret_keys()


def _secret_keys() -> list[str | bytes]:
    keys = [*(current_app.config.get("SECRET_KEY_FALLBACKS") or ()), current_app.secret_key]
    # With an empty one everybody could sign.
    return [key for key in keys if key]


def presented_token() -> str | None:
    """Return the text that the current request has as its token, from the header or the query."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else request.args.get("token")


def check_token(text: str | None, revocations: Revocations) -> Token:
    """Return what the token of the current request says, and have its stream end with it.

    :param text: the token.
    :param revocations: whose rights were revoked.
    :raises Unauthorized: 401, in words, if it may not be used.
    :raises BrokerUnavailableError: if it cannot be found out whether it was revoked.
    """
    if not text:
        refuse("A token is needed.")
    try:
        token = verified(text, _secret_keys())
    except TokenError as error:
        refuse(str(error))
    if token.user is not None:
        revocations.refresh()
        check_not_revoked(token.user, token.issued, revocations)
    # Not in flask.g, which belongs to the app's context: one that is there already, as in tests,
    # serves several requests.
    request.environ[_TOKEN_KEY] = token
    return token


def check_not_revoked(user: str, issued: float, revocations: Revocations) -> None:
    """Refuse the current request if its token is known to be revoked.

    :param user: the key of the token's user.
    :param issued: when it was issued, by :func:`time.time`.
    :param revocations: whose rights were revoked.
    :raises Unauthorized: 401, in words.
    """
    if revocations.is_revoked(user, issued):
        refuse("This token was revoked.")


def token_of_view(is_guarded: bool, revocations: Revocations) -> Token | None:
    """Return the token by which the current request reads channels, if it has one.

    :param is_guarded: whether the app judges those itself whose tokens are its own.
    :param revocations: whose rights were revoked.
    :raises Unauthorized: 401, in words. A token that is wrong is never taken for none.
    """
    text = presented_token()
    if text is None or (is_guarded and not text.startswith(PREFIX)):
        return None
    return check_token(text, revocations)


def accepted_token() -> Token | None:
    """Return the token that the current request was found to have, if any."""
    token: Token | None = request.environ.get(_TOKEN_KEY)
    return token


def time_left() -> float | None:
    """Return for how many seconds the current request's token is valid, if it has one."""
    token = accepted_token()
    return None if token is None else token.expires - time.time()


def refuse(reason: str) -> NoReturn:
    """Refuse the current request for want of a token that may be used."""
    raise Unauthorized(reason, www_authenticate=WWWAuthenticate("bearer"))


def take_place(places: Places, user: str | None, issued: float | None = None) -> Place:
    """Take a place for the current request.

    :param places: those of the process.
    :param user: the key of its user, if it is known.
    :param issued: when its user's token was issued; ``None`` without one.
    :raises ServiceUnavailable: 503 with ``Retry-After``, if all are taken.
    :raises TooManyRequests: 429 with ``Retry-After``, if its address or its user has too many.
    """
    try:
        return places.take(request.remote_addr or "", user, issued)
    except NoPlaceError as error:
        whose = error.whose
    if whose == "process":
        raise ServiceUnavailable("All places for subscribers are taken.", retry_after=RETRY_AFTER)
    advice = f"This {whose} has too many streams open. Close one of them."
    raise TooManyRequests(advice, retry_after=RETRY_AFTER)


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
