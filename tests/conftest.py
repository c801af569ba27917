from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import httpx
import hypothesis
import pytest
from flask import Flask

from flask_eventstream import EventStream

from .browser import Visitor, chromium
from .redis_server import RedisServer, redis_server, valkey_program
from .servers import DEADLINE, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from flask.testing import FlaskClient
    from playwright.sync_api import Browser

# A shell has what it starts in the background ignore Ctrl-C, and so would the servers of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


# httpx gives a server 5 seconds, and a busy machine takes more to start one.
for phase in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, phase, DEADLINE)


# The same examples in every run, whatever the machine: by chance nothing fails, nor if it is slow.
# EVENTSTREAM_EXAMPLES=random has others, and remembers those that have failed.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile(os.environ.get("EVENTSTREAM_EXAMPLES", "fixed"))


if "COVERAGE_PROCESS_CONFIG" in os.environ:
    # gevent is traced in other processes only, and of the servers only in its own: see servers.py.
    del os.environ["COVERAGE_PROCESS_CONFIG"]
    os.environ["COVERAGE_PROCESS_START"] = str(ROOT / "tests" / "subprocesses.coveragerc")
    os.environ["COVERAGE_FILE"] = str(ROOT / ".coverage")


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for tests that do it no harm; each has prefixes of its own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which may break it or count its connections."""
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The same with Valkey, which has gone its own way since Redis 7.2."""
    with redis_server(tmp_path_factory.mktemp("valkey"), program=valkey_program()) as server:
        yield server


@pytest.fixture
def eventstream() -> EventStream:
    return EventStream("eventstream", __name__)


@pytest.fixture
def make_app(eventstream: EventStream) -> Callable[..., Flask]:
    """Return what makes an app; to be called once the test has added its views."""

    def make(**config: Any) -> Flask:
        app = Flask(__name__)
        app.config.update({f"EVENTSTREAM_{key}": value for key, value in config.items()})
        app.register_blueprint(eventstream)
        return app

    return make


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_visitor(browser: Browser) -> Iterator[Callable[[], Visitor]]:
    """Return what makes a visitor; none of their pages may have reported an error in the end."""
    visitors: list[Visitor] = []

    def new() -> Visitor:
        visitors.append(Visitor(browser))
        return visitors[-1]

    yield new
    for visitor in visitors:
        visitor.context.close()
        assert visitor.problems == []
