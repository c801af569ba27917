"""Serve the app with a server that has no command: ``serve_ours.py SERVER PORT ROAD``."""

from __future__ import annotations

import logging
import sys


def serve_with_gevent(port: int, hijack: bool) -> None:
    """Serve with gevent.pywsgi, until the process is ended."""
    from gevent import monkey

    monkey.patch_all()
    from gevent.pywsgi import WSGIServer
    from ours import create_app

    app = create_app(hijack)
    WSGIServer(("127.0.0.1", port), app, backlog=4096, log=None).serve_forever()


def serve_with_werkzeug(port: int, hijack: bool) -> None:
    """Serve with Werkzeug's development server, a thread for each request."""
    from ours import create_app
    from werkzeug.serving import run_simple

    # The others write no line for each request either.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", port, create_app(hijack), threaded=True)


if __name__ == "__main__":
    serve = {"gevent-pywsgi": serve_with_gevent, "werkzeug": serve_with_werkzeug}[sys.argv[1]]
    serve(int(sys.argv[2]), sys.argv[3] != "iterator")
