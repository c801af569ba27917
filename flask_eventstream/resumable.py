"""The requests for the runs of a view: POST starts one, GET resumes it, DELETE cancels it.

Who may do what is decided anew in each request, before anything is told of a run: by what guards
the view, and by the owner, who is a part of the key that runs are found by. A run of somebody else
is not found, like one that there never was.
"""

from __future__ import annotations

import inspect
import math
import time
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

from flask import abort, current_app, request, url_for
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests

from . import access, concurrency
from .config import check_seconds
from .contexts import carried
from .errors import BrokerUnavailableError, ConfigurationError
from .format import stream_format
from .generator_stream import report_failure
from .opening import SERVER_STOPS, come_again, open_stream, take_place
from .response import HEADERS, EventStreamResponse, cursor, json_dumps
from .run import Run
from .run_log import new_key, number_in, rest_of
from .run_registry import CANCELLED, LOST, NoRoomError, Standing
from .runs import last_words
from .state import current_state

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from flask import Response

    from .format import StreamFormat
    from .places import Place
    from .state import State

METHODS = ("GET", "POST", "DELETE")
"""The methods of a resumable view."""

_SMALL_BODY = 64 * 1024
_LOOK_SECONDS = 0.025
_REPLACE_SECONDS = 2.0
"""For how long the producer of a run that is replaced is waited for, if there is no room before."""

_ON_BUSY = ("attach", "reject", "replace")


class Resumable:
    """Answers the requests for the runs of one view.

    :param view: a generator function, maybe behind decorators.
    :param owner: returns whose a run is; see :meth:`EventStream.resumable`, as for the others.
    :param on_busy: ``"attach"``, ``"reject"`` or ``"replace"``.
    :param heartbeat: how long to wait for the first item, in seconds.
    :param format: the name of the format.
    :param identify: returns the key of the user of the current request.
    :raises ConfigurationError: if one of them cannot be used.
    :raises TypeError: if the view is no generator function.
    """

    def __init__(
        self,
        view: Callable[..., Any],
        owner: Callable[[], Any] | None,
        on_busy: str,
        heartbeat: float | None,
        format: str,
        identify: Callable[[], str | None],
    ) -> None:
        if not inspect.isgeneratorfunction(inspect.unwrap(view)):
            raise TypeError(
                f"{view!r} is no generator function. Write 'yield from' instead of 'return', and "
                "have its decorators use functools.wraps()"
            )
        if on_busy not in _ON_BUSY:
            raise ConfigurationError("on_busy", on_busy, f"is unknown; use one of {_ON_BUSY}")
        if heartbeat is not None:
            check_seconds("heartbeat", heartbeat)
        stream_format(format, str, 0)
        self._view = view
        self._owner = owner
        self._on_busy = on_busy
        self._heartbeat = heartbeat
        self._format = format
        self._identify = identify
        update_wrapper(self, view)

    def __call__(self, **arguments: Any) -> Any:
        """Answer the current request."""
        # Whatever guards the view answers here. The generator itself has not begun.
        source = current_app.ensure_sync(self._view)(**arguments)
        if not inspect.isgenerator(source):
            return source
        key, owner = self._key()
        if request.method == "HEAD":
            return EventStreamResponse(())
        try:
            return self._answer(key, owner, source)
        except BrokerUnavailableError as error:
            if request.method == "GET":
                return come_again(current_state().config, error)
            current_app.logger.warning("A run could not be reached: %s", error)
            advice = "Runs cannot be reached at the moment."
            raise ServiceUnavailable(advice, retry_after=access.RETRY_AFTER) from error

    def _answer(self, key: str, owner: str, source: Generator[Any, Any, Any]) -> Response:
        state = current_state()
        if request.method == "DELETE":
            return self._cancel(state, key)
        if state.shutdown.has_begun:
            if request.method == "GET":
                return come_again(state.config, SERVER_STOPS)
            raise ServiceUnavailable(SERVER_STOPS, retry_after=access.RETRY_AFTER)
        is_return = cursor() is not None or "run" in request.args
        if request.method == "POST" and not is_return:
            with take_place(state, self._identify) as place:
                run = Run(key, owner, self._encoder(), report_failure)
                standing = self._busy_before_body(state, key) or self._start(state, run, source)
                return self._attached(state, key, place, standing)
        return self._attached(state, key, None)

    def _key(self) -> tuple[str, str]:
        owner = self._owner_key()
        if owner is None:
            abort(404)
        # Where an app serves several hosts, each has its own users.
        return new_key(f"{request.host}{request.root_path}{request.path}", owner), owner

    def _owner_key(self) -> str | None:
        if self._owner is None:
            return ""
        answer = current_app.ensure_sync(self._owner)()
        return access.key_of("what the function given as owner= returned", answer)

    def _busy_before_body(self, state: State, key: str) -> Standing | None:
        """Return how the run stands that a request only attaches to, if it has a large body."""
        if not _has_large_body() or self._on_busy != "attach":
            return None
        busy = self._find(state, key)
        return busy if busy is not None and busy.is_active else None

    def _start(self, state: State, run: Run, source: Generator[Any, Any, Any]) -> Standing:
        # A run outlives its request, after which the server reads the next one.
        request.get_data(parse_form_data=True)
        deadline = -math.inf
        while True:
            standing = self._begin(state, run, source, deadline)
            if standing is None:
                concurrency.new_event().wait(_LOOK_SECONDS)
            elif standing.run == run.id:
                run.wait(self._heartbeat or state.config.heartbeat)
                return standing
            elif self._on_busy == "attach":
                return standing
            elif self._on_busy == "reject":
                abort(409, "A run is active here already. Cancel it, or wait for its end.")
            else:
                self._end(state, run.key, standing)
                deadline = time.monotonic() + _REPLACE_SECONDS

    def _begin(
        self, state: State, run: Run, source: Generator[Any, Any, Any], deadline: float
    ) -> Standing | None:
        """Begin a run; return how the one stands that the key has now.

        :param deadline: until when ``None`` is returned if there is no room, by
            :func:`time.monotonic`.
        :raises TooManyRequests: 429, if there is none.
        """
        try:
            return state.runs.begin(run, source, carried)
        except NoRoomError:
            # To attach takes none.
            busy = self._find(state, run.key)
            if busy is not None and busy.is_active:
                return busy
        if time.monotonic() < deadline:
            return None
        advice = "There are too many runs. Wait for the end of one, or cancel it."
        raise TooManyRequests(advice, retry_after=access.RETRY_AFTER)

    def _attached(
        self, state: State, key: str, place: Place | None, standing: Standing | None = None
    ) -> Response:
        while True:
            response = self._attach(state, key, place, standing or self._find(state, key))
            if response is not None:
                return response
            place = standing = None

    def _attach(
        self, state: State, key: str, place: Place | None, standing: Standing | None
    ) -> Response | None:
        number = _number_of_last(standing)
        if standing is None or (number == standing.last and not standing.is_active):
            return current_app.response_class(status=204, headers=HEADERS)
        with place or take_place(state, self._identify) as place:
            return self._stream(state, key, standing, number, place)

    def _stream(
        self, state: State, key: str, standing: Standing, number: int, place: Place
    ) -> Response | None:
        begin = partial(rest_of, standing, number, cursor() or "")
        subscription = state.broker.subscribe_log(
            standing.run, standing.last, begin, not standing.is_active
        )
        after = state.runs.registry.find(key)
        if after is None or after.run != standing.run:
            # Another one has taken its place meanwhile, and its log may be gone.
            subscription.close()
            return None
        if after.is_active:
            state.runs.registry.watch(key, after, last_words(self._encoder(), LOST))
        response = open_stream(state, subscription, subscription.start, place)
        response.headers["X-Run-Id"] = after.run
        response.headers["Location"] = _url_of(after)
        return response

    def _cancel(self, state: State, key: str) -> Response:
        standing = self._find(state, key)
        if standing is None or request.args.get("run", standing.run) != standing.run:
            abort(404)
        self._end(state, key, standing)
        return current_app.response_class(status=204, headers=HEADERS)

    def _end(self, state: State, key: str, standing: Standing) -> None:
        wire = last_words(self._encoder(), CANCELLED)
        state.runs.registry.end(key, standing.run, CANCELLED, wire)

    def _find(self, state: State, key: str) -> Standing | None:
        return state.runs.find(key, last_words(self._encoder(), LOST))

    def _encoder(self) -> StreamFormat:
        limit = current_state().config.max_event_bytes
        return stream_format(self._format, json_dumps(), limit)


def _has_large_body() -> bool:
    """Tell whether the current request may have a body that costs something to read."""
    if "Transfer-Encoding" in request.headers:
        return True
    return (request.content_length or 0) > _SMALL_BODY


def _number_of_last(standing: Standing | None) -> int:
    """Return the number of the last event that the client has, 0 for none.

    :param standing: how the run stands that it may read.
    :raises NotFound: 404, if it asks for another one.
    """
    last, run = cursor(), request.args.get("run")
    if last is None and run is None:
        return 0
    if standing is None or (run is not None and run != standing.run):
        abort(404)
    # What has no dot is the id of a broker's reset, after which everything is to come again.
    number = number_in(last, standing.run) if last is not None and "." in last else 0
    if number is None or number > standing.last:
        abort(404)
    return number


def _url_of(standing: Standing) -> str:
    assert request.endpoint is not None
    return url_for(request.endpoint, **(request.view_args or {}), run=standing.run)
