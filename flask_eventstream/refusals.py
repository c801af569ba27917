"""Values that no event stream can carry: whether the client has sent them, or the app made them up.

What an app does wrong is an error of the app, 500. What a client sends is an answer to the client:
400, or 413 if it is too large. Which of them it is, is looked at only once a value was refused.
"""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, Any

from flask import has_request_context, request, session
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge

from .broker import MAX_NAME_LENGTH
from .errors import InvalidFieldError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT_FIELDS = ("channel", "member", "key")
_BYTES_OF_A_CHARACTER = 12
"""How many a character that is sent becomes on the wire at most: as JSON, two escapes of six."""

_MOST_COMPARED = 10_000_000
"""So many characters are compared with what was sent, which takes some hundredths of a second."""


class SentFieldError(InvalidFieldError, BadRequest):
    """A value that came with the current request; an answer of 400, unless it is caught."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        InvalidFieldError.__init__(self, field, value, reason)
        BadRequest.__init__(self, self.args[0])


class SentTooMuchError(TooLargeError, RequestEntityTooLarge):
    """Something that came with the current request; an answer of 413, unless it is caught."""

    def __init__(self, field: str, value: int, limit: int, advice: str) -> None:
        TooLargeError.__init__(self, field, value, limit, advice)
        RequestEntityTooLarge.__init__(self, self.args[0])


def refuses_what_is_sent(function: Callable[P, T]) -> Callable[P, T]:
    """Have what a function refuses be an answer of 400 or 413 if the client has sent it."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return function(*arguments, **options)
        except (InvalidFieldError, TooLargeError) as error:
            raise as_answer(error)  # noqa: B904  # it has this context, or is this error

    return call


def as_answer(error: InvalidFieldError | TooLargeError) -> Exception:
    """Return an answer of 400 or 413 for what the client has sent, else the error itself."""
    if not has_request_context():
        return error
    answer: Exception = error
    if isinstance(error, InvalidFieldError):
        if _is_sent(error.field, error.value):
            answer = SentFieldError(error.field, error.value, error.reason)
    elif _can_reach(error.field, error.limit):
        answer = SentTooMuchError(error.field, error.value, error.limit, error.advice)
    return answer


def _is_sent(field: str, value: object) -> bool:
    sent = [*_parts([*_body(), request.view_args, request.args, request.cookies])]
    sent += [*_parts([[*request.headers.values()], dict(session or {})])]
    if not isinstance(value, str):
        return any((type(one) is type(value) and one == value) or one == str(value) for one in sent)
    texts = [one for one in sent if isinstance(one, str)]
    if field == "data":
        return any(map(_SURROGATE.search, texts))
    if len(texts) * len(value) > _MOST_COMPARED:
        # It takes the client to have so much to compare, and it must not choose what that costs.
        return True
    return any(_explains(form, field, value) for one in texts for form in (one, one.strip()))


def _explains(text: str, field: str, value: str) -> bool:
    """Tell whether a value has a text in it, and would do without."""
    value, text = value.casefold(), text.casefold()
    if text not in value if text else value:
        return False
    rest = value.replace(text, "x") if text else "x"
    is_short = len(rest) <= MAX_NAME_LENGTH or field not in _SHORT_FIELDS
    return is_short and not _UNFIT.search(rest)


def _can_reach(field: str, limit: int) -> bool:
    """Tell whether what was sent is enough to go beyond a limit."""
    texts = [one for one in _parts([*_body(), request.args]) if isinstance(one, str)]
    in_bytes = _BYTES_OF_A_CHARACTER * sum(map(len, texts))
    return limit <= (in_bytes if "bytes" in field else len(texts))


def _body() -> Iterator[Any]:
    # Only what the view has read: there may be more than anybody wants in memory.
    read = vars(request)
    if "form" in read:
        yield request.form
    if "_cached_data" in read:
        yield request.get_json(silent=True)
        yield request.get_data().decode(errors="replace")


def _parts(left: list[Any]) -> Iterable[Any]:
    """Yield some values and all that is in them."""
    while left:
        one = left.pop()
        yield one
        if hasattr(one, "lists"):
            left += [value for _, values in one.lists() for value in values]
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
