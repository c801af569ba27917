"""The app of ``soak.py``: channels that anybody may read, and what its process holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flask import current_app

from tests import apps

if TYPE_CHECKING:
    from flask import Flask

MAX_LAG = 10.0
"""Seconds, so that those who stand still are cut off in each minute of a soak."""


def vitals() -> dict[str, Any]:
    """Tell what the process that answers holds."""
    found = {**apps.state(), **apps.blocks(), "pid": os.getpid()}
    # What state() tells is the number of all processes.
    found["subscribers"] = current_app.extensions["eventstream"].broker.subscriptions
    return found


def create_app() -> Flask:
    apps.eventstream.authorize(lambda channel: True)
    config = {
        "EVENTSTREAM_BROKER_URL": os.environ["REDIS_URL"],
        "EVENTSTREAM_HEARTBEAT": 2,
        "EVENTSTREAM_MAX_LAG": MAX_LAG,
    }
    app = apps.create_app(config)
    app.add_url_rule("/vitals", view_func=vitals)
    return app
