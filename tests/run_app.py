"""An app with a run that goes on until it is stopped, for many processes."""

from __future__ import annotations

import os
import time
from itertools import count
from typing import TYPE_CHECKING

from flask import Flask, Response, current_app

from flask_eventstream import EventStream

if TYPE_CHECKING:
    from collections.abc import Iterator

eventstream = EventStream("eventstream", __name__)


@eventstream.resumable("/count")
def counting() -> Iterator[int]:
    """Yield the number of the process, and then 1, 2, 3, … without an end."""
    try:
        yield os.getpid()
        for number in count(1):
            time.sleep(0.02)
            yield number
    finally:
        current_app.logger.warning("the generator was closed")


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(
        EVENTSTREAM_BROKER_URL=os.environ["REDIS_URL"],
        EVENTSTREAM_KEY_PREFIX=os.environ["KEY_PREFIX"],
        EVENTSTREAM_RUN_LEASE=float(os.environ["RUN_LEASE"]),
    )
    app.register_blueprint(eventstream)

    @app.after_request
    def tell_process(response: Response) -> Response:
        response.headers["X-Process"] = str(os.getpid())
        return response

    return app
