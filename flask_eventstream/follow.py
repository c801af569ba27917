"""Reading an event stream to no end, by HTTP or through a broker, as a browser does."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from .errors import EventStreamError
from .parser import EventStreamParser

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from .broker import Broker
    from .event import ServerSentEvent

    Read = Callable[[str], Iterator[bytes]]
    """Connects with a last event id, and yields what comes until the stream ends."""

READ_TIMEOUT = 60.0
"""The longest silence of a stream before it is taken for dead, in seconds."""

LONGEST_PAUSE = 30.0
"""The longest pause between two attempts, unless the stream asked for more, in seconds."""

LOST = (OSError, HTTPException)
"""What is raised by a connection that is lost, or that could not be made."""

_RETRY = 3.0
_SHORTEST_PAUSE = 0.1
_TAKE_SECONDS = 15
_MAX_REDIRECTS = 5
_TEXT_BYTES = 300
_REDIRECTS = {301, 302, 303, 307, 308}
# What may go on to another site; all other headers are the user's, and may be secrets.
_HARMLESS = {"Accept", "Accept-Encoding", "Cache-Control", "Last-Event-ID"}
# Control characters, and those that turn the direction of what is written after them.
_UNFIT_TO_SHOW = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class StreamError(EventStreamError):
    """What was asked for is no event stream, and it is of no use to ask again."""


class _Finished(Exception):  # noqa: N818  # it is no error
    """The server says that there is nothing more to come."""


class Answer:
    """The answer to one request for a stream, its redirects not followed.

    :param url: where it is asked for, ``http://`` or ``https://``.
    :param headers: the request's headers.
    :param timeout: how long to wait for the connection, for the head, and then for each chunk, in
        seconds.
    :raises StreamError: if the URL cannot be used.
    :raises ConnectionError: if there is no connection.
    :ivar status: the HTTP status.
    :ivar headers: the head's fields.
    :ivar version: the version of HTTP, 10 or 11.
    """

    def __init__(self, url: str, headers: Mapping[str, str | bytes], timeout: float) -> None:
        target = _split(url)
        kind = HTTPSConnection if target.scheme == "https" else HTTPConnection
        self.url = url
        self._connection = kind(str(target.hostname), target.port, timeout=timeout)
        try:
            self._connect()
            path = f"{target.path or '/'}{'?' if target.query else ''}{target.query}"
            self._connection.request("GET", quote(path, safe="/?&=%~:;,+@!$'()*"), None, headers)
            self._response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        self.status, self.version = self._response.status, self._response.version
        self.headers = self._response.headers

    def _connect(self) -> None:
        try:
            self._connection.connect()
        except OSError as error:
            raise ConnectionError(f"no connection: {error}") from error
        # http.client forgets it when it reads a head that says that the connection will close.
        self._socket = self._connection.sock

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()

    @property
    def location(self) -> str | None:
        """The URL that the answer sends to, if it does."""
        location = self.headers.get("Location")
        return urljoin(self.url, location) if self.status in _REDIRECTS and location else None

    @property
    def is_stream(self) -> bool:
        """Whether it is an event stream."""
        is_right = self.headers.get_content_type() == "text/event-stream"
        return self.status == 200 and is_right

    def chunk(self, timeout: float) -> bytes:
        """Return the next bytes, ``b""`` at the end; they have to come within some seconds."""
        self._socket.settimeout(max(0.001, timeout))
        return self._response.read1()

    def text(self) -> str:
        """Return the status in words, and how the body begins."""
        try:
            body = self._response.read(_TEXT_BYTES).decode("utf-8", "replace")
        except LOST:
            # The status says enough.
            body = ""
        return " ".join(f"{self.status} {self._response.reason} {body}".split())


def opened(url: str, headers: Mapping[str, str | bytes], timeout: float) -> Answer:
    """Return the answer to a request for a stream, its redirects followed.

    :param url: see :class:`Answer`; so are ``headers`` and ``timeout``.
    :raises StreamError: if the URL cannot be used, or there are too many redirects.
    :raises OSError: if there is no answer; what is raised is one of :data:`LOST`.
    """
    for _ in range(_MAX_REDIRECTS + 1):
        answer = Answer(url, headers, timeout)
        if answer.location is None:
            return answer
        answer.close()
        if _site(url) != _site(answer.location):
            headers = {name: value for name, value in headers.items() if name in _HARMLESS}
        url = answer.location
    raise StreamError(f"{url}: there are more than {_MAX_REDIRECTS} redirects")


def from_url(url: str, headers: Mapping[str, str]) -> Read:
    """Return what reads the stream of a URL.

    :param url: ``http://`` or ``https://``.
    :param headers: sent with each request, not after a redirect to another site.
    """

    def read(last_event_id: str) -> Iterator[bytes]:
        asked: dict[str, str | bytes] = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_event_id:
            # UTF-8, as the standard wants it; http.client would write Latin-1.
            asked["Last-Event-ID"] = last_event_id.encode()
        with opened(url, {**asked, **headers}, READ_TIMEOUT) as answer:
            _check_stream(answer)
            while chunk := answer.chunk(READ_TIMEOUT):
                yield chunk

    return read


def _check_stream(answer: Answer) -> None:
    if answer.status == 204:
        raise _Finished
    if answer.status >= 500:
        raise ConnectionError(answer.text())
    if not answer.is_stream:
        kind = answer.headers.get_content_type()
        raise StreamError(f"{answer.url} is no event stream, but {kind}: {answer.text()}")


def from_broker(broker: Broker, channels: tuple[str, ...]) -> Read:
    """Return what reads some channels through a broker."""

    def read(last_event_id: str) -> Iterator[bytes]:
        subscription = broker.subscribe(*channels, last_event_id=last_event_id or None)
        try:
            wire: bytes | None = subscription.start
            while wire is not None:
                if wire:
                    yield wire
                wire = subscription.take(_TAKE_SECONDS)
        finally:
            subscription.close()

    return read


def follow(
    read: Read,
    last_event_id: str,
    say: Callable[[str], object],
    sleep: Callable[[float], object] = time.sleep,
) -> Generator[tuple[bytes, list[ServerSentEvent]], None, None]:
    """Read a stream, connecting again as the standard says, until the server answers 204.

    :param read: :func:`from_url` or :func:`from_broker`.
    :param last_event_id: the cursor to begin with, or ``""``.
    :param say: is told, in words, why there is a pause.
    :param sleep: waits for some seconds.
    :returns: the bytes as they come, each with the events that they complete.
    :raises StreamError: if it is no stream.
    """
    retry, failures = _RETRY, 0
    while True:
        parser = EventStreamParser(last_event_id)
        try:
            for chunk in read(last_event_id):
                failures = 0
                yield chunk, parser.feed(chunk)
            reason = "The stream has ended"
        except _Finished:
            return
        except LOST as error:
            failures += 1
            reason = str(error) or type(error).__name__
        last_event_id = parser.last_event_id
        if parser.reconnection_time is not None:
            retry = parser.reconnection_time / 1000
        pause = pause_before(retry, failures)
        say(f"{reason.rstrip('.')}. Connecting again in {pause:g} s.")
        sleep(pause)


def pause_before(retry: float, failures: int) -> float:
    """Return how long to wait before the next attempt, in seconds.

    :param retry: what the stream asked for, in seconds.
    :param failures: how many attempts in a row have failed.
    """
    backed_off = min(LONGEST_PAUSE, max(1.0, retry) * 2 ** min(failures - 1, 5)) if failures else 0
    return min(max(_SHORTEST_PAUSE, retry, backed_off), threading.TIMEOUT_MAX)


def shown(text: str) -> str:
    """Return a text as a terminal may be sent it: what could steer the terminal is escaped."""
    return _UNFIT_TO_SHOW.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _split(url: str) -> SplitResult:
    hint = "use http://host/path or https://host/path, and --header for a user and a password"
    with suppress(ValueError):
        parts = urlsplit(url)
        str(parts.hostname).encode("idna")
        is_fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_fine and "@" not in parts.netloc:
            return parts
    # What stands before an @ may be a password, whatever it was taken for.
    name = "this URL" if "@" in url else url
    raise StreamError(f"{name} cannot be used; {hint}")


def _site(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
