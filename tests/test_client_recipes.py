"""The recipes of docs/clients.rst, read by the real clients."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from .browser import chromium
from .npm import CLIENTS, node
from .servers import ROOT, Server, serving, skip_unless_ci, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

    Open = Callable[[str], Page]

pytestmark = pytest.mark.beside

RECIPES = ROOT / "docs" / "recipes"
CONFIG = {
    "FLASK_EVENTSTREAM_RETRY": "50",
    "FLASK_EVENTSTREAM_HEARTBEAT": "0.3",
}


class Site:
    """The app of the recipes, and what it tells of its clients."""

    def __init__(self, server: Server) -> None:
        self.url = server.url

    def post(self, path: str, body: Any = None) -> Any:
        asked = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return json.load(answer)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.post("/call", {"name": name, "args": args, "options": options})["returned"]

    def requests(self, path: str) -> list[dict[str, Any]]:
        """Return what was asked of a stream since the test has begun."""
        with urllib.request.urlopen(f"{self.url}/log", timeout=20) as answer:
            return [one for one in json.load(answer) if one["path"] == path]

    def has_subscriber(self) -> bool:
        return bool(self.call("subscriber_count", "headlines"))

    def publish(self, client: str, number: int, text: str) -> None:
        """Publish what a client shows."""
        if client.startswith("turbo"):
            self.call("change", "append", number, text)
        elif client == "datastar-follow":
            self.post("/datastar", {"text": text})
        else:
            self.call("tell", number, text)


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    if not (CLIENTS / "node_modules").exists():
        skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
    with serving("tests.recipe_app:app", "gevent", environ=CONFIG) as started:
        yield Site(started)


@pytest.fixture
def site(server: Site) -> Site:
    server.call("disconnect", "headlines")
    wait_for(lambda: not server.has_subscriber(), what="the last test's clients to be gone")
    server.post("/forget")
    return server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(site: Site, browser: Browser) -> Iterator[Open]:
    page = browser.new_page()
    page.set_default_timeout(20_000)

    def open_(name: str) -> Page:
        page.goto(f"{site.url}/page/{name}")
        return page

    yield open_
    page.close()


def texts(page: Page) -> list[str]:
    return page.inner_text("#headlines").split()


def wait_for_texts(page: Page, *expected: str) -> None:
    page.wait_for_function(
        "expected => headlines.innerText.split(/\\s+/).filter(Boolean).join() == expected",
        arg=",".join(expected),
    )


# All that follow a channel in a browser

WITH_CURSOR = ["eventsource", "htmx2", "htmx4", "turbo", "turbo-follow", "datastar-follow"]
FOLLOWING = [*WITH_CURSOR, "event-source-polyfill"]


@pytest.mark.parametrize("client", WITH_CURSOR)
def test_what_comes_between_the_page_and_its_stream_is_not_missed(
    site: Site, open_page: Open, browser: Browser, client: str
) -> None:
    page = browser.new_page()
    with page:
        page.route(
            "**/headlines*",
            lambda route: (site.publish(client, 1, "between"), route.continue_()),
            times=1,
        )
        page.goto(f"{site.url}/page/{client}")
        wait_for_texts(page, "between")


@pytest.mark.parametrize("client", FOLLOWING)
def test_a_client_returns_with_its_cursor_and_shows_each_event_once(
    site: Site, open_page: Open, client: str
) -> None:
    page = open_page(client)
    wait_for(site.has_subscriber)
    site.publish(client, 1, "one")
    wait_for_texts(page, "one")
    site.call("disconnect", "headlines")
    site.publish(client, 2, "two")
    wait_for_texts(page, "one", "two")
    last = wait_for(lambda: site.requests("/headlines")[1:])[-1]
    cursor = "query" if client == "event-source-polyfill" else "header"
    assert "-" in last[cursor]
