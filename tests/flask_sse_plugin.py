"""A plugin of pytest with which Flask-SSE's own tests look at our module instead of theirs."""

from __future__ import annotations

import sys

import pytest

from flask_eventstream import flask_sse


def pytest_configure() -> None:
    # Not when it is imported: who looks for doctests imports every module of the tests.
    sys.modules["flask_sse"] = flask_sse
    # They call a fixture by it, and pytest 10 will not have it any more.
    vars(pytest).setdefault("yield_fixture", pytest.fixture)


def pytest_report_header() -> str:
    return f"flask_sse is {sys.modules['flask_sse'].__file__}"
