"""The client's socket out of a WSGI server, which goes on as if nothing had happened.

WSGI has no way to hand a socket over. So the server gets one end of a pair of sockets in its place,
under the same file descriptor, and writes its head and the first bytes of the body into that. They
are read from the other end and go to the client over its own socket; the server reads the end of
its connection, logs, and closes what it has. It is the server that makes the head, whatever its
version and its settings, and middleware sees a normal response.

The connection ends with the stream, and the head says so, whatever the server wrote: a client that
keeps connections must not send its next request on one that closes (RFC 9112, section 9.6). So
nothing is lost with what came behind the request's head, a body that nobody has read or another
request: the server forgets it, as it has to behind such a head.

Whatever is not exactly as expected is given back: then the server has its client's socket again,
and sends the response as any other.
"""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from . import concurrency, descriptors
from .subscriber import framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAX_HEAD_BYTES = 64 * 1024
"""How large a head may be. It has to fit into the pair, with the first bytes of the body, since
nobody reads while the server writes. On Linux a pair holds 208 KiB."""

_READ_BYTES = 256 * 1024
_OF_CONNECTIONS = (b"", b"close", b"keep-alive", b"proxy-connection", b"upgrade")
"""The fields, and the options of a connection, that say how it goes on."""

_FOLDED = re.compile(rb"\r\n[ \t]+")


class ServerSocket(NamedTuple):
    """The socket of a client, as a server has it.

    :ivar socket: the server's own object.
    :ivar forget_rest: has the server take the request for read to its end, and forget what it has
        read behind that. Only once it reads from the client no more.
    """

    socket: socket.socket
    forget_rest: Callable[[], object]


class Hijacked(NamedTuple):
    """The socket of a client, as it is ours.

    :ivar descriptor: its file descriptor.
    :ivar head: what the server wrote, which has to be sent: the head and the first bytes.
    :ivar is_chunked: whether the server said that the body comes in chunks.
    """

    descriptor: int
    head: bytes
    is_chunked: bool


def server_socket(environ: Mapping[str, Any]) -> ServerSocket | None:
    """Return the socket of a request's client, if it can be taken out of the server.

    That is not so where it carries TLS or HTTP/2, for HEAD, and for a server that is not known.
    Nothing else that a client chooses matters.

    :param environ: the WSGI environment.
    """
    # Servers take a client's HTTP/1.9 for 1.1 (RFC 9110, section 6.2).
    is_known = str(environ.get("SERVER_PROTOCOL")).startswith("HTTP/1.")
    if not (descriptors.IS_AVAILABLE and is_known) or environ.get("REQUEST_METHOD") == "HEAD":
        return None
    try:
        found = _found_in(environ, environ.get("wsgi.input"))
    except AttributeError:
        # Another version of a server than those that are known, or middleware around its input.
        return None
    return found if found is not None and _is_plain(found.socket) else None


def cutter(environ: Mapping[str, Any]) -> Callable[[], None] | None:
    """Return what cuts the connection of a request, from any thread, if its server is known."""
    found = _socket_in(environ) if descriptors.IS_AVAILABLE else None
    if found is None:
        return None
    # By its descriptor as it is then, -1 once it is closed. gevent's own shutdown() would have who
    # waits for it fail with an error that its servers log.
    return lambda: descriptors.cut(found.fileno())


def prepare(environ: Mapping[str, Any], timeout: float, patience: float | None) -> None:
    """Bound what the kernel does for the client of a request, if its server is known.

    :param environ: the WSGI environment.
    :param timeout: see :func:`descriptors.prepare`, as for ``patience``.
    """
    found = _socket_in(environ) if descriptors.IS_AVAILABLE else None
    if found is not None:
        descriptors.prepare(found.fileno(), timeout, patience)


def _socket_in(environ: Mapping[str, Any]) -> Any:
    for key in ("gunicorn.socket", "werkzeug.socket"):
        if key in environ:
            return environ[key]
    body = environ.get("wsgi.input")
    if body.__class__.__module__ != "gevent.pywsgi":
        return None
    return getattr(getattr(getattr(body, "rfile", None), "raw", None), "_sock", None)


def _found_in(environ: Mapping[str, Any], body: Any) -> ServerSocket | None:
    found = _socket_in(environ)
    if found is None:
        return None
    if "gunicorn.socket" in environ:
        # The sync worker closes each connection, and so never reads on.
        reads_on = environ.get("wsgi.multithread")
        return ServerSocket(found, _forgetter_in_gunicorn(body.reader) if reads_on else bool)
    if "werkzeug.socket" in environ:
        # It closes each connection too. With processes, the one that serves this request ends now.
        return None if environ.get("wsgi.multiprocess") else ServerSocket(found, bool)
    return ServerSocket(found, partial(_forget_in_pywsgi, body, body.rfile.peek, body.rfile.read1))


def _forgetter_in_gunicorn(reader: Any) -> Callable[[], None]:
    # A reader of chunks has only the request.
    unreader = getattr(reader, "unreader", None) or reader.req.unreader

    def forget() -> None:
        # Of the two, a reader looks at one.
        reader.length, reader.parser = 0, None
        unreader.buf = io.BytesIO()

    return forget


def _forget_in_pywsgi(
    body: Any, peek: Callable[[int], bytes], read: Callable[[int], bytes]
) -> None:
    # For a body in chunks, that the last one was the current one.
    body.content_length = body.chunk_length = 0
    while ahead := peek(1):
        read(len(ahead))


def _is_plain(found: socket.socket) -> bool:
    # Not a subclass, as those are that speak TLS.
    of_gevent = getattr(sys.modules.get("gevent.socket"), "socket", None)
    return found.__class__ in (socket.socket, concurrency.original("socket", "socket"), of_gevent)


class HijackingBody:
    """A WSGI response body that takes the client's socket out of the server on its way.

    Its first item leaves by the server, and with it the head. Then it ends, for the server, and
    somebody else has the socket. If that fails, it goes on with the items that are left.

    :param server: the socket as the server has it.
    :param body: the body to send; its first item is small.
    :param hand_over: takes the client's socket, with what has to be sent first. If it raises, it
        has not taken it; what is raised once it has, it returns.
    :param close: called at the end, once, unless the socket was handed over.
    :param then: called once the socket is taken.
    """

    def __init__(
        self,
        server: ServerSocket,
        body: Iterator[bytes],
        hand_over: Callable[[Hijacked], BaseException | None],
        close: Callable[[], None],
        then: Callable[[], object],
    ) -> None:
        self._server = server
        self._body = body
        self._hand_over = hand_over
        self._then = then
        self._close = close
        self._first = b""
        self._pair: _Pair | None = None
        self._is_over = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._first:
            self._first = next(self._body)
            self._pair = _Pair(self._server.socket)
            if not self._pair.put_in_place():
                self._pair = None
            return self._first
        if self._pair is not None and not self._is_over:
            self._hijack(self._pair)
        if self._is_over:
            raise StopIteration
        return next(self._body)

    def _hijack(self, pair: _Pair) -> None:
        written = pair.written()
        is_chunked = _is_chunked(written, self._first)
        if is_chunked is None:
            pair.give_back(written)
            self._pair = None
        else:
            # The server still writes a last chunk, and middleware that is a generator may have
            # closed this before, and let it go.
            weakref.finalize(pair.server, pair.ours.close).atexit = False
            self._server.forget_rest()
            self._give_away(pair.client, closing(written), is_chunked)

    def _give_away(self, client: socket.socket, head: bytes, is_chunked: bool) -> None:
        hijacked = Hijacked(client.fileno(), head, is_chunked)
        try:
            self._is_over = True
            # The number must never be closed by two, or the second one closes a connection that has
            # got it meanwhile. So it has no object any more when somebody else gets it.
            client.detach()
            error = self._hand_over(hijacked)
        except BaseException:
            self._is_over = False
            if client.fileno() < 0:
                descriptors.close(hijacked.descriptor)
            raise
        if error is not None:
            raise error
        self._then()

    def close(self) -> None:
        """Close the response, unless its stream goes on elsewhere."""
        if self._is_over:
            return
        self._is_over = True
        if self._pair is not None:
            self._pair.close()
        self._close()


class _Pair:
    # The client's socket, and what is in its place.
    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self._own = ExitStack()

    def put_in_place(self) -> bool:
        try:
            self.client = self._own.enter_context(self.server.dup())
            self.ours, theirs = map(self._own.enter_context, socket.socketpair())
        except OSError:
            # No descriptors are left. The response goes on without.
            self.close()
            return False
        # The server reads the end of its connection from the start, and never waits.
        self.ours.shutdown(socket.SHUT_WR)
        self.ours.setblocking(False)
        descriptor = self.server.fileno()
        os.set_blocking(theirs.fileno(), os.get_blocking(descriptor))
        os.dup2(theirs.fileno(), descriptor, inheritable=False)
        theirs.close()
        return True

    def written(self) -> bytes:
        written = b""
        with suppress(BlockingIOError):
            while part := self.ours.recv(_READ_BYTES):
                written += part
        return written

    def give_back(self, written: bytes) -> None:
        os.dup2(self.client.fileno(), self.server.fileno(), inheritable=False)
        self.close()
        self.server.sendall(written)

    def close(self) -> None:
        self._own.close()


def _is_chunked(written: bytes, first: bytes) -> bool | None:
    """Tell whether the server sends chunks; ``None`` if it does not send just the first bytes."""
    head, _, body = written.partition(b"\r\n\r\n")
    fields = dict(field.partition(b":")[::2] for field in head.lower().split(b"\r\n")[1:])
    if b"content-encoding" in fields or b"content-length" in fields:
        return None
    if b"transfer-encoding" not in fields:
        return False if body == first else None
    return True if body.lower() == framed(first, True).lower() else None


def closing(written: bytes) -> bytes:
    """Return an answer whose head says that the connection ends with it.

    :param written: the answer as a server wrote it, with its whole head. Other options of the
        connection stay, since they name fields that go no further than the next proxy.
    """
    head, blank, body = written.partition(b"\r\n\r\n")
    status, *fields = _FOLDED.sub(b" ", head).split(b"\r\n")
    kept, options = [status], [b"close"]
    for field in fields:
        name, _, value = field.partition(b":")
        if (name := name.strip().lower()) == b"connection":
            options += filter(_may_stay, map(bytes.strip, value.split(b",")))
        elif _may_stay(name):
            kept.append(field)
    kept.append(b"Connection: " + b", ".join(options))
    return b"\r\n".join(kept) + blank + body


def _may_stay(name: bytes) -> bool:
    return name.lower() not in _OF_CONNECTIONS
