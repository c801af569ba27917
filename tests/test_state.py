from __future__ import annotations

import pytest
from flask import Flask

from flask_eventstream import MemoryBroker
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.state import new_state


def test_an_app_has_what_its_configuration_says() -> None:
    app = Flask(__name__)
    app.config.update(EVENTSTREAM_MAX_SUBSCRIBERS=7, EVENTSTREAM_HIJACK=False)
    state = new_state(app)
    assert isinstance(state.broker, MemoryBroker)
    assert (state.max_subscribers, state.hub, state.has_warned) == (7, None, False)
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
