"""Real servers on free ports of loopback, each started and stopped by the test that needs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    T = TypeVar("T")

ROOT = Path(__file__).parent.parent
DEADLINE = 60.0
"""For what is about to happen, in seconds: so long that only what never happens takes longer."""

# Below those that the kernel gives to connections, which begin at 32768.
_FIRST_PORT, _PORTS_OF_A_PROCESS, _PROCESSES = 16_384, 256, 64


def wait_for(condition: Callable[[], T], timeout: float = DEADLINE, what: str = "") -> T:
    """Return the first true value of a condition; fail if there is none in time (seconds)."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(
                f"not within {timeout} s: {what or condition}, the last value was {value!r}"
            )
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return a port that nobody has, and that nobody is given before the server listens.

    Not one that the kernel chooses: it gives those to connections, too, and may give one twice.
    """
    return next(port for port in _ports if _is_free(port))


def _own_ports() -> Iterator[int]:
    """Yield the ports of this process, over and over again. No other process of tests has them.

    The name of a Unix socket says whose they are. The kernel gives it to one process only, and
    takes it back when that ends, in whatever way.
    """
    with socket.socket(socket.AF_UNIX) as owner:
        number = next(n for n in range(_PROCESSES) if _has_bound(owner, f"\0eventstream-test-{n}"))
        first = _FIRST_PORT + number * _PORTS_OF_A_PROCESS
        yield from cycle(range(first, first + _PORTS_OF_A_PROCESS))


def _has_bound(owner: socket.socket, name: str) -> bool:
    with suppress(OSError):
        owner.bind(name)
        return True
    return False


_ports = _own_ports()


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def system_part(*names: str) -> str:
    """Return the path of a program that the system has to bring; without it, skip the test."""
    for name in names:
        found = shutil.which(name) or shutil.which(f"/usr/sbin/{name}")
        if found:
            return found
    return skip_unless_ci(f"needs {' or '.join(names)}, which 'make test' installs where it can")


def skip_unless_ci(reason: str) -> str:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def traced(command: list[str]) -> dict[str, str]:
    """Return what has coverage trace the greenlets of a command only if it is one of gevent.

    While they are traced, each thread that ends has a greenlet to dispose of, and if two end at
    once, CPython 3.11 may go round in circles for ever: it looks for what is pending while it does
    what is pending.
    """
    has_greenlets = any("gevent" in part or "pywsgi" in part for part in command)
    return {} if has_greenlets else {"EVENTSTREAM_TRACED": "thread"}


class Server:
    """A process that listens on a port."""

    def __init__(self, command: list[str], port: int, environ: dict[str, str] | None = None):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._command = command
        self._environ = {**os.environ, **traced(command), **(environ or {})}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # close() closes it
        try:
            self.start()
        except BaseException:
            # Nobody has it who could. Left to the garbage collector, it would fail another test.
            Server.close(self)
            raise

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environ, stdout=self._log, stderr=self._log
        )
        wait_for(self._listens, what=f"{self._command[0]} to listen on {self.port}")

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"{self._command} ended: {self.log()}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        # Read through a descriptor of its own: the process writes at the shared one's offset.
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self, timeout: float = DEADLINE) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.stop()
        self._log.close()


@contextmanager
def running(
    command: list[str], port: int, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    server = Server(command, port, environ)
    try:
        yield server
    finally:
        server.close()


def gunicorn(app: str, worker_class: str, *options: str, port: int = 0) -> list[str]:
    """Return the command that serves an app (``"module:callable"``) with one worker."""
    return [
        sys.executable, "-m", "gunicorn", "-k", worker_class, "-b", f"127.0.0.1:{port}",
        "--graceful-timeout", "30", "--log-level", "warning", *options, app,
    ]  # fmt: skip


@contextmanager
def serving(
    app: str, worker_class: str, *options: str, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve an app with gunicorn and one of its worker classes, as long as the block runs."""
    port = free_port()
    with running(gunicorn(app, worker_class, *options, port=port), port, environ) as server:
        yield server


@contextmanager
def standing_still(process: int) -> Iterator[None]:
    """Have a process do nothing meanwhile; clients that connect get another one."""
    os.kill(process, signal.SIGSTOP)
    try:
        wait_for(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][1] == "T")
        yield
    finally:
        os.kill(process, signal.SIGCONT)
