"""The threads of a server, of which subscribers may take a half where the hub is to serve them.

What the hub cannot take (TLS, HTTP/2, a coding of the content, middleware that changes the body) is
iterated, and holds a thread for as long as the client likes. With all threads gone nobody would be
answered any more.
"""

from __future__ import annotations

import logging
import weakref

from . import concurrency, shutdown

_logger = logging.getLogger(__name__)
_OF_THREADS = ("gunicorn.workers.sync", "gunicorn.workers.gthread")


class Threads:
    """The threads of this process in which streams of subscribers are iterated.

    On one that is known to have few: gunicorn's ``gthread`` and ``sync``. A greenlet costs little,
    and other servers have no hub.
    """

    def __init__(self) -> None:
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        self._has_warned = False
        self._mutex = concurrency.new_mutex()
        self._streams: weakref.WeakSet[object] = weakref.WeakSet()
        self._borrowers: weakref.WeakSet[object] = weakref.WeakSet()

    def take(self, stream: object) -> bool:
        """Tell whether a stream may have one for as long as it lasts, see :meth:`release`."""
        limit = _limit()
        with self._mutex:
            is_free = limit is None or len(self._streams) < limit
            if is_free:
                self._streams.add(stream)
        if not (is_free or self._has_warned):
            self._has_warned = True
            _logger.warning(
                "The hub cannot take subscribers' sockets here (TLS or HTTP/2 in the server, or "
                "middleware that changes the body), and they have %s of the server's threads, the "
                "most they may. Others get what there is and have to return. Use a proxy for TLS, "
                "more threads, or the worker class gevent.",
                limit,
            )
        return is_free

    def lend(self, stream: object) -> bool:
        """Tell whether a stream without a thread may have one for an item that is large, once.

        One stream at a time may: a client that does not read makes the server wait. And one has to:
        a client whose next event is large would never get it, nor anything that comes after it.
        """
        with self._mutex:
            is_free = not self._borrowers
            if is_free:
                self._borrowers.add(stream)
        return is_free

    def release(self, stream: object) -> None:
        """Give the thread of a stream back, if it has one; from any thread."""
        # Not under the mutex, since the garbage collector may do it at any point.
        self._streams.discard(stream)
        self._borrowers.discard(stream)


def _limit() -> int | None:
    worker = shutdown.gunicorn_worker()
    if not any(kind.__module__ in _OF_THREADS for kind in type(worker).__mro__):
        return None
    threads: int = worker.cfg.threads
    return threads // 2
