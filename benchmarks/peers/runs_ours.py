"""This package: the same tokens by a resumable view, and by a plain generator view."""

from __future__ import annotations

import random
import time
from itertools import count
from typing import TYPE_CHECKING

from flask import Flask, request

from flask_eventstream import eventstream

if TYPE_CHECKING:
    from collections.abc import Iterator


def create_app() -> Flask:
    """Return the app."""
    app = Flask("runs_ours")
    app.config["EVENTSTREAM_MAX_RUNS"] = 1_000_000
    app.config["EVENTSTREAM_MAX_SUBSCRIBERS"] = 1_000_000
    app.register_blueprint(eventstream)
    return app


@eventstream.resumable("/run/<int:number>")
def run(number: int) -> Iterator[str]:
    """Yield tokens to whoever attaches."""
    yield from tokens()


@eventstream.stream("/plain/<int:number>")
def plain(number: int) -> Iterator[str]:
    """Yield tokens to the client that asks."""
    yield from tokens()


def tokens() -> Iterator[str]:
    """Yield tokens with their number and time, ``pause`` seconds apart on average."""
    pause = request.args.get("pause", type=float)
    for number in count():
        yield f"{number}@{time.monotonic_ns()}@word~"
        time.sleep(pause * random.uniform(0.5, 1.5))
