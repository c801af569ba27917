"""The client's socket out of a WSGI server, which goes on as if nothing had happened.

WSGI has no way to hand a socket over. So the server gets one end of a pair of sockets in its place,
under the same file descriptor, and writes its head and the first bytes of the body into that. They
are read from the other end and go to the client over its own socket; the server reads the end of
its connection, logs, and closes what it has. It is the server that makes the head, whatever its
version and its settings, and middleware sees a normal response.

Whatever is not exactly as expected is given back: then the server has its client's socket again,
and sends the response as any other.
"""

from __future__ import annotations

import os
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


class ServerSocket(NamedTuple):
    """The socket of a client, as a server has it.

    :ivar socket: the server's own object.
    :ivar read_ahead: returns what the server has read behind the request; it may read on.
    """

    socket: socket.socket
    read_ahead: Callable[[], bytes]


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

    That is not so where it carries TLS or HTTP/2, for HEAD, for a server that is not known, and
    where the request's body was not read to its end by a server that would read on.

    :param environ: the WSGI environment.
    """
    is_known = environ.get("SERVER_PROTOCOL") in ("HTTP/1.0", "HTTP/1.1")
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


def probe(environ: Mapping[str, Any], patience: float) -> None:
    """Have the kernel give up the silent client of a request, if its server is known.

    :param environ: the WSGI environment.
    :param patience: see :func:`descriptors.probe`.
    """
    found = _socket_in(environ) if descriptors.IS_AVAILABLE else None
    if found is not None:
        descriptors.probe(found.fileno(), patience)


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
        if not environ.get("wsgi.multithread"):
            # The sync worker closes each connection, and so never reads on. To iterate would keep
            # everybody else waiting, until gunicorn kills the worker with all its streams.
            return ServerSocket(found, bytes)
        if body.reader.length:
            return None
        return ServerSocket(found, body.reader.unreader.buf.getvalue)
    if "werkzeug.socket" in environ:
        # It closes each connection too. With processes, the one that serves this request ends now.
        return None if environ.get("wsgi.multiprocess") else ServerSocket(found, bytes)
    if body.chunked_input or body.position < (body.content_length or 0):
        return None
    return ServerSocket(found, partial(body.rfile.peek, 1))


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
    :param hand_over: takes the client's socket, with what has to be sent first.
    :param close: called at the end, unless the socket was handed over.
    """

    def __init__(
        self,
        server: ServerSocket,
        body: Iterator[bytes],
        hand_over: Callable[[Hijacked], None],
        close: Callable[[], None],
    ) -> None:
        self._server = server
        self._body = body
        self._hand_over = hand_over
        self._close = close
        self._first = b""
        self._pair: _Pair | None = None
        self._is_handed_over = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._first:
            self._first = next(self._body)
            self._pair = _Pair.put_in_place_of(self._server)
            return self._first
        if self._pair is not None and not self._is_handed_over:
            self._hijack(self._pair)
        if self._is_handed_over:
            raise StopIteration
        return next(self._body)

    def _hijack(self, pair: _Pair) -> None:
        written = pair.written()
        is_chunked = _is_chunked(written, self._first)
        if is_chunked is None:
            pair.give_back(written)
            self._pair = None
        else:
            self._hand_over(Hijacked(pair.client.fileno(), written, is_chunked))
            # Only now it is somebody else's. If that failed, close() closes it.
            pair.client.detach()
            self._is_handed_over = True
            # The server still writes a last chunk, and middleware that is a generator may have
            # closed this before, and let it go.
            weakref.finalize(pair.server, pair.ours.close).atexit = False

    def close(self) -> None:
        """Close the response, unless its stream goes on elsewhere."""
        if self._is_handed_over:
            return
        if self._pair is not None:
            self._pair.close()
        self._close()


class _Pair(NamedTuple):
    server: socket.socket
    client: socket.socket
    ours: socket.socket

    @classmethod
    def put_in_place_of(cls, server: ServerSocket) -> _Pair | None:
        with ExitStack() as unless_done:
            try:
                client = unless_done.enter_context(server.socket.dup())
                ours, theirs = map(unless_done.enter_context, socket.socketpair())
            except OSError:
                # No descriptors are left. The response goes on without.
                return None
            # The server reads the end of its connection from the start, and never waits.
            ours.shutdown(socket.SHUT_WR)
            ours.setblocking(False)
            descriptor = server.socket.fileno()
            os.set_blocking(theirs.fileno(), os.get_blocking(descriptor))
            os.dup2(theirs.fileno(), descriptor, inheritable=False)
            theirs.close()
            unless_done.pop_all()
        pair = cls(server.socket, client, ours)
        if not server.read_ahead():
            return pair
        # A request that came with this one would be run, and its answer lost.
        pair.give_back(b"")
        return None

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
        self.client.close()
        self.ours.close()


def _is_chunked(written: bytes, first: bytes) -> bool | None:
    """Tell whether the server sends chunks; ``None`` if it does not send just the first bytes."""
    head, _, body = written.partition(b"\r\n\r\n")
    fields = dict(field.partition(b":")[::2] for field in head.lower().split(b"\r\n")[1:])
    if b"content-encoding" in fields or b"content-length" in fields:
        return None
    if b"transfer-encoding" not in fields:
        return False if body == first else None
    return True if body.lower() == framed(first, True).lower() else None
