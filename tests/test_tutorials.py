"""The tutorials, as a reader follows them: paste the files, start the server, use the page."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from werkzeug.serving import make_server

from flask_eventstream import EventStreamResponse
from flask_eventstream.redis_broker import RedisBroker

from .blocks import Shell, block, typed, write_files
from .browser import chromium
from .servers import DEADLINE, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

TYPEWRITER = "tutorials/typewriter.rst"
CHAT_ROOM = "tutorials/chat-room.rst"
NOTIFICATIONS = "tutorials/notifications.rst"
ANSWER = "You have asked: “Why?” I have to think about that. "
TEXT = "document.querySelector('output').value"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def pasted(home: Path, worker_class: str = "gthread", *options: str, **environ: str) -> Any:
    """Serve the app of a folder with gunicorn."""
    path = f"--pythonpath={home}"
    return serving("app:app", worker_class, path, "--threads=8", *options, environ=environ)


def asking(page: Page, url: str, prompt: str = "Why?") -> Page:
    page.set_default_timeout(DEADLINE * 1000)
    page.goto(url)
    page.fill("[name=prompt]", prompt)
    page.click("text=Ask")
    return page


# The typewriter


# Tells a page's events and connections.
WATCHED = """
  window.received = 0; window.connections = 0;
  window.EventSource = class extends EventSource {
    constructor(...args) {
      super(...args);
      connections += 1;
      this.addEventListener("message", () => (received += 1));
    }
  };
"""


def test_the_typewriter_writes_word_by_word_and_does_not_ask_again(
    browser: Browser, tmp_path: Path
) -> None:
    write_files(TYPEWRITER, tmp_path, "model.py", "app.py", "static/index.html")
    with pasted(tmp_path, "gevent") as server, browser.new_page() as page:
        page.add_init_script(WATCHED)
        asking(page, server.url)
        page.wait_for_function(f"{TEXT} === {ANSWER!r}")
        assert page.evaluate("[received, connections]") == [len(ANSWER.split()), 1]


class Model:
    """An upstream that speaks OpenAI's wire, and goes on until nobody reads it."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._app = Flask("model")
        self._app.post("/v1/chat/completions")(
            lambda: EventStreamResponse(self._chunks(), format="openai")
        )

    def _chunks(self) -> Iterator[Any]:
        try:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]}
            while True:
                yield {"choices": [{"index": 0, "delta": {"content": "token "}}]}
                self.closed.wait(0.02)
        finally:
            self.closed.set()

    @contextmanager
    def served(self) -> Iterator[str]:
        server = make_server("127.0.0.1", 0, self._app, threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.port}/v1"
        finally:
            server.shutdown()
            server.server_close()


def test_stop_ends_the_question_to_a_real_model(browser: Browser, tmp_path: Path) -> None:
    write_files(TYPEWRITER, tmp_path, "model.py", "model.py", "app.py", "static/index.html")
    model = Model()
    with model.served() as url, browser.new_page() as page:
        with pasted(tmp_path, OPENAI_API_KEY="none", OPENAI_BASE_URL=url) as server:
            asking(page, server.url)
            page.wait_for_function(f"{TEXT}.startsWith('token token')")
            assert not model.closed.is_set()
            page.click("text=Stop")
            assert model.closed.wait(DEADLINE)


def test_the_answer_survives_a_reload_and_is_in_a_second_tab(
    browser: Browser, tmp_path: Path
) -> None:
    files = ["app.py", "app.py", "static/index.html", "static/index.html"]
    write_files(TYPEWRITER, tmp_path, "model.py", *files)
    with pasted(tmp_path) as server, browser.new_context() as context:
        page = asking(context.new_page(), server.url)
        page.wait_for_function(f"{TEXT}.length > 5")
        page.reload()
        page.wait_for_function(f"{TEXT} === {ANSWER!r}")
        second = context.new_page()
        second.goto(server.url)
        second.wait_for_function(f"{TEXT} === {ANSWER!r}")


def test_stop_ends_the_answer_for_all_tabs_and_what_there_is_stays(
    browser: Browser, tmp_path: Path
) -> None:
    files = ["app.py", "app.py", "static/index.html", "static/index.html"]
    write_files(TYPEWRITER, tmp_path, "model.py", *files)
    with pasted(tmp_path) as server, browser.new_context() as context:
        page = asking(context.new_page(), server.url, "Why? " * 200)
        page.wait_for_function(f"{TEXT}.length > 5")
        with page.expect_response("**/stream/answer") as cancelled:
            page.click("text=Stop")
        assert cancelled.value.status == 204
        page.reload()
        page.wait_for_function(f"{TEXT}.length > 5")
        assert "about that" not in page.evaluate(TEXT)


# Notifications


def logged_in(browser: Browser, url: str, name: str, button: str = "Log in") -> Page:
    page = browser.new_context().new_page()
    page.set_default_timeout(DEADLINE * 1000)
    page.goto(url)
    page.fill("[name=name]", name)
    with page.expect_response("**/events") as opened:
        page.click(f"text={button}")
        page.wait_for_url(url + "/")
    assert opened.value.status == 200
    return page


def shown(page: Page, count: int) -> list[str]:
    page.wait_for_function(f"document.querySelectorAll('li').length >= {count}")
    return page.locator("li").all_inner_texts()


def test_news_reach_everybody_and_messages_one(browser: Browser, tmp_path: Path) -> None:
    write_files(NOTIFICATIONS, tmp_path, "app.py", "static/index.html")
    with pasted(tmp_path, FLASK_EVENTSTREAM_RETRY="10") as server:
        ada, grace = (logged_in(browser, server.url, name) for name in ("Ada", "Grace"))
        ada.evaluate(f"async () => {{ {block(NOTIFICATIONS, 'javascript')} }}")
        news = "Ada: Tea is ready."
        assert shown(grace, 2) == [news, "Ada, to you: And there is cake."]
        assert shown(ada, 1) == [news]
        grace.evaluate("fetch('/logout', {method: 'POST'}).then(() => 0)")
        grace.wait_for_selector("text=Log in")
        ada.context.close()
        grace.context.close()


def test_a_script_a_command_and_a_task_publish_to_two_workers(
    browser: Browser, tmp_path: Path, redis: RedisServer
) -> None:
    write_files(NOTIFICATIONS, tmp_path)
    environ = {"FLASK_EVENTSTREAM_BROKER_URL": redis.url}
    shell = Shell(tmp_path, **environ)
    with pasted(tmp_path, "gevent", "--workers=2", **environ) as server:
        page = logged_in(browser, server.url, "Ada")
        with shell.typing(typed(NOTIFICATIONS, "celery -A")) as celery:
            shell.type(typed(NOTIFICATIONS, "backup.py"))
            shell.type(typed(NOTIFICATIONS, "eventstream publish"))
            assert shown(page, 2) == ["The backup is complete.", "The disk is full."]
            assert page.request.post(f"{server.url}/report").status == 202
            progress = ['{"done": 50}', '{"done": 100}']
            assert shown(page, 4)[2:] == progress, celery.communicate(timeout=1)
        token = page.request.post(f"{server.url}/token").text()
        listen = typed(NOTIFICATIONS, "eventstream listen").replace("es1.…", token)
        listen = listen.replace("http://127.0.0.1:5000", server.url)
        with shell.typing(f"{listen} --count 1 --raw") as listening:
            channels = RedisBroker(redis.url)
            wait_for(lambda: channels.channels().get("user:Ada", 0) == 2, what="the listener")
            channels.publish("x", channel="user:Ada")
            channels.close()
            assert "data: x" in listening.communicate(timeout=DEADLINE)[0]
        page.context.close()


# The chat room


def test_two_talk_in_a_room_and_a_third_one_hears_what_was_said(
    browser: Browser, tmp_path: Path
) -> None:
    write_files(CHAT_ROOM, tmp_path)
    environ = {"FLASK_EVENTSTREAM_PRESENCE_SECONDS": "0.2"}
    with pasted(tmp_path, **environ) as server:
        ada, grace = (logged_in(browser, server.url, name, "Come in") for name in ("Ada", "Grace"))
        for page, text in ((ada, "Hello!"), (grace, "<b>Hi</b>")):
            page.fill("[name=text]", text)
            page.click("text=Say")
        said = ["Ada: Hello!", "Grace: <b>Hi</b>"]
        assert sorted(shown(ada, 2)) == sorted(shown(grace, 2)) == said
        assert shown(ada, 2) == shown(grace, 2)
        third = logged_in(browser, server.url, "Mary", "Come in")
        assert shown(third, 2) == shown(ada, 2)
        for page in (ada, grace, third):
            page.wait_for_selector("text='Ada, Grace, Mary'")
        grace.context.close()
        for page in (ada, third):
            page.wait_for_selector("text='Ada, Mary'")
            page.context.close()
