from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.brokers import new_broker
from flask_eventstream.config import Config
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.redis_broker import RedisBroker

from .servers import ROOT

if TYPE_CHECKING:
    from .redis_server import RedisServer


def test_the_process_itself_is_the_default() -> None:
    assert isinstance(new_broker(Config(max_event_bytes=7)), MemoryBroker)
    assert new_broker(Config(max_event_bytes=7)).max_event_bytes == 7


def test_a_url_of_redis_is_a_broker_of_many_processes(redis: RedisServer) -> None:
    prefix = redis.prefix()
    broker = new_broker(Config(broker_url=redis.url, key_prefix=prefix, max_event_bytes=100))
    assert isinstance(broker, RedisBroker)
    assert broker.max_event_bytes == 100
    broker.publish("x")
    assert redis.redis.exists(f"{prefix}0:state")
    broker.close()


@pytest.mark.parametrize("url", ["amqp://user:secret@x", "redis:x", "", "memory"])
def test_another_url_is_an_error_that_names_the_key(url: str) -> None:
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_BROKER_URL=") as caught:
        new_broker(Config(broker_url=url))
    assert "secret" not in str(caught.value)


def test_a_url_that_redis_py_cannot_use_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_BROKER_URL='redis://…'") as caught:
        new_broker(Config(broker_url="redis://:secret@x:y"))
    assert "secret" not in str(caught.value)


def without(module: str, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run a program where a module cannot be imported."""
    program = "\n".join(["import sys", f"sys.modules[{module!r}] = None", *lines])
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


MAKE = (
    "from flask_eventstream.brokers import new_broker",
    "from flask_eventstream.config import Config",
)


def test_only_who_uses_redis_needs_its_client() -> None:
    made = without("redis", *MAKE, "new_broker(Config())", "print('made')")
    assert (made.stdout, made.stderr) == ("made\n", "")
    made = without("redis", *MAKE, "new_broker(Config(broker_url='redis://x'))")
    assert "pip install 'flask-eventstream[redis]'" in made.stderr.splitlines()[-1]


def test_another_module_that_is_missing_is_named_as_it_is() -> None:
    name = "flask_eventstream.redis_feeds"
    made = without(name, *MAKE, "new_broker(Config(broker_url='redis://x'))")
    assert name in made.stderr.splitlines()[-1]
    assert "pip install" not in made.stderr
