from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from flask import Flask

from flask_eventstream import MemoryBroker
from flask_eventstream.errors import ConfigurationError, NotRegisteredError
from flask_eventstream.run_registry import MemoryRegistry
from flask_eventstream.state import app_in_use, current_state, new_state
from flask_eventstream.testing import client_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_eventstream import EventStream


def test_an_app_has_what_its_configuration_says() -> None:
    app = Flask(__name__)
    app.config.update(EVENTSTREAM_MAX_SUBSCRIBERS=7, EVENTSTREAM_HIJACK=False)
    state = new_state(app)
    assert isinstance(state.broker, MemoryBroker)
    assert (state.places.max_all, state.hub, state.has_warned) == (7, None, False)
    app.config["EVENTSTREAM_HIJACK"] = True
    assert new_state(app).hub is not None


def test_each_app_has_its_own() -> None:
    states = [new_state(Flask(name)) for name in ("one", "two")]
    assert states[0].broker is not states[1].broker


def test_a_bad_value_is_an_error_that_names_its_key() -> None:
    app = Flask(__name__)
    app.config["EVENTSTREAM_RETRY"] = "soon"
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_RETRY='soon'"):
        new_state(app)


def test_the_runs_of_an_app_have_the_limits_of_its_configuration() -> None:
    app = Flask(__name__)
    app.config.update(EVENTSTREAM_MAX_RUNS=1, EVENTSTREAM_MAX_RUNS_PER_OWNER=2)
    runs = new_state(app).runs
    assert runs._max_runs == 1
    assert isinstance(runs.registry, MemoryRegistry)
    assert runs.registry._max_per_owner == 2


def test_without_a_blueprint_an_app_has_no_state(app: Flask) -> None:
    with app.app_context():
        assert app_in_use() is app
        assert current_state() is app.extensions["eventstream"]
    with Flask("other").app_context(), pytest.raises(NotRegisteredError, match="'other'"):
        current_state()


def test_of_a_stream_that_ends_as_it_should_not_operators_are_told(
    make_app: Callable[..., Flask], eventstream: EventStream, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(HISTORY=1, MAX_EVENT_BYTES=20_000)
    with client_stream(app.test_client(), "/stream"):
        pass
    assert "A stream has ended" not in caplog.text
    with app.app_context(), client_stream(app.test_client(), "/stream") as stream:
        for _ in range(50):
            eventstream.publish("x" * 10_000)
        with pytest.raises(EOFError):
            stream.next()
    [record] = [one for one in caplog.records if one.name == "flask_eventstream.state"]
    evidence = vars(record)["eventstream"]
    assert record.levelname == "WARNING"
    assert (evidence["reason"], evidence["channels"]) == ("lagged", ("sse",))
    assert f"reason=lagged connection={evidence['connection']}" in record.getMessage()
