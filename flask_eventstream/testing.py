"""Reading event streams, endless ones too, in the tests of an app.

::

    def test_news(client):
        with client_stream(client, "/stream") as stream:
            eventstream.publish("Hello!")
            assert stream.next(timeout=1).data == "Hello!"

pytest finds the fixture :func:`event_stream` by itself, which does the same with the ``client``
fixture of your own: ``stream = event_stream("/stream")``.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from .parser import EventStreamParser
from .response import ON_SUBSCRIBED_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask.testing import FlaskClient
    from werkzeug.datastructures import Headers
    from werkzeug.test import TestResponse

    from .body import SubscriptionBody
    from .event import ServerSentEvent

_END = object()


def client_stream(
    client: FlaskClient, path: str, *, timeout: float = 5, **request: Any
) -> ClientStream:
    """Open an event stream with a Flask test client.

    :param client: the test client; its cookies are used.
    :param path: the URL.
    :param timeout: how long to wait for the head and, unless told otherwise, for each event, in
        seconds.
    :param request: what :meth:`flask.testing.FlaskClient.open` takes: ``method``, ``headers``,
        ``query_string``, ``json``.
    :returns: the stream, a context manager that closes it.
    :raises AssertionError: if the answer is no event stream; it says what it is.
    :raises TimeoutError: if there is no head in time.
    """
    return ClientStream(client, path, timeout, request)


class ClientStream:
    """An open event stream; get it from :func:`client_stream`.

    :ivar status_code: the HTTP status.
    :ivar headers: the head's fields.
    :ivar comments: the comments so far, heartbeats (``""``) among them.
    """

    def __init__(
        self, client: FlaskClient, path: str, timeout: float, request: dict[str, Any]
    ) -> None:
        self.comments: list[str] = []
        self._path = path
        self._timeout = timeout
        self._parser = EventStreamParser(on_comment=self.comments.append)
        self._events: deque[ServerSentEvent] = deque()
        self._chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._bodies: list[SubscriptionBody] = []
        self._last_event_id = ""
        self._is_closed = False
        # The whole request runs on one thread, since a request's context belongs to one; a
        # deadline needs a second thread to wait on.
        arguments = (_independent(client), request)
        self._reader = threading.Thread(target=self._read, args=arguments, daemon=True)
        self._reader.start()
        response: TestResponse = self._received(timeout)
        self.status_code: int = response.status_code
        self.headers: Headers = response.headers
        if response.mimetype != "text/event-stream":
            body = self._received(timeout)
            raise AssertionError(f"{path} answered {response.status}, no event stream: {body!r}")

    def next(self, timeout: float | None = None) -> ServerSentEvent:
        """Return the next event.

        :param timeout: how long to wait for it, in seconds; by default as for the head.
        :raises TimeoutError: if there is none in time.
        :raises EOFError: if the stream has ended.
        """
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while not self._events:
            chunk = self._received(timeout, deadline)
            if chunk is _END:
                self._chunks.put(_END)
                raise EOFError(f"the stream {self._path} has ended")
            self._events.extend(self._parser.feed(chunk))
        event = self._events.popleft()
        self._last_event_id = self._last_event_id if event.id is None else event.id
        return event

    def __iter__(self) -> Iterator[ServerSentEvent]:
        """Yield the events up to the end of the stream."""
        with suppress(EOFError):
            while True:
                yield self.next()

    @property
    def last_event_id(self) -> str:
        """What a client that has seen as much would have to send when it reconnects."""
        return self._last_event_id

    @property
    def reconnection_time(self) -> int | None:
        """The latest ``retry``, in **milliseconds**."""
        return self._parser.reconnection_time

    def close(self) -> None:
        """Leave, as a client does that closes its connection.

        A generator view that computes just now is closed at its next item.
        """
        self._is_closed = True
        for body in self._bodies:
            body.close()
            self._reader.join(self._timeout)

    def __enter__(self) -> ClientStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _received(self, timeout: float, deadline: float | None = None) -> Any:
        left = timeout if deadline is None else deadline - time.monotonic()
        try:
            received = self._chunks.get(timeout=max(0, left))
        except queue.Empty:
            raise TimeoutError(f"nothing came from {self._path} for {timeout} s") from None
        if isinstance(received, BaseException):
            raise received
        return received

    def _read(self, client: FlaskClient, request: dict[str, Any]) -> None:
        environ = {**request.pop("environ_overrides", {}), ON_SUBSCRIBED_KEY: self._bodies.append}
        try:
            response = client.open(self._path, buffered=False, environ_overrides=environ, **request)
            self._chunks.put(response)
            for chunk in response.response:
                self._chunks.put(chunk)
                if self._is_closed:
                    break
            response.close()
        except BaseException as error:  # noqa: BLE001  # raised in the thread that reads
            self._chunks.put(error)
        self._chunks.put(_END)


def _independent(client: FlaskClient) -> FlaskClient:
    # In a "with client:" block the client keeps the contexts of its last request, which belong to
    # the test's own thread.
    other = copy.copy(client)
    other.preserve_context = False
    other._context_stack = ExitStack()
    return other


try:
    import pytest
except ImportError:
    # Without pytest nobody asks for a fixture.
    pass
else:

    @pytest.fixture
    def event_stream(client: FlaskClient) -> Iterator[Callable[..., ClientStream]]:
        """Return :func:`client_stream` for the ``client`` fixture; what it opens is closed."""
        with ExitStack() as streams:

            def open_stream(path: str, **request: Any) -> ClientStream:
                return streams.enter_context(client_stream(client, path, **request))

            yield open_stream
