"""Serves the site of :mod:`tests.hijack_apps` with a server that has no command of its own.

``python -m tests.hijack_servers NAME PORT``
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def serve_werkzeug(port: int, name: str) -> None:
    from werkzeug.serving import run_simple

    processes = 2 if name == "werkzeug-forking" else 1
    threaded = name == "werkzeug-threaded"
    run_simple("127.0.0.1", port, site(), threaded=threaded, processes=processes)


def serve_pywsgi(port: int, *, patched: bool) -> None:
    if patched:
        importlib.import_module("gevent.monkey").patch_all()
    pywsgi = importlib.import_module("gevent.pywsgi")
    pywsgi.WSGIServer(("127.0.0.1", port), site()).serve_forever()


def serve_waitress(port: int) -> None:
    importlib.import_module("waitress").serve(site(), host="127.0.0.1", port=port)


def site() -> Any:
    # Late, since monkey patching has to come before everything else.
    from .hijack_apps import create_site

    return create_site()


def main(name: str, port: str) -> None:
    if name == "waitress":
        serve_waitress(int(port))
    elif name.startswith("werkzeug"):
        serve_werkzeug(int(port), name)
    else:
        serve_pywsgi(int(port), patched=name == "pywsgi-patched")


if __name__ == "__main__":
    main(*sys.argv[1:])
