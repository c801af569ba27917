"""Whatever a broker's URL is, what is shown, logged and raised has nothing of its password."""

from __future__ import annotations

import logging
import socket
import threading
import traceback
from contextlib import closing, contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_eventstream import EventStream, ServerSentEvent, doctor
from flask_eventstream.cli import commands
from flask_eventstream.config import Config, without_secrets
from flask_eventstream.errors import BrokerUnavailableError, ConfigurationError
from flask_eventstream.flask_sse import ServerSentEventsBlueprint
from flask_eventstream.flask_sse_bridge import Bridge
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.redis_link import RedisLink

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1:1"
"""Where nobody answers, which is found out at once."""

SHAPES = [
    f"redis://:{{}}@{HOST}",
    f"redis://{{}}@{HOST}",
    f"redis://{{}}:x@{HOST}",
    f"redis://user:{{}}@{HOST}/0",
    f"rediss://user:{{}}@{HOST}/0?db=1",
    f"redis://user:{{}}@{HOST}/0?pass=1&{{}}=1",
    f"redis://{HOST}?password={{}}",
    f"redis://{HOST}?password={{}}&socket_timeout={{}}",
    f"redis:/user:{{}}@{HOST}",
    f"redis:user:{{}}@{HOST}",
    f"redis//user:{{}}@{HOST}",
    f"://user:{{}}@{HOST}",
    f":{{}}@{HOST}",
    f"{{}}@{HOST}",
    f" redis://:{{}}@{HOST}",
    f"REDIS://:{{}}@{HOST}",
    f"amqp://:{{}}@{HOST}",
    "redis://:{}@127.0.0.1:port",
    "redis://:{}@127.0.0.1:99999",
    "redis://:{}@127.0.0.1:1:1",
    "redis://:{}@[127.0.0.1",
    "unix://user:{}@/nowhere",
    "unix://{}/nowhere@",
    "unix:///nowhere?password={}",
    "unix:/user:{}@/nowhere",
    "memory://:{}@",
]

letters = "QXZJK"
passwords = st.text(f"{letters}7/?#@:%[]&=.+ \\\t\né℀／\udc80", min_size=4, max_size=20)


def parts(password: str) -> set[str]:
    """Return what must not be seen: all of four characters, but for what may be by chance."""
    found = {password[n : n + 4] for n in range(len(password) - 3)}
    return {part for part in found if any(letter in part for letter in letters)}


def text_of(error: BaseException) -> str:
    whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return f"{error} {error!r} {vars(error)} {error.__cause__!r} {whole}"


class Seen:
    """What an app with a URL shows, by every way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.texts = [without_secrets(url), repr(Config(broker_url=url))]
        self._by(self._event_stream)
        self._by(self._flask_sse)
        self._by(lambda: RedisBroker(url).close())

    def _by(self, way: Any) -> None:
        log = StringIO()
        handler = logging.StreamHandler(log)
        logging.getLogger().addHandler(handler)
        try:
            way()
        except (ConfigurationError, KeyError) as error:
            self.texts.append(text_of(error))
        finally:
            logging.getLogger().removeHandler(handler)
        self.texts.append(log.getvalue())

    def _event_stream(self) -> None:
        app, eventstream = Flask("app"), EventStream("eventstream", __name__)
        app.config["EVENTSTREAM_BROKER_URL"] = self.url
        app.register_blueprint(eventstream)
        state = app.extensions["eventstream"]
        app.add_url_rule("/health", view_func=eventstream.health)
        app.add_url_rule("/ping", view_func=state.broker.ping)
        client = app.test_client()
        self.texts += [client.get(path).text for path in ("/health", "/ping")]
        self.texts += [repr(state), repr(state.broker), repr(state.config)]
        self.texts += map(repr, doctor.check_broker(state.broker, state.config))
        self.texts.append(app.test_cli_runner().invoke(commands, ["doctor"]).output)
        state.broker.close()

    def _flask_sse(self) -> None:
        app, sse = Flask("app"), ServerSentEventsBlueprint("sse", __name__)
        app.config["REDIS_URL"] = self.url
        try:
            app.register_blueprint(sse)
        except ConfigurationError as error:
            self.texts.append(text_of(error))
            app.extensions.pop("eventstream", None)
        with app.app_context():
            sse.redis.close()


@pytest.mark.parametrize("shape", SHAPES)
@settings(derandomize=True, deadline=None, max_examples=8)
@given(password=passwords)
@example("QXZJ/KKKK")
@example("QXZJ?KKKK")
@example("QXZJ?KKKK=JJJJ")
@example("QXZJ#KKKK")
@example("QXZJ@KKKK")
@example("QXZJ/KKKK@JJJJ")
@example("7777/QXZJ")
@example("QX%ZJ%4")
@example("QXZJ℀KKKK")
@example("QXZJ\udc80KKKK")
@example("QXZJ://KKKK")
def test_no_part_of_a_password_is_seen(shape: str, password: str) -> None:
    seen = Seen(shape.replace("{}", password))
    everything = "\n".join(seen.texts)
    assert not {part for part in parts(password) if part in everything}


@pytest.mark.parametrize("password", ["7777/QXZJ", "7777?QXZJ", "7777#QXZJ"])
def test_what_was_taken_for_the_port_is_not_connected_to(password: str) -> None:
    with pytest.raises(ConfigurationError, match="write / as %2F") as caught:
        RedisLink(f"redis://:{password}@{HOST}", 1, 1)
    assert caught.value.__context__ is None


@contextmanager
def echoing() -> Iterator[str]:
    """Serve what knows no AUTH, as a Redis where that has another name, and tell its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with closing(client):
                    client.recv(1000)
                    client.sendall(
                        b"-ERR unknown command 'AUTH', with args beginning with: 'QXZJ' \r\n"
                    )

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_that_repeats_the_password_is_not_repeated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with echoing() as address, closing(RedisBroker(f"redis://:QXZJ@{address}")) as broker:
        with pytest.raises(BrokerUnavailableError, match="refused: unknown command 'AUTH'") as it:
            broker.ping()
        assert "QXZJ" not in text_of(it.value)
        url = f"redis://:QXZJ@{address}"
        bridge = Bridge(broker, Config(broker_url=url), url, lambda text: ServerSentEvent(text))
        bridge.follow("news")
        bridge.stop()
        with pytest.raises(BrokerUnavailableError):
            broker.subscribe("news")
    assert "unknown command 'AUTH'" in caplog.text
    assert "QXZJ" not in caplog.text
