from __future__ import annotations

import doctest
import json
from importlib.metadata import version as installed_version
from pathlib import Path

project = "flask_eventstream"
author = "the authors of flask_eventstream"
release = installed_version("flask-eventstream")
version = release

extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest"]
exclude_patterns = ["_build"]
default_role = "code"

# |htmx.org| is a package that the tests read streams with, and its version.
_clients = Path(__file__).parent.parent / "tests" / "clients" / "package.json"
rst_epilog = ""
for _name, _version in json.loads(_clients.read_text("utf-8"))["dependencies"].items():
    _package, _, _number = _version.removeprefix("npm:").rpartition("@")
    rst_epilog += f".. |{_name}| replace:: ``{_package or _name}`` {_number}\n"

html_theme = "furo"
html_title = f"flask_eventstream {release}"
html_copy_source = False
html_show_copyright = False
# The name is one long word, which would be broken.
html_static_path = ["_static"]
html_css_files = ["name.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# Without IGNORE_EXCEPTION_DETAIL, which is a default: the messages are a part of what is shown.
doctest_default_flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1
# What every example has at hand. Each page runs in a namespace of its own.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
__name__ = "app"

import json, logging, threading
from contextlib import contextmanager

from flask import Flask, abort, jsonify, redirect, request
from werkzeug.serving import WSGIRequestHandler, make_server

from flask_eventstream import *
from flask_eventstream.testing import client_stream

logging.getLogger("werkzeug").disabled = True

def fresh():
    app = Flask("docs")
    app.logger.disabled = True
    return app, EventStream("eventstream", "docs", url_prefix="/stream")

def registered():
    app, eventstream = fresh()
    app.register_blueprint(eventstream)
    return app, eventstream

def show(answer):
    print(answer.text.rstrip())

@contextmanager
def served(app):
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        server.server_close()
"""
