"""What a proxy does to a stream, as a client sees it: holds back, compresses, cuts."""

from __future__ import annotations

import time
from http.client import IncompleteRead
from typing import TYPE_CHECKING, NamedTuple

from .doctor import Finding
from .follow import LOST, Answer, StreamError, opened
from .parser import EventStreamParser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

AT_ONCE = 2.0
"""When the first bytes of a stream have to be there, in seconds."""

_CUT = "cut"
_ADVICE = {
    401: "give the rights that the app asks for: --token, or --header 'Cookie: …'",
    403: "let authorize() open the channel, or give the rights: --token, or --header 'Cookie: …'",
    404: "look where the blueprint is (flask routes), and what the proxy passes on",
    502: "the proxy does not reach the app: is it running, and is proxy_pass its address?",
    503: "all places are taken: raise LimitNOFILE or EVENTSTREAM_MAX_SUBSCRIBERS; or the proxy has "
    "no server left",
    504: "the app does not answer the proxy: generator streams hold all workers or threads",
}
_NO_STREAM = "give the URL of a stream, such as http://host/stream"
_HOLDS_BACK = (
    "a proxy holds events back: in nginx proxy_buffering off and proxy_http_version 1.1, and no "
    "proxy_ignore_headers X-Accel-Buffering; or no worker of the app is free"
)
_COMPRESSES = "a proxy compresses events: gzip off in nginx's location, or not text/event-stream"


class Silences(NamedTuple):
    """How a stream went on.

    :param longest: its longest silence, in seconds.
    :param last: how long the last silence was, up to its end, in seconds.
    :param seconds: how long it lasted.
    :param end: ``"cut"``, the type of its last event, or ``None`` if it goes on.
    """

    longest: float
    last: float
    seconds: float
    end: str | None


def margin(heartbeat: float) -> float:
    """Return how late a heartbeat may be, in seconds."""
    return max(0.5, heartbeat / 5)


def check_stream(
    url: str, headers: Mapping[str, str], heartbeat: float, idle: float | None
) -> Iterator[Finding]:
    """Connect to a stream of subscribers, stay for a while, and tell what is wrong with it.

    :param url: the stream's.
    :param headers: sent with the request.
    :param heartbeat: the app's, in seconds.
    :param idle: how long to stay, in seconds; by default long enough to see a heartbeat.
    """
    # What a browser asks for, so that a proxy that compresses does so.
    asked = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, br", **headers}
    begin = time.monotonic()
    try:
        with opened(url, asked, AT_ONCE) as answer:
            yield from _check_head(url, answer)
            if answer.is_stream:
                chunk = answer.chunk(begin + AT_ONCE - time.monotonic())
                seconds = time.monotonic() - begin
                yield Finding("ok", f"the first bytes came after {seconds:.2f} s")
                stay = heartbeat + 2 * margin(heartbeat) if idle is None else idle
                yield from _judge(_stay(answer, chunk, stay), heartbeat, stay)
    except TimeoutError:
        yield _why_nothing_came(url, headers)
    except (StreamError, *LOST) as error:
        yield Finding("fail", f"{url} cannot be read: {error}", "is this its URL, and does it run?")


def _check_head(url: str, answer: Answer) -> Iterator[Finding]:
    if answer.url != url:
        yield Finding("warn", f"{url} redirects to {answer.url}", "connect to that URL")
    kind = answer.headers.get_content_type()
    if answer.status != 200:
        advice = _ADVICE.get(answer.status, _NO_STREAM)
        yield Finding("fail", f"{answer.url} answers {answer.text()}", advice)
        return
    if not answer.is_stream:
        yield Finding("fail", f"{answer.url} is {kind}, and no event stream", _NO_STREAM)
        return
    yield Finding("ok", f"{answer.url} answers 200 with {kind}")
    if answer.version < 11:
        what = "the answer is HTTP/1.0: a broken stream looks like one that is complete"
        yield Finding("warn", what, "proxy_http_version 1.1 in nginx's location")
    encoding = answer.headers.get("Content-Encoding")
    if encoding:
        yield Finding("fail", f"the stream is compressed on the way ({encoding})", _COMPRESSES)


def _why_nothing_came(url: str, headers: Mapping[str, str]) -> Finding:
    what = f"nothing of the stream came within {AT_ONCE:g} s"
    try:
        with opened(url, {"Accept": "text/event-stream", **headers}, AT_ONCE) as answer:
            comes_plain = bool(answer.chunk(AT_ONCE))
    except (StreamError, *LOST):
        # As before: it is not the compression.
        comes_plain = False
    if comes_plain:
        return Finding("fail", f"{what}, unless no compression was asked for", _COMPRESSES)
    return Finding("fail", what, _HOLDS_BACK)


def _stay(answer: Answer, chunk: bytes, seconds: float) -> Silences:
    parser, end = EventStreamParser(), None
    begin = arrival = time.monotonic()
    longest = last = 0.0
    while chunk:
        try:
            for event in parser.feed(chunk):
                end = event.type
            chunk = answer.chunk(begin + seconds - time.monotonic())
        except TimeoutError:
            now = time.monotonic()
            return Silences(max(longest, now - arrival), now - arrival, now - begin, None)
        except (IncompleteRead, ConnectionError):
            chunk, end = b"", _CUT
        now = time.monotonic()
        longest, last, arrival = max(longest, now - arrival), now - arrival, now
    return Silences(longest, last, arrival - begin, end or "")


def _judge(found: Silences, heartbeat: float, stay: float) -> Iterator[Finding]:
    lasted = f"after {found.seconds:.1f} s, {found.last:.1f} s after its last byte"
    due = f"heartbeats are due every {heartbeat:g} s"
    if found.end == _CUT:
        cure = f"proxy_read_timeout in nginx must be more than EVENTSTREAM_HEARTBEAT, {heartbeat:g}"
        yield Finding("fail", f"the stream was cut {lasted}", cure)
    elif found.end == "end":
        cure = "give the URL of a stream of subscribers, to see heartbeats"
        yield Finding("warn", "the stream is complete, and has ended", cure)
    elif found.end is not None:
        cure = "the app or a proxy ends it: is the broker there, was the worker replaced?"
        yield Finding("fail", f"the stream ended {lasted}", cure)
    elif found.longest > heartbeat + margin(heartbeat):
        yield Finding("fail", f"{found.longest:.1f} s of silence, and {due}", _HOLDS_BACK)
    elif stay < heartbeat:
        what = f"the stream is open after {stay:g} s, but {due}"
        yield Finding("warn", what, f"stay longer: --idle {heartbeat + 2 * margin(heartbeat):g}")
    else:
        yield Finding("ok", f"{due}, and the longest silence was {found.longest:.1f} s")
