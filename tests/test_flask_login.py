"""The examples of the documentation that name a user, with Flask-Login's."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user

from flask_eventstream import EventStream
from flask_eventstream.testing import client_stream

from .servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask.testing import FlaskClient

SHOWN = r"^\.\. testcode::\n\n((?:   .*\n|\n)+)"


class User(UserMixin):  # type: ignore[misc]  # it is untyped
    def __init__(self, id: str) -> None:
        self.id = id


def examples(page: str) -> str:
    """Return the code of a page that speaks of the current user."""
    shown = re.findall(SHOWN, (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
    return "".join(dedent(code) for code in shown if "current_user" in code)


def llm(prompt: str) -> Iterator[str]:
    yield f"{prompt} for {current_user.get_id()}"


def new_app(code: str) -> Flask:
    app, eventstream = Flask(__name__), EventStream("eventstream", __name__)
    app.config.update(SECRET_KEY="secret", TESTING=True, EVENTSTREAM_MAX_SUBSCRIBERS_PER_USER=1)
    LoginManager(app).user_loader(User)
    app.add_url_rule("/login/<name>", "login", lambda name: [login_user(User(name))])
    names = {"app": app, "eventstream": eventstream, "current_user": current_user}
    exec(code, {**names, "login_required": login_required, "llm": llm, "request": request})
    app.register_blueprint(eventstream)
    return app


@pytest.fixture(scope="module")
def app() -> Flask:
    return new_app(examples("channels.rst") + examples("runs.rst"))


def logged_in(app: Flask, name: str) -> FlaskClient:
    client = app.test_client()
    assert client.get(f"/login/{name}").status_code == 200
    return client


def test_the_examples_are_found() -> None:
    code = examples("channels.rst") + examples("runs.rst")
    for name in ("my_events", "stream_token", "identify", "resumable"):
        assert name in code


def test_an_anonymous_visitor_is_nobody_and_no_error(app: Flask) -> None:
    client = app.test_client()
    with client_stream(client, "/stream"), client_stream(client, "/stream"):
        assert client.get("/me/events").status_code == 401
    assert client.post("/stream-token").status_code == 401
    for method in ("POST", "GET", "DELETE"):
        answer = client.open("/stream/chat/1", method=method, json={"prompt": "x"})
        assert answer.status_code == 401


def test_a_user_who_has_logged_in_has_what_is_its_own(app: Flask) -> None:
    ada, bob = logged_in(app, "ada"), logged_in(app, "bob")
    with client_stream(ada, "/me/events") as stream, app.app_context():
        app.extensions["eventstream"].broker.publish("to ada", channel="user:ada")
        assert stream.next().data == "to ada"
        assert ada.get("/stream").status_code == 429
        client_stream(bob, "/stream").close()
    answer = ada.post("/stream/chat/1", json={"prompt": "Hi"})
    assert "data: Hi for ada" in answer.text
    assert bob.get("/stream/chat/1").status_code == 204
    assert "data: Hi for ada" in ada.get("/stream/chat/1").text
    wire = ada.post("/stream-token").text
    with client_stream(app.test_client(), f"/stream?token={wire}") as stream:
        assert stream.status_code == 200


@pytest.mark.parametrize("visitor", ["ada", None])
@pytest.mark.parametrize("wrong", ["current_user", "current_user._get_current_object()"])
def test_a_user_object_is_no_key_and_the_error_names_its_class(
    wrong: str, visitor: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    app = new_app(
        f"eventstream.identify(lambda: {wrong})\n"
        f"@eventstream.resumable('/chat', owner=lambda: {wrong})\n"
        "def chat():\n    yield 'x'\n"
    )
    app.config["TESTING"] = False
    client = logged_in(app, visitor) if visitor else app.test_client()
    for method, path in (("GET", "/stream"), ("POST", "/stream/chat"), ("GET", "/stream/chat")):
        caplog.clear()
        answer: Any = client.open(path, method=method)
        assert answer.status_code == 500
        assert f"of the class {'User' if visitor else 'AnonymousUserMixin'}; " in caplog.text
        assert "current_user.get_id()" in caplog.text
