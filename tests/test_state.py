from __future__ import annotations

import pytest
from flask import Flask

from flask_eventstream import MemoryBroker
from flask_eventstream.errors import ConfigurationError, NotRegisteredError
from flask_eventstream.run_registry import MemoryRegistry
from flask_eventstream.state import app_in_use, current_state, new_state


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
