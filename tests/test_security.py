"""What docs/security.rst says of pages of other origins, in a browser."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from flask import Flask
from flask_cors import CORS

from flask_eventstream import EventStream
from flask_eventstream.testing import client_stream

from .browser import chromium
from .servers import ROOT, free_port, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import APIResponse, Browser, Page

pytestmark = pytest.mark.beside

PAGE = (ROOT / "docs" / "security.rst").read_text("utf-8")
READ_EVENTS = (ROOT / "example_app" / "static" / "js" / "read-events.js").read_text("utf-8")
THERE = "https://api.example.com"
ALLOWED = "https://www.example.com"


def shown(directive: str, part: str) -> str:
    """Return the block of the documentation that has some text in it."""
    found = re.findall(rf"^\.\. {directive}\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)
    [block] = [dedent(block) for block in found if part in block]
    return str(block)


APP = """
from flask import Flask, request, session
from flask_eventstream import EventStream

app = Flask(__name__)
app.config.update(SECRET_KEY="secret", SESSION_COOKIE_SAMESITE="Lax", EVENTSTREAM_RETRY=10)
eventstream = EventStream("eventstream", __name__)
asked = []
PAGE = "<script>const shown = [], show = (text) => shown.push(text);</script>"

@eventstream.authorize
def may_read(channel):
    return channel == f"user:{session.get('user')}"

@app.get("/wildcard")
def wildcard():
    response = eventstream.subscribe("user:7")
    response.headers["Access-Control-Allow-Origin"] = "*"
    return response

@app.post("/login")
def login():
    session["user"] = 7
    return ""

@app.after_request
def note(response):
    origin = request.headers.get("Origin")
    asked.append([request.method, request.path, origin, response.status_code])
    return response

def publish(data):
    with app.app_context():
        return eventstream.publish(data, channel="user:7")

app.add_url_rule("/asked", "asked", view_func=lambda: asked)
app.add_url_rule("/token", "token", view_func=lambda: eventstream.token("user:7"))
app.add_url_rule("/publish/<data>", view_func=publish, methods=["POST"])
app.add_url_rule("/end", "end", lambda: [eventstream.disconnect("user:7")], methods=["POST"])
app.add_url_rule("/", "page", lambda: PAGE)
app.register_blueprint(eventstream)
"""


class Stage:
    """One server that listens on three ports, which are three origins of one site.

    :ivar there: the origin of the stream; ``allowed`` and ``other`` are those of pages.
    """

    def __init__(self, browser: Browser, there: str, allowed: str, other: str) -> None:
        self.there, self.allowed, self.other = there, allowed, other
        self._context = browser.new_context()

    def page(self, origin: str, *, signed_in: bool = True) -> Page:
        """Open a page of an origin, with ``show`` and what was shown, errors too."""
        page = self._context.new_page()
        if signed_in:
            page.request.post(f"{self.there}/login")
        page.goto(origin)
        return page

    def run(self, page: Page, script: str) -> None:
        page.add_script_tag(content=script.replace(THERE, self.there), type="module")

    def get(self, path: str) -> APIResponse:
        return self._context.request.get(f"{self.there}{path}")

    def post(self, path: str) -> None:
        self._context.request.post(f"{self.there}{path}")

    def asked(self, method: str, path: str, origin: str) -> list[int]:
        """Return the statuses of the answers so far."""
        return [row[3] for row in self.get("/asked").json() if row[:3] == [method, path, origin]]

    def close(self) -> None:
        self._context.close()


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, list[str]]]:
    home = tmp_path_factory.mktemp("origins")
    ports = [free_port(), free_port()]
    allowed, other = (f"http://127.0.0.1:{port}" for port in ports)
    code = APP + shown("testcode::", "CORS(").replace(ALLOWED, allowed)
    (home / "origins_app.py").write_text(code, "utf-8")
    binds = [f"--bind=127.0.0.1:{port}" for port in ports]
    options = ["--threads=20", f"--pythonpath={home}", *binds]
    with serving("origins_app:app", "gthread", *options) as server, chromium() as browser:
        yield browser, [server.url, allowed, other]


@pytest.fixture
def stage(origins: tuple[Browser, list[str]]) -> Iterator[Stage]:
    browser, (there, allowed, other) = origins
    stage = Stage(browser, there, allowed, other)
    yield stage
    stage.close()


WITH_COOKIE = shown("code-block:: javascript", "withCredentials")
FAILURE = "source.onerror = () => show(`error ${source.readyState}`);"


def test_a_page_of_an_allowed_origin_reads_a_stream_with_its_cookie(stage: Stage) -> None:
    page = stage.page(stage.allowed)
    asked_before = stage.asked("OPTIONS", "/stream", stage.allowed)
    with page.expect_response(f"{stage.there}/stream?**"):
        stage.run(page, WITH_COOKIE)
    stage.post("/publish/one")
    page.wait_for_function("shown.length === 1")
    # It returns with its cursor, a header that the browser asks no permission for.
    stage.post("/end")
    stage.post("/publish/two")
    page.wait_for_function("shown.length === 2")
    assert page.evaluate("shown") == ["one", "two"]
    assert stage.asked("OPTIONS", "/stream", stage.allowed) == asked_before


def test_without_with_credentials_no_cookie_is_sent(stage: Stage) -> None:
    page = stage.page(stage.allowed)
    stage.run(page, WITH_COOKIE.replace("true", "false") + FAILURE)
    page.wait_for_function("shown[0] === 'error 2'")
    assert stage.asked("GET", "/stream", stage.allowed)[-1] == 403


def test_a_page_of_another_origin_gets_no_event_though_the_app_has_answered(stage: Stage) -> None:
    page = stage.page(stage.other)
    stage.run(page, WITH_COOKIE + FAILURE)
    page.wait_for_function("shown[0] === 'error 2'")
    stage.post("/publish/secret")
    assert stage.asked("GET", "/stream", stage.other)[-1] == 200
    assert page.evaluate("shown") == ["error 2"]


def test_a_wildcard_is_refused_by_the_browser_if_there_are_cookies(stage: Stage) -> None:
    script = WITH_COOKIE.replace("/stream?channel=user:7", "/wildcard")
    page = stage.page(stage.other)
    stage.run(page, script + FAILURE)
    page.wait_for_function("shown[0] === 'error 2'")
    assert stage.asked("GET", "/wildcard", stage.other)[-1] == 200
    public = stage.page(stage.other)
    with public.expect_response(f"{stage.there}/wildcard"):
        stage.run(public, script.replace("true", "false"))
    stage.post("/publish/public")
    public.wait_for_function("shown[0] === 'public'")
    assert page.evaluate("shown") == ["error 2"]


def fetching(stage: Stage) -> str:
    token = stage.get("/token").text()
    script = shown("code-block:: javascript", "Bearer")
    script = script.replace('import { readEvents } from "./read-events.js";', "")
    return (
        f"{READ_EVENTS}\nconst token = '{token}';\ntry {{ {script} }} catch (e) {{ show(e.name); }}"
    )


def test_a_page_of_an_allowed_origin_reads_a_stream_with_a_token_in_a_header(stage: Stage) -> None:
    page = stage.page(stage.allowed, signed_in=False)
    with page.expect_response(f"{stage.there}/stream"):
        stage.run(page, fetching(stage))
    stage.post("/publish/one")
    page.wait_for_function("shown[0] === 'one'")
    assert stage.asked("OPTIONS", "/stream", stage.allowed)[-1] == 200


def test_a_page_of_another_origin_may_not_even_send_a_token(stage: Stage) -> None:
    page = stage.page(stage.other, signed_in=False)
    before = stage.asked("GET", "/stream", stage.other)
    stage.run(page, fetching(stage))
    page.wait_for_function("shown[0] === 'TypeError'")
    assert stage.asked("OPTIONS", "/stream", stage.other)[-1] == 200
    assert stage.asked("GET", "/stream", stage.other) == before


def test_flask_cors_with_credentials_and_no_origins_allows_every_page() -> None:
    app, eventstream = Flask(__name__), EventStream("eventstream", __name__)
    app.register_blueprint(eventstream)
    CORS(app, supports_credentials=True)
    headers = {"Origin": "https://evil.example"}
    with client_stream(app.test_client(), "/stream", headers=headers) as stream:
        assert stream.headers["Access-Control-Allow-Origin"] == "https://evil.example"
        assert stream.headers["Access-Control-Allow-Credentials"] == "true"
