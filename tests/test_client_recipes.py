"""The recipes of docs/clients.rst, read by the real clients."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import urllib.request
from contextlib import closing
from textwrap import dedent
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from .browser import chromium
from .npm import CLIENTS, node
from .servers import ROOT, Server, serving, skip_unless_ci, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page, Route

    Open = Callable[[str], Page]

pytestmark = pytest.mark.beside

RECIPES = ROOT / "docs" / "recipes"
PAGE = (ROOT / "docs" / "clients.rst").read_text("utf-8")
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
    # One of its views sleeps, and need not be waited for.
    with serving(
        "tests.recipe_app:app", "gevent", "--graceful-timeout=1", environ=CONFIG
    ) as started:
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
        # The recipes wait for a random time before they come back: the shortest one.
        started.new_context().add_init_script("Math.random = () => 0")
        yield started


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    page = browser.contexts[0].new_page()
    page.set_default_timeout(20_000)
    yield page
    page.close()


@pytest.fixture
def open_page(site: Site, page: Page) -> Open:
    def open_(name: str) -> Page:
        if name.startswith("datastar"):
            has_datastar()
        page.goto(f"{site.url}/page/{name}")
        return page

    return open_


def has_datastar() -> None:
    if not (CLIENTS / "datastar").exists():
        skip_unless_ci("needs Datastar, which 'make test' downloads where it can")


def open_blank(open_page: Open, library: str) -> Page:
    """Open a page that does nothing, and load a library."""
    if library == "datastar.js":
        has_datastar()
    page = open_page("blank")
    page.evaluate("url => import(url)", f"/static/{library}")
    return page


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
    site: Site, page: Page, open_page: Open, client: str
) -> None:
    def publish_first(route: Route) -> None:
        site.publish(client, 1, "between")
        route.continue_()

    page.route("**/headlines*", publish_first, times=1)
    open_page(client)
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


@pytest.mark.parametrize(
    "client", ["eventsource", "htmx2", "htmx4", "turbo-follow", "datastar-follow"]
)
def test_a_recipe_outlives_a_502_and_misses_nothing(
    site: Site, open_page: Open, client: str
) -> None:
    page = open_page(client)
    wait_for(site.has_subscriber)
    site.publish(client, 1, "one")
    wait_for_texts(page, "one")
    site.post("/fail?times=1")
    site.call("disconnect", "headlines")
    site.publish(client, 2, "two")
    wait_for_texts(page, "one", "two")
    assert len(site.requests("/headlines")) == 3


STOPPED = {
    "turbo": "document.querySelector('turbo-stream-source').streamSource.readyState == 2",
    "event-source-polyfill": "source.readyState == 2",
}


@pytest.mark.parametrize("client", STOPPED)
def test_a_client_stops_for_good_at_a_502(site: Site, open_page: Open, client: str) -> None:
    page = open_page(client)
    wait_for(site.has_subscriber)
    site.post("/fail?times=1")
    site.call("disconnect", "headlines")
    page.wait_for_function(STOPPED[client])
    assert len(site.requests("/headlines")) == 2


@pytest.mark.parametrize("client", ["eventsource", "turbo-follow"])
def test_a_page_is_drawn_anew_when_what_it_missed_is_gone(
    site: Site, page: Page, open_page: Open, client: str
) -> None:
    def lose(route: Route) -> None:
        route.continue_(url=f"{site.url}/headlines?lastEventId=gone-1")

    page.route("**/headlines*", lose, times=1)
    open_page(client)
    page.wait_for_function("performance.getEntriesByType('navigation')[0].type == 'reload'")


@pytest.mark.parametrize("client", ["eventsource", "htmx2", "htmx4"])
def test_an_event_with_a_type_reaches_who_waits_for_it(
    site: Site, open_page: Open, client: str
) -> None:
    page = open_page(client)
    site.call("tell", 41, "one")
    page.wait_for_function("count.value == '41'")
    assert texts(page) == ["one"]


def show_tab(page: Page, is_shown: bool) -> None:
    page.evaluate(
        """isShown => {
            Object.defineProperty(document, "hidden", { value: !isShown, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_shown,
    )


@pytest.mark.parametrize("client", ["htmx4", "datastar-follow"])
def test_a_client_that_leaves_with_its_tab_comes_back_and_misses_nothing(
    site: Site, open_page: Open, client: str
) -> None:
    page = open_page(client)
    site.publish(client, 1, "one")
    wait_for_texts(page, "one")
    show_tab(page, False)
    wait_for(lambda: not site.has_subscriber())
    site.publish(client, 2, "two")
    show_tab(page, True)
    wait_for_texts(page, "one", "two")


# The browser's own EventSource


def test_the_types_open_and_error_are_taken_for_the_clients_own(
    site: Site, open_page: Open
) -> None:
    page = open_page("blank")
    page.evaluate(
        """url => new Promise((resolve) => {
            const source = new EventSource(url), told = [];
            source.onopen = (event) => told.push(`open ${event.data}`);
            source.onerror = (event) => {
                told.push(`error ${event.data}`);
                if (event.data === undefined) { source.close(); resolve(window.told = told); }
            };
        })""",
        "/raw?wire=event: open%0Adata: x%0A%0Aevent: error%0Adata: x%0A%0A",
    )
    assert page.evaluate("told") == ["open undefined", "open x", "error x", "error undefined"]


# Generator streams in a browser


@pytest.mark.parametrize("client", ["words", "htmx2", "htmx4", "datastar"])
def test_a_page_shows_a_generator_stream_and_does_not_ask_again(
    site: Site, open_page: Open, client: str
) -> None:
    page = open_page(client)
    shown, path = {
        "words": ("#text", "/stream/words"),
        "datastar": ("#headlines", "/stream/progress"),
    }.get(client, ("#rows", "/stream/rows"))
    page.wait_for_function(
        "shown => document.querySelector(shown).innerText.includes('three')", arg=shown
    )
    # A subscriber that is cut off now comes back no sooner than who was cut off before it.
    page.evaluate(
        "new Promise((back) => { let opened = 0;"
        "  new EventSource('/headlines').onopen = () => ++opened == 2 && back();"
        "  setTimeout(() => fetch('/call', {method: 'POST',"
        "    headers: {'Content-Type': 'application/json'},"
        "    body: JSON.stringify({name: 'disconnect', args: ['headlines']})}), 100); })"
    )
    assert len(site.requests(path)) == 1
    assert page.inner_text(shown).split() == ["one", "two", "three"]


# fetch-event-source


def test_fetch_event_source_posts_a_question_with_a_header(site: Site, open_page: Open) -> None:
    page = open_page("fetch-event-source")
    page.wait_for_function("text.innerText.includes('end')")
    assert page.inner_text("#text").split() == ["one", "two", "three", "end"]
    [asked] = site.requests("/ask")
    assert (asked["method"], asked["authorization"]) == ("POST", "Bearer secret")


@pytest.mark.parametrize(("status", "requests"), [(502, 2), (401, 1), (204, 1)])
def test_fetch_event_source_asks_again_after_a_502_and_not_after_a_401_or_204(
    site: Site, open_page: Open, status: int, requests: int
) -> None:
    site.post(f"/fail?times=1&status={status}")
    page = open_page("fetch-event-source")
    page.wait_for_function("text.innerText.trim()")
    page.wait_for_function("/end|upstream|no more/.test(text.innerText)")
    assert len(site.requests("/ask")) == requests


def test_fetch_event_source_would_ask_again_and_again_after_a_204(
    site: Site, open_page: Open
) -> None:
    page = open_page("blank")
    page.evaluate(
        """async () => {
            const { fetchEventSource } = await import("/static/fetch-event-source.js");
            const headers = { "last-event-id": "end" };
            fetchEventSource("/finished/fetch", { headers, onerror: () => 1 });
        }"""
    )
    wait_for(lambda: site.requests("/finished/fetch")[2:])


def test_fetch_event_source_asks_twice_when_its_tab_is_shown_unless_told_not_to(
    site: Site, open_page: Open
) -> None:
    page = open_page("blank")
    page.evaluate(
        """async () => {
            const { fetchEventSource } = await import("/static/fetch-event-source.js");
            for (const openWhenHidden of [true, false])
                await new Promise((onmessage) => {
                    fetchEventSource(`/still/${openWhenHidden}`, { openWhenHidden, onmessage });
                });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    # It takes the connection that it has closed itself for one that broke.
    wait_for(lambda: site.requests("/still/false")[2:])
    assert len(site.requests("/still/true")) == 1


def test_an_id_that_is_not_ascii_keeps_fetch_event_source_from_coming_back(
    site: Site, open_page: Open
) -> None:
    page = open_page("blank")
    told = page.evaluate(
        """async (url) => {
            const { fetchEventSource } = await import("/static/fetch-event-source.js");
            return new Promise((resolve) => {
                const told = [];
                fetchEventSource(url, {
                    onclose() { throw new Error("closed"); },
                    onerror(error) { if (told.push(error.message) == 3) resolve(told); },
                });
            });
        }""",
        "/raw?wire=" + quote("retry: 1\ndata: a\nid: 数\n\n"),
    )
    assert told[0] == "closed"
    assert all("ISO-8859-1" in message for message in told[1:])
    assert len(site.requests("/raw")) == 1


# event-source-polyfill


def test_the_polyfill_sends_headers_and_its_cursor_in_the_query(
    site: Site, open_page: Open
) -> None:
    open_page("event-source-polyfill")
    [asked] = wait_for(lambda: site.requests("/headlines"))
    assert asked["authorization"] == "Bearer secret"


def test_the_polyfill_notices_silence_and_takes_heartbeats_for_life(
    site: Site, open_page: Open
) -> None:
    page = open_blank(open_page, "event-source-polyfill.js")
    page.evaluate(
        """() => ["/headlines", "/still/x"].forEach((url) => {
            new EventSourcePolyfill(url, { heartbeatTimeout: 1000 });
        })"""
    )
    asked = wait_for(lambda: site.requests("/still/x")[1:])
    assert (asked[0]["query"], asked[0]["header"]) == ("7", None)
    assert len(site.requests("/headlines")) == 1


def test_the_polyfill_stops_at_a_204(site: Site, open_page: Open) -> None:
    page = open_blank(open_page, "event-source-polyfill.js")
    page.evaluate("void (window.source = new EventSourcePolyfill('/finished/polyfill'))")
    page.wait_for_function("source.readyState == 2")
    assert [one["query"] for one in site.requests("/finished/polyfill")] == [None, "end"]


# htmx


def test_htmx_2_starts_a_view_again_that_has_ended_unless_it_closes(
    site: Site, open_page: Open
) -> None:
    page = open_page("htmx2")
    page.evaluate(
        """() => {
            htmx.createEventSource = (url) => new EventSource(url);
            document.body.insertAdjacentHTML("beforeend",
                '<p hx-ext="sse" sse-connect="/finished/htmx2" sse-swap="message"></p>');
            htmx.process(document.body);
        }"""
    )
    asked = wait_for(lambda: site.requests("/finished/htmx2")[2:])
    assert asked[0]["header"] is None


def add_to_htmx_4(page: Page, attributes: str) -> None:
    page.evaluate(
        """html => {
            document.body.insertAdjacentHTML("beforeend", html);
            htmx.process(document.body);
        }""",
        f'<p id="added" {attributes}></p>',
    )


def test_htmx_4_asks_again_after_a_204_unless_it_is_kept_from_it(
    site: Site, open_page: Open
) -> None:
    page = open_page("htmx4")
    without_handler = "hx-on:htmx:sse:before:connection='event.stopPropagation()'"
    headers = """hx-headers='{"Authorization": "Bearer secret"}'"""
    add_to_htmx_4(page, f"hx-sse:connect='/finished/htmx4' {headers} {without_handler}")
    asked = wait_for(lambda: site.requests("/finished/htmx4")[3:])
    assert {one["header"] for one in asked} == {"end"}
    assert asked[0]["authorization"] == "Bearer secret"


def test_htmx_4_stops_at_a_204_with_the_handler_of_the_recipe(site: Site, open_page: Open) -> None:
    page = open_page("htmx4")
    add_to_htmx_4(
        page, "hx-sse:connect='/finished/handler' hx-on:htmx:sse:close='window.hasEnded = true'"
    )
    page.wait_for_function("window.hasEnded")
    assert len(site.requests("/finished/handler")) == 2


def test_htmx_4_gives_up_when_its_first_request_fails(site: Site, open_page: Open) -> None:
    page = open_page("blank")
    for library in ("htmx4.js", "hx-sse.js"):
        page.add_script_tag(url=f"/static/{library}")
    site.post("/fail?times=1")
    add_to_htmx_4(
        page, "hx-sse:connect='/stream/words' hx-on:htmx:finally:request='window.isOver = true'"
    )
    page.wait_for_function("window.isOver")
    assert not page.evaluate("added._htmx.sse")
    assert len(site.requests("/stream/words")) == 1


# Turbo


@pytest.mark.parametrize("client", ["turbo", "turbo-follow"])
def test_turbo_appends_replaces_and_removes(site: Site, open_page: Open, client: str) -> None:
    page = open_page(client)
    site.call("change", "append", 1, "one")
    site.call("change", "append", 2, "two")
    site.call("change", "append", 1, "again")
    wait_for_texts(page, "two", "again")
    site.call("change", "replace", 2, "2")
    wait_for_texts(page, "2", "again")
    site.call("change", "remove", 2)
    wait_for_texts(page, "again")


def test_turbo_sees_no_event_with_a_type(site: Site, open_page: Open) -> None:
    page = open_page("turbo")
    site.call("publish", "<p>typed</p>", type="change", channel="headlines")
    site.call("change", "append", 1, "one")
    wait_for_texts(page, "one")


# Datastar


def test_datastar_patches_elements_and_signals(site: Site, open_page: Open) -> None:
    page = open_page("datastar")
    page.wait_for_function("count.value == '3'")
    assert texts(page) == ["one", "two", "three"]


def ask_with_datastar(page: Page, action: str) -> None:
    page.evaluate(
        """action => {
            window.told = [];
            document.addEventListener("datastar-fetch", ({ detail }) => told.push(detail.type));
            document.body.innerHTML = `<p data-init="${action}"></p>`;
        }""",
        action,
    )


def test_datastar_posts_with_headers(site: Site, open_page: Open) -> None:
    page = open_blank(open_page, "datastar.js")
    options = "headers: {Authorization: 'Bearer secret'}, payload: {question: 'one'}"
    ask_with_datastar(page, f"@post('/ask', {{{options}}})")
    page.wait_for_function("told.includes('finished')")
    [asked] = site.requests("/ask")
    assert (asked["method"], asked["authorization"]) == ("POST", "Bearer secret")


def test_datastar_stops_at_a_204(site: Site, open_page: Open) -> None:
    page = open_blank(open_page, "datastar.js")
    ask_with_datastar(page, "@get('/finished/datastar', {retry: 'always'})")
    page.wait_for_function("told.includes('finished')")
    asked = site.requests("/finished/datastar")
    assert [one["header"] for one in asked] == [None, "end"]


@pytest.mark.parametrize("is_refused", [False, True])
def test_datastar_does_not_return_by_default(site: Site, open_page: Open, is_refused: bool) -> None:
    page = open_blank(open_page, "datastar.js")
    site.post(f"/fail?times={int(is_refused)}")
    ask_with_datastar(page, "@get('/headlines')")
    if not is_refused:
        wait_for(site.has_subscriber)
        site.call("disconnect", "headlines")
    page.wait_for_function("told.includes('finished')")
    assert len(site.requests("/headlines")) == 1


# Node


def run_node(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [node(), script, *arguments], cwd=CLIENTS, capture_output=True, text=True, timeout=300
    )


def test_eventsource_of_npm_sends_a_header_and_stops_at_the_end(site: Site) -> None:
    done = run_node("eventsource.mjs", f"{site.url}/stream/words", "secret")
    assert (done.stdout.split("\n"), done.stderr) == ([" one", " two", " three", ""], "")
    [asked] = site.requests("/stream/words")
    assert asked["authorization"] == "Bearer secret"


def test_eventsource_of_npm_stops_for_good_at_a_502(site: Site) -> None:
    site.post("/fail?times=1")
    done = run_node("eventsource.mjs", f"{site.url}/stream/words", "secret")
    assert (done.stdout, done.stderr) == ("", "502 Non-200 status code (502)\n")
    assert len(site.requests("/stream/words")) == 1


@pytest.fixture(scope="module")
def ask_with_ai_sdk(server: Site) -> Callable[[str], dict[str, Any]]:
    wire = 'data: {"type": "text-start", "id": "1"}\n\n'
    wire += 'data: {"type": "text-delta", "id": "1", "delta": "Hel"}\n\n'

    def ask(text: str) -> dict[str, Any]:
        done = run_node("ai-sdk.mjs", server.url, text, f"{server.url}/raw?wire={quote(wire)}")
        assert done.stderr == ""
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    return ask


def test_the_ai_sdk_reads_a_run_and_resumes_it(
    site: Site, ask_with_ai_sdk: Callable[[str], dict[str, Any]]
) -> None:
    told = ask_with_ai_sdk("Hello 世界")
    asked = site.requests("/stream/chat/Hello 世界")
    assert [one["method"] for one in asked] == ["POST", "GET"]
    assert {one["authorization"] for one in asked} == {"Bearer secret"}
    assert told["sent"] == told["resumed"]
    assert told["none"] is None
    message = told["sent"]["message"]
    assert (message["id"], told["sent"]["errors"]) == ("answer-1", [])
    assert message["parts"] == [{"type": "text", "text": "Hello 世界 ", "state": "done"}]


def test_the_ai_sdk_is_told_of_a_failure_and_takes_a_stream_that_only_stops_for_complete(
    ask_with_ai_sdk: Callable[[str], dict[str, Any]],
) -> None:
    told = ask_with_ai_sdk("")
    failure = ["The stream failed on the server."]
    assert (told["sent"]["errors"], told["resumed"]["errors"]) == (failure, failure)
    assert (told["cutOff"]["errors"], told["cutOff"]["message"]["parts"][0]["text"]) == ([], "Hel")


def test_the_ai_sdk_takes_a_502_for_an_error(site: Site) -> None:
    site.post("/fail?times=1")
    done = run_node("ai-sdk.mjs", site.url, "Hello", f"{site.url}/raw?wire=")
    assert done.returncode == 1
    assert "no upstream" in done.stderr


# Python


def recipe(name: str) -> Any:
    namespace = runpy.run_path(str(RECIPES / f"{name}.py"))
    return namespace["follow" if "follow" in namespace else "read"]


def test_httpx_sse_comes_back_with_its_cursor_after_a_502_too(site: Site) -> None:
    cursor = site.call("last_event_id", "headlines")
    events = recipe("follow_with_httpx")(f"{site.url}/headlines", cursor)
    with closing(events):
        site.call("publish", "one", channel="headlines")
        assert next(events).data == "one"
        site.post("/fail?times=1")
        site.call("disconnect", "headlines")
        site.call("publish", "two", channel="headlines")
        assert next(events).data == "two"
    headers = [one["header"] for one in site.requests("/headlines")]
    assert headers[0] == cursor
    assert headers[1] == headers[2] > cursor


def test_httpx_sse_stops_at_the_end_at_a_204_and_at_a_401(site: Site) -> None:
    follow = recipe("follow_with_httpx")
    events = list(follow(f"{site.url}/stream/words"))
    assert [(event.event, event.data) for event in events[-2:]] == [
        ("message", "three"),
        ("end", "{}"),
    ]
    assert list(follow(f"{site.url}/stream/words", cursor="end")) == []
    site.post("/fail?times=1&status=401")
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        next(follow(f"{site.url}/stream/words"))
    assert len(site.requests("/stream/words")) == 3


def test_httpx_sse_notices_a_connection_that_is_dead(site: Site) -> None:
    with closing(recipe("follow_with_httpx")(f"{site.url}/still/x", silence=0.5)) as events:
        assert [next(events).data, next(events).data] == ["alive", "alive"]
    assert [one["header"] for one in site.requests("/still/x")] == [None, "7"]


def test_sseclient_reads_from_its_cursor(site: Site) -> None:
    read, cursor = recipe("read_with_sseclient"), site.call("last_event_id", "headlines")
    with closing(read(f"{site.url}/headlines", cursor)) as events:
        site.call("tell", 1, "世界")
        told = [next(events), next(events)]
    assert [event.event for event in told] == ["message", "count"]
    assert told[0].data == '<li id="headline-1">\n  <b>世界</b>\n</li>'
    assert told[0].id > cursor
    events = list(read(f"{site.url}/stream/words"))
    assert [event.event for event in events] == ["message"] * 3 + ["end"]


def test_sseclient_with_requests_raises_at_a_502(site: Site) -> None:
    site.post("/fail?times=1")
    with pytest.raises(OSError, match="502"):
        next(recipe("read_with_sseclient")(f"{site.url}/headlines"))


def test_sseclient_notices_a_connection_that_is_dead(site: Site) -> None:
    with closing(recipe("read_with_sseclient")(f"{site.url}/still/x", silence=0.5)) as events:
        assert next(events).data == "alive"
        with pytest.raises(OSError, match="timed out"):
            next(events)


def test_sseclient_takes_half_an_event_for_a_whole_one(site: Site) -> None:
    events = recipe("read_with_sseclient")(f"{site.url}/raw?wire={quote('data: one, tw')}")
    assert [event.data for event in events] == ["one, tw"]


# curl


def test_curl_shows_the_stream_as_the_documentation_says(site: Site, tmp_path: Path) -> None:
    [block] = re.findall(r"code-block:: bash\n\n((?:   .*\n)+)", PAGE)
    program = dedent(block).replace("http://127.0.0.1:5000", site.url)
    [shown] = re.findall(r"code-block:: text\n\n((?:   .*\n|\n)+)", PAGE)
    system_part("curl")
    done = subprocess.run(["bash", "-ec", program], capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.stderr) == (dedent(shown).strip(), "")
    [first, second] = site.requests("/stream/words")
    assert (first["header"], second["header"]) == (None, "end")


# The page


def test_every_file_of_the_recipes_is_shown(site: Site) -> None:
    shown = set(re.findall(r"literalinclude:: (?:recipes/|\.\./tests/clients/)(\S+)", PAGE))
    files = {
        path.relative_to(RECIPES).as_posix()
        for path in RECIPES.rglob("*.*")
        if path.suffix != ".pyc"
    }
    assert files <= shown


def test_the_page_names_the_versions_that_are_tested(site: Site) -> None:
    wanted = json.loads((CLIENTS / "package.json").read_text("utf-8"))["dependencies"]
    for name, version in wanted.items():
        installed = json.loads(
            (CLIENTS / "node_modules" / name / "package.json").read_text("utf-8")
        )
        assert installed["version"] == version.rpartition("@")[2]
        assert f"|{name}|" in PAGE or name in ("eventsource-parser", "openai", "zod")
