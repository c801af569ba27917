"""Serves an app with a server that has no command of its own.

``python -m tests.hijack_servers NAME PORT [MODULE:FACTORY]``; without an app, it is the site of
:mod:`tests.hijack_apps`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def serve_werkzeug(port: int, name: str, app: str) -> None:
    from werkzeug.serving import run_simple

    processes = 2 if name == "werkzeug-forking" else 1
    threaded = name == "werkzeug-threaded"
    run_simple("127.0.0.1", port, load(app), threaded=threaded, processes=processes)


def serve_pywsgi(port: int, app: str, *, patched: bool) -> None:
    if patched:
        importlib.import_module("gevent.monkey").patch_all()
    pywsgi = importlib.import_module("gevent.pywsgi")
    pywsgi.WSGIServer(("127.0.0.1", port), load(app)).serve_forever()


def serve_waitress(port: int, app: str) -> None:
    importlib.import_module("waitress").serve(load(app), host="127.0.0.1", port=port)


def load(app: str) -> Any:
    # Late, since monkey patching has to come before everything else.
    module, _, factory = app.partition(":")
    return getattr(importlib.import_module(module), factory)()


def main(name: str, port: str, app: str = "tests.hijack_apps:create_site") -> None:
    if name == "waitress":
        serve_waitress(int(port), app)
    elif name.startswith("werkzeug"):
        serve_werkzeug(int(port), name, app)
    else:
        serve_pywsgi(int(port), app, patched=name == "pywsgi-patched")


if __name__ == "__main__":
    main(*sys.argv[1:])
