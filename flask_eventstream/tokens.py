"""Tokens that an app signs: who has one may read its channels until it expires.

A token is text that is safe in a URL. Who has the app's secret key can make one, and nobody else;
what it says can be read by everybody.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from itsdangerous import BadData, URLSafeSerializer

from .config import check_seconds
from .errors import ConfigurationError, InvalidFieldError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "es1."
"""What every token begins with, so that it is told from those of others."""

MAX_AGE = 30 * 24 * 3600
"""How long a token may be valid at most, in seconds. Revocations are kept as long."""

_SALT = "flask-eventstream.token"
_LATEST = 1e11  # 1,200 years from now; what is larger may be no float


class Token(NamedTuple):
    """What a token says.

    ``channels`` are the names that its bearer may read, ``issued`` and ``expires`` are times in
    seconds since the epoch of Unix, ``user`` is the key of its user or ``None``, and ``claims`` are
    whatever else the app has put into it.
    """

    channels: tuple[str, ...]
    issued: float
    expires: float
    user: str | None
    claims: dict[str, Any]


class TokenError(Exception):
    """A text is no token that may be used; the message says why, in words for its bearer."""


def new_token(
    channels: tuple[str, ...], max_age: float, user: str | None, claims: dict[str, Any]
) -> Token:
    """Return a token that is valid from now on.

    :param channels: the names, checked.
    :param max_age: for how long, in seconds.
    :param user: the key of its user, if any.
    :param claims: what else it says.
    :raises ConfigurationError: if ``max_age`` is not more than 0, or more than :data:`MAX_AGE`.
    """
    check_seconds("max_age", max_age)
    if max_age > MAX_AGE:
        raise ConfigurationError("max_age", max_age, f"must be at most {MAX_AGE} seconds, 30 days")
    now = time.time()
    return Token(channels, now, now + max_age, user, claims)


def signed(token: Token, keys: Sequence[str | bytes]) -> str:
    """Return the text of a token.

    :param token: what it says.
    :param keys: the app's secret keys, of which the last one, the newest, signs.
    :raises InvalidFieldError: if its user or its claims cannot be sent as JSON.
    """
    payload = {
        "channels": token.channels,
        "issued": token.issued,
        "expires": token.expires,
        "user": token.user,
        "claims": token.claims,
    }
    try:
        text = _serializer(keys).dumps(payload)
    except (TypeError, ValueError) as error:
        reason = f"cannot be sent as JSON: {error}"
        raise InvalidFieldError("claims", token.claims, reason) from error
    assert isinstance(text, str)
    return PREFIX + text


def verified(text: str, keys: Sequence[str | bytes]) -> Token:
    """Return what a token says, if it is the app's and has not expired.

    :param text: the token.
    :param keys: the app's secret keys, any of which may have signed it.
    :raises TokenError: if it is not, or has.
    """
    found: Any = None
    if text.startswith(PREFIX) and text.isascii():
        try:
            found = _serializer(keys).loads(text.removeprefix(PREFIX))
        except BadData:
            # It has parts of the token in it, which must not get into a traceback.
            found = None
    if not _is_payload(found):
        raise TokenError("This token is not valid: it was changed, or is not of this app.")
    token = Token(**{**found, "channels": tuple(found["channels"])})
    if token.expires <= time.time():
        raise TokenError("This token has expired.")
    return token


def _is_payload(found: Any) -> bool:
    # Another version of this package, or the app itself, may have signed something else.
    kinds: dict[str, Any] = {"channels": list, "user": (str, type(None)), "claims": dict}
    if not isinstance(found, dict) or found.keys() != {*kinds, "issued", "expires"}:
        return False
    times = found["issued"], found["expires"]
    return (
        all(isinstance(found[name], kind) for name, kind in kinds.items())
        and all(isinstance(name, str) for name in found["channels"])
        # NaN, which would never come, is not less.
        and all(isinstance(time, (int, float)) and abs(time) < _LATEST for time in times)
    )


def _serializer(keys: Sequence[str | bytes]) -> URLSafeSerializer:
    signer: dict[str, Any] = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
    secrets: Any = keys
    return URLSafeSerializer(secrets, salt=_SALT, signer_kwargs=signer)
