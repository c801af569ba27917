"""gunicorn's settings for the tests of both roads: its log and a hook are looked at."""

from __future__ import annotations

from typing import Any

accesslog = "-"
access_log_format = "accessed %(r)s %(s)s"


def post_request(worker: Any, req: Any, environ: dict[str, Any], resp: Any) -> None:
    worker.log.warning("after %s %s", req.uri, resp.status)
