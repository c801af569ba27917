"""One blueprint may serve several apps of a process, and each app decides for itself."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from flask import Blueprint, Flask

from flask_eventstream import EventStream, eventstream
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.flask_sse import ServerSentEventsBlueprint
from flask_eventstream.rights import PerApp
from flask_eventstream.testing import client_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    Judge = Callable[[str], bool]

CHANNELS = ("sse", "a", "b", "c")


@pytest.fixture(params=[EventStream, ServerSentEventsBlueprint])
def shared(request: pytest.FixtureRequest) -> Any:
    if request.param is EventStream:
        return EventStream("eventstream", __name__)
    blueprint = ServerSentEventsBlueprint("sse", __name__, url_prefix="/stream")
    blueprint.add_url_rule("", "stream", blueprint.stream)
    return blueprint


def only(name: str) -> Judge:
    return lambda channel: channel == name


def new_app(blueprint: Any, name: str = "app", **config: Any) -> Flask:
    app = Flask(name)
    app.config.update(EVENTSTREAM_BROKER_URL="memory://", SECRET_KEY="secret", **config)
    app.register_blueprint(blueprint)
    return app


def opened(app: Flask) -> str:
    """Return the names of the channels that an app opens."""
    client = app.test_client()
    found = [name for name in CHANNELS if client.head(f"/stream?channel={name}").status_code == 200]
    return " ".join(found)


def test_authorize_and_register_app_by_app(shared: Any) -> None:
    shared.authorize(only("a"))
    first = new_app(shared)
    assert opened(first) == "a"
    shared.authorize(only("b"))
    second = new_app(shared)
    assert [opened(app) for app in (first, second, first, second)] == ["a", "b", "a", "b"]


def test_register_and_authorize_app_by_app(shared: Any) -> None:
    first = new_app(shared)
    shared.authorize(only("a"))
    assert opened(first) == "a"
    second = new_app(shared)
    assert opened(first) == "a"
    assert opened(second) == ("sse" if isinstance(shared, EventStream) else " ".join(CHANNELS))
    shared.authorize(only("b"))
    assert [opened(app) for app in (first, second, first, second)] == ["a", "b", "a", "b"]


def test_authorize_once_for_all_apps(shared: Any) -> None:
    shared.authorize(only("a"))
    apps = [new_app(shared) for _ in range(3)]
    assert [opened(app) for app in apps] == ["a", "a", "a"]


def test_the_orders_may_be_mixed(shared: Any) -> None:
    first = new_app(shared)
    shared.authorize(only("a"))
    shared.authorize(only("b"))
    second = new_app(shared)
    third = new_app(shared)
    shared.authorize(only("c"))
    fourth = new_app(shared)
    assert [opened(app) for app in (first, second, third, fourth)] == ["a", "b", "b", "c"]


def test_what_replaces_the_function_of_the_newest_app_is_in_force_at_once(shared: Any) -> None:
    shared.authorize(only("a"))
    first = new_app(shared)
    second = new_app(shared)
    shared.authorize(only("b"))
    assert [opened(first), opened(second)] == ["a", "b"]
    shared.authorize(only("c"))
    assert [opened(first), opened(second)] == ["a", "c"]


def test_an_app_that_could_not_register_is_not_the_newest(shared: Any) -> None:
    first = new_app(shared)
    shared.authorize(only("a"))
    bad = Flask("bad")
    bad.config["EVENTSTREAM_BROKER_URL"] = "none"
    with pytest.raises(ConfigurationError):
        bad.register_blueprint(shared)
    shared.authorize(only("b"))
    assert opened(first) == "b"
    assert opened(new_app(shared)) == "b"


def test_what_is_told_late_leaves_no_app_open_that_has_nothing() -> None:
    shared = ServerSentEventsBlueprint("sse", __name__, url_prefix="/stream")
    shared.add_url_rule("", "stream", shared.stream)
    first, second = new_app(shared), new_app(shared)
    shared.authorize(only("a"))
    third = new_app(shared)
    shared.authorize(only("b"))
    assert [opened(app) for app in (first, second, third)] == ["a", "a", "b"]


def test_an_app_that_registers_the_blueprint_twice_is_one_app(shared: Any) -> None:
    first = new_app(shared)
    second = new_app(shared)
    shared.authorize(only("b"))
    for app in (first, second):
        app.register_blueprint(shared, name="again", url_prefix="/again")
    assert opened(second) == "b"
    assert "a" not in opened(first) or not isinstance(shared, EventStream)
    shared.authorize(only("c"))
    assert opened(second) == "c"


def test_a_blueprint_within_another_has_the_same_rules(shared: Any) -> None:
    apps = []
    for name in ("a", "b"):
        shared.authorize(only(name))
        outer = Blueprint("outer", __name__)
        outer.register_blueprint(shared)
        apps.append(new_app(outer))
    assert [opened(app) for app in apps] == ["a", "b"]


def test_each_app_tells_itself_whose_a_request_is() -> None:
    shared = EventStream("eventstream", __name__)
    shared.identify(lambda: "early")
    early = new_app(shared, EVENTSTREAM_MAX_SUBSCRIBERS_PER_USER=1)
    shared.identify(lambda: None)
    late = new_app(shared, EVENTSTREAM_MAX_SUBSCRIBERS_PER_USER=1)
    with (
        client_stream(early.test_client(), "/stream"),
        client_stream(late.test_client(), "/stream"),
    ):
        assert early.test_client().get("/stream").status_code == 429
        client_stream(late.test_client(), "/stream").close()


def test_a_function_without_its_own_app_serves_the_app_that_is_used() -> None:
    """An app may subscribe by a blueprint that it has not registered, beside one that it has."""
    apart = EventStream("apart", __name__)
    apart.identify(lambda: "me")
    app = new_app(EventStream("eventstream", __name__), EVENTSTREAM_MAX_SUBSCRIBERS_PER_USER=1)
    app.add_url_rule("/own", view_func=lambda: apart.subscribe())
    with client_stream(app.test_client(), "/own"):
        assert app.test_client().get("/own").status_code == 429


def test_no_app_outlives_its_use(shared: Any) -> None:
    apps = []
    for _ in range(3):
        app = new_app(shared)
        shared.authorize(lambda channel, app=app: app.testing)
        assert opened(app) == ""
        apps.append(weakref.ref(app))
    del app
    gc.collect()
    assert [found() for found in apps] == [None] * 3
    # What comes now has no newest app to be for, and is for the next one.
    shared.authorize(only("a"))
    assert opened(new_app(shared)) == "a"


def test_the_ready_made_blueprint_decides_app_by_app(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process have apps with it.
    monkeypatch.setattr(eventstream, "_authority", PerApp())
    apps = []
    for name in ("a", "b"):
        app = new_app(eventstream)
        eventstream.authorize(only(name))
        apps.append(app)
    assert [opened(app) for app in apps] == ["a", "b"]
