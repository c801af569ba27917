"""The contexts of a request, for what goes on when its view has returned.

Nothing stays pushed when control returns to code that is not ours. The rules:

* What a stream runs in the thread of its server runs in a copy of the request's context variables.
  The request is torn down once, when the stream has ended: in the thread that closes it, as tools
  that trace requests expect. That is put off when a server takes the response, and not before.
* What runs on a thread or greenlet of its own has an app context of its own, which is torn down
  there. It sees the request and its session. Of ``g`` it has a copy of what is plain data: a
  connection or an object of a database session belongs to the request.
* A response that no server takes is closed when the request ends. Uploaded files stay open until
  the last thread that may read them has ended.
"""

from __future__ import annotations

import contextvars
import datetime
import inspect
import logging
import weakref
from collections.abc import MutableSequence, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import is_dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import PurePath
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flask import current_app, g, has_app_context, has_request_context, request, stream_with_context
from flask.globals import _cv_app, _cv_request

from . import concurrency
from .producer import close_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flask import Flask, Response

    Producer = Callable[[], BaseException | None]
    """What runs on a thread of its own; it returns the error that it has ended with."""

_VALUES = (
    str, bytes, int, float, complex, type(None), Decimal, Fraction, Enum, UUID, PurePath, range,
    datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
)  # fmt: skip
_WITH_CONTEXT = [one for one in stream_with_context.__code__.co_consts if isinstance(one, CodeType)]
_BELONGS = object()
_logger = logging.getLogger(__name__)


class StreamContext:
    """The contexts of the current request, for the stream that answers it.

    :ivar run: calls a function with its arguments in these contexts.
    """

    def __init__(self) -> None:
        self.run = contextvars.copy_context().run
        # Flask tears a context down with the last of its tokens, and takes the newest first.
        self._app: Any = _cv_app.get()
        self._request: Any = _cv_request.get()
        self._before = len(self._app._cv_tokens), len(self._request._cv_tokens)
        self._hold: object = None

    def hold(self) -> None:
        """Put off the end of the request, unless it is over, until :meth:`release`."""
        is_over = not (self._app._cv_tokens and self._request._cv_tokens)
        if self._hold is not None or is_over:
            return
        self._hold = object()
        for context, before in zip((self._app, self._request), self._before, strict=True):
            tokens = context._cv_tokens
            # What the stream has pushed itself meanwhile, it pops itself.
            tokens[:] = [self._hold, *tokens[before:], *tokens[:before]]

    def release(self, error: BaseException | None = None) -> None:
        """Tear the request down that was put off, unless others still have its contexts.

        :param error: what the functions are told that the app has registered for that.
        """
        hold, self._hold = self._hold, None
        if hold is None:
            return
        # As push() does, which would match the URL once more.
        self._app._cv_tokens.append(_cv_app.set(self._app))
        self._request._cv_tokens.append((_cv_request.set(self._request), None))
        self._app._cv_tokens.remove(hold)
        self._request._cv_tokens.remove(hold)
        try:
            self._request.pop(error)
        finally:
            self._app.pop(error)


class RequestEnd:
    """The end of a request, which comes once Flask and all threads are done with it.

    Flask calls ``request.close()`` when it tears a request down. This takes the place of that.

    :param close: closes the request's files.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._mutex = concurrency.new_mutex()
        self._users = 1
        self._context: object = _cv_request.get()
        # A response that is garbage before has done the same by itself.
        self._responses: list[weakref.ref[Response]] = []

    @classmethod
    def of_request(cls) -> RequestEnd:
        """Return the one of the current request."""
        own: Any = request._get_current_object()  # type: ignore[attr-defined]  # a proxy's own method
        if not isinstance(own.close, cls):
            own.close = cls(own.close)
        end: RequestEnd = own.close
        return end

    def add(self, response: Response) -> None:
        """Close a response when the request ends, unless it is taken until then."""
        self._responses.append(weakref.ref(response))

    def take(self, response: Response) -> None:
        """Take note that a server has a response, and closes it."""
        self._responses = [one for one in self._responses if one() is not response]

    def __call__(self) -> None:
        """Close what no server has taken, and the files once nobody uses them."""
        if _cv_request.get() is not self._context:
            # It is a copy of the request's context that ends, or the request has ended before.
            return
        self._context = None
        responses, self._responses = self._responses, []
        for response in responses:
            close_source(response())
        self.leave()

    def enter(self) -> None:
        """Keep the files open until :meth:`leave`."""
        with self._mutex:
            self._users += 1

    def leave(self) -> None:
        """Need the files no more."""
        with self._mutex:
            self._users -= 1
            is_last = not self._users
        if is_last:
            close, self._close = self._close, bool
            close()


def carried(function: Producer) -> Callable[[], object]:
    """Wrap a function to run on a thread or greenlet of its own, with an app context of its own.

    :param function: returns the error that the app's teardown functions are to be told.
    """
    context = contextvars.copy_context()
    if not has_app_context():
        return partial(context.run, function)
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy's own method
    end = RequestEnd.of_request() if has_request_context() else None
    if end is not None:
        end.enter()
    values, left = _plain_of({name: g.get(name) for name in g})

    def run() -> None:
        try:
            _run_with(app, values, left, function)
        finally:
            if end is not None:
                end.leave()

    return partial(context.run, run)


def _run_with(
    app: Flask,
    values: dict[str, Any],
    left: dict[str, str],
    function: Producer,
) -> None:
    own = app.app_context()
    if left:
        kind = type("CarriedGlobals", (app.app_ctx_globals_class,), {"__getattr__": _refuse(left)})
        own.g = kind()
    for name, value in values.items():
        setattr(own.g, name, value)
    own.push()
    error = None
    try:
        error = function()
    finally:
        try:
            own.pop(error)
        except Exception:
            # Whoever waits for what the thread has produced has it already.
            _logger.exception("The app context of a stream could not be torn down")


def _refuse(left: dict[str, str]) -> Callable[[Any, str], Any]:
    def get(_: Any, name: str) -> Any:
        if name not in left:
            raise AttributeError(name)
        raise AttributeError(
            f"g.{name} is a {left[name]} and stays with its request, since it may belong to the "
            "request's thread or database session; this stream runs on a thread of its own: make "
            "it anew here, or keep plain data in g, such as an id"
        )

    return get


def _plain_of(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    copies = {name: _copied(value) for name, value in values.items()}
    left = {name: type(values[name]).__name__ for name in copies if copies[name] is _BELONGS}
    return {name: copies[name] for name in copies.keys() - left.keys()}, left


def _copied(value: Any) -> Any:
    try:
        return _plain(value)
    except (TypeError, RecursionError):
        return _BELONGS


def _plain(value: Any) -> Any:
    """Return plain data, of which what can be changed is copied.

    :raises TypeError: if it is something else.
    """
    # Not isinstance: a proxy says that it is what it stands for.
    kind = type(value)
    if issubclass(kind, _VALUES):
        return value
    if kind in (list, tuple, set, frozenset):
        return kind(map(_plain, value))
    if kind is dict:
        return {_plain(key): _plain(one) for key, one in value.items()}
    if is_dataclass(kind) or kind is SimpleNamespace:
        copied = copy(value)
        vars(copied).update(_plain(vars(value)))
        return copied
    # The rows of databases.
    if issubclass(kind, Sequence) and not issubclass(kind, MutableSequence):
        list(map(_plain, value))
        return value
    raise TypeError


def unwrapped(stream: Iterable[Any]) -> Iterable[Any]:
    """Return what ``stream_with_context`` has wrapped, as a stream has contexts of its own.

    In Flask before 3.1.2 the wrapper has pushed contexts, and they can only be popped here.
    """
    is_new = inspect.isgenerator(stream) and stream.gi_yieldfrom is None
    if not (is_new and inspect.isgenerator(stream) and stream.gi_code in _WITH_CONTEXT):
        return stream
    wrapped: Iterable[Any] = inspect.getgeneratorlocals(stream)["gen"]
    # An async view made it in another context. Flask has taken its token back nevertheless.
    with suppress(ValueError):
        stream.close()
    return wrapped
