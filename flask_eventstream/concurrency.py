"""Threads or greenlets: whichever the caller runs on.

gevent is never imported here but where it runs already. With monkey patching the standard
library's names are gevent's own; without it (gevent.pywsgi as Flask's documentation starts it) a
thread that runs a gevent hub must not be blocked by a wait of the standard library.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)


class Event(Protocol):
    """What :class:`threading.Event` and gevent's have in common."""

    def set(self) -> Any:
        """Let everybody through who waits."""

    def clear(self) -> Any:
        """Make those wait who come from now on."""

    def is_set(self) -> bool:
        """Tell whether it is set."""

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until it is set, for ``timeout`` seconds at most."""


class Mutex(Protocol):
    """What the locks of the standard library and of the operating system have in common."""

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; tell whether that succeeded."""

    def release(self) -> None:
        """Give the lock back."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc_info: Any) -> Any: ...


class Waker:
    """Does a piece of work on a thread or greenlet of its own whenever somebody rings.

    However often it rings meanwhile, the work is done once more: whoever rings only sets a flag.

    :param work: called after each ring; once it returns ``False``, the thread ends.
    :ivar pause: after how many seconds without a ring it is called, too; never by default.
    """

    def __init__(self, work: Callable[[], bool]) -> None:
        self.pause: float | None = None
        self._work = work
        self._mutex = new_mutex()
        self._bell: Event | None = None

    def start(self) -> None:
        """Start the thread or greenlet, unless it runs already, with a first round of work.

        :raises RuntimeError: if no thread can be started; the next call tries again.
        """
        with self._mutex:
            if self._bell is not None:
                return
            self._bell = bell = new_event()
        bell.set()
        try:
            spawn(self._run, bell)
        except RuntimeError:
            self._bell = None
            raise

    def ring(self) -> None:
        """Ask for a round of work; without effect unless started."""
        bell = self._bell
        if bell is not None:
            bell.set()

    def _run(self, bell: Event) -> None:
        while True:
            bell.wait(self.pause)
            bell.clear()
            if not self._work() and self._is_over(bell):
                return

    def _is_over(self, bell: Event) -> bool:
        with self._mutex:
            # Who rang since the work was done counts on another round.
            if bell.is_set():
                return False
            self._bell = None
            return True


class Progress:
    """Lets threads or greenlets wait until something is the case."""

    def __init__(self) -> None:
        self._waiting: set[Event] = set()

    def notify(self) -> None:
        """Have all who wait look again."""
        for ready in tuple(self._waiting):
            ready.set()

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until a condition holds; tell whether it did within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        ready = new_event()
        self._waiting.add(ready)
        try:
            while not condition():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                ready.wait(remaining)
                ready.clear()
            return True
        finally:
            self._waiting.discard(ready)


class Errands:
    """Does what others need not wait for, one after another, on a thread or greenlet of its own."""

    def __init__(self) -> None:
        self._left: deque[Callable[[], object]] = deque()
        self._waker = Waker(self._run_all)

    def add(self, errand: Callable[[], object]) -> None:
        """Have a function called after the next :meth:`start`. If it fails, that is logged."""
        self._left.append(errand)

    def start(self) -> None:
        """Have done what was added. Not once for each of many: it may take a new thread."""
        if not self._left:
            return
        try:
            self._waker.start()
        except RuntimeError:
            # For want of threads, or since the interpreter ends (3.12 starts none then): better
            # here than never.
            self._run_all()
        self._waker.ring()

    def _run_all(self) -> bool:
        while self._left:
            errand = self._left.popleft()
            try:
                errand()
            except Exception:
                _logger.exception("What was left to do failed: %r", errand)
        return False


def new_event() -> Event:
    """Return an event whose ``wait`` lets others run, and that any thread may set."""
    if runs_in_greenlet():
        event: Event = importlib.import_module("gevent.event").Event()
        return event
    return threading.Event()


def spawn(function: Callable[..., object], *args: object) -> None:
    """Run a function on its own daemon thread, or on a greenlet where gevent runs."""
    if runs_in_greenlet():
        sys.modules["gevent"].spawn(function, *args)
    else:
        threading.Thread(target=function, args=args, daemon=True).start()


def new_mutex() -> Mutex:
    """Return a lock of the operating system's, for sections that neither wait nor switch.

    A section that never switches to another greenlet can only be contended by another thread, and
    then it is a lock between threads that is needed, even in a monkey-patched process.
    """
    mutex: Mutex = original("_thread", "allocate_lock")()
    return mutex


def original(module: str, name: str) -> Any:
    """Return what a module of the standard library had under a name before monkey patching."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(importlib.import_module(module), name)
    return monkey.get_original(module, name)


def wait_readable(descriptor: int, timeout: float) -> None:
    """Let other greenlets run until a file descriptor is readable, or the time is over (seconds).

    Only for greenlets: a thread has system calls that wait.
    """
    late = TimeoutError()
    try:
        importlib.import_module("gevent.socket").wait_read(descriptor, timeout, late)
    except TimeoutError as error:
        if error is not late:
            raise


def current_greenlet() -> Any:
    """Return the greenlet that runs the caller; ``None`` for a thread without gevent."""
    return sys.modules["gevent.hub"].getcurrent() if runs_in_greenlet() else None


def runs_in_event_loop() -> bool:
    """Tell whether an event loop of asyncio, which has the thread for itself, runs the caller."""
    loops = sys.modules.get("asyncio.events")
    # asyncio takes a loop of one greenlet for that of all.
    is_known = loops is not None and not runs_in_greenlet()
    return is_known and loops._get_running_loop() is not None  # type: ignore[union-attr]


def ends_thread(error: BaseException) -> bool:
    """Tell whether an error is meant to end a thread, a greenlet or the process.

    Every other one is a failure, whatever its class: ``gevent.Timeout`` is no ``Exception``.
    """
    if isinstance(error, (GeneratorExit, KeyboardInterrupt, SystemExit)):
        return True
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def throw_into(greenlet: Any, error: BaseException, is_wanted: Callable[[], bool]) -> None:
    """Raise an error where a greenlet waits, if that is still wanted when its turn comes."""

    def throw() -> None:
        # In gevent's own hub, where nobody else runs between the look and the throw.
        if is_wanted():
            greenlet.throw(error)

    sys.modules["gevent.hub"].get_hub().loop.run_callback(throw)


def look_until(condition: Callable[[], object], seconds: float, *, in_greenlet: bool) -> None:
    """Wait until a condition holds, by looking again and again, for some seconds at most.

    For the end of a process, when neither threads nor greenlets can be relied on to wake anybody.

    :param in_greenlet: whether those are greenlets who are to make it hold.
    """
    pause = switch if in_greenlet else original("time", "sleep")
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        pause(0.001)


def switch(seconds: float = 0) -> None:
    """Let other greenlets run, for some seconds, or those that are ready.

    Only for greenlets: threads take turns anyway.
    """
    sys.modules["gevent"].sleep(seconds)


def call_after_fork(method: Callable[[], None]) -> None:
    """Call a bound method in every child process that is forked from now on.

    Such a hook can never be taken back; this one does not keep the method's object alive.
    """
    os.register_at_fork(after_in_child=_if_alive(method))


def hold_through_forks(mutex: Mutex) -> None:
    """Have processes forked only while nobody else holds a mutex, so that the child's is free.

    So nobody is in the middle of what it protects, other locks included, which the child could
    never take. Such a hook can never be taken back.
    """
    os.register_at_fork(
        before=mutex.acquire, after_in_parent=mutex.release, after_in_child=mutex.release
    )


def call_at_exit(method: Callable[[], None]) -> None:
    """Call a bound method when the interpreter ends, if its object is still alive."""
    atexit.register(_if_alive(method))


def call_before_threads_are_joined(method: Callable[[], None]) -> None:
    """Call a bound method when the interpreter is about to wait for its threads, if it can be told.

    What :mod:`atexit` has is called after that.
    """
    # Private, and there since 3.9; an interpreter that ends already takes no more.
    with suppress(AttributeError, RuntimeError):
        threading._register_atexit(_if_alive(method))  # type: ignore[attr-defined]


def _if_alive(method: Callable[[], None]) -> Callable[[], None]:
    reference = weakref.WeakMethod(method)

    def call_if_alive() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call_if_alive


def runs_in_greenlet() -> bool:
    """Tell whether a gevent hub runs the caller."""
    gevent = sys.modules.get("gevent.hub")
    return gevent is not None and isinstance(gevent.getcurrent().parent, gevent.Hub)
