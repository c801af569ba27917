"""The example application, as its visitors see it: in Chromium, served by gunicorn."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import signal
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from example_app import create_app, streams
from example_app.catalog import EXAMPLES
from example_app.model import answer

from .servers import (
    DEADLINE,
    ROOT,
    Server,
    free_port,
    gunicorn,
    running,
    serving,
    system_part,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask.testing import FlaskClient
    from playwright.sync_api import Browser, BrowserContext, Page, Route

    from flask_eventstream.testing import ClientStream

    from .redis_server import RedisServer

    OpenPage = Callable[[str], Page]
    OpenStream = Callable[..., ClientStream]

# Slow enough that Stop comes in the middle of an answer, and fast enough for a test.
PACE = {
    "TOKEN_SECONDS": 0.03,
    "CLOCK_SECONDS": 0.1,
    "DATA_SECONDS": 0.1,
    "HEARTBEAT_SECONDS": 0.3,
    "NUMBER_SECONDS": 0.005,
    "EVENTSTREAM_RETRY": 200,
}
APP = f"example_app:create_app({PACE!r})"
# One whose answers take ten seconds, for what has to come in the middle of one.
SLOW_APP = f"example_app:create_app({ {**PACE, 'TOKEN_SECONDS': 0.1}!r})"
PROMPT = "What is an event stream?"
ANSWER = list(answer(PROMPT))
PATHS = ["/", *(f"/{example.name}" for example in EXAMPLES)]
MODULES = ROOT / "example_app" / "static" / "js"
# Without those that begin with an id from an earlier connection: the parser is for one response.
CASES = [
    case
    for case in json.loads((Path(__file__).parent / "parser_cases.json").read_text("utf-8"))
    if "initial_last_event_id" not in case
]

expect.set_options(timeout=DEADLINE * 1000)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(APP, "gevent") as server:
        yield server
        assert server.log() == ""


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Server]:
    with serving(SLOW_APP, "gevent") as server:
        yield server
        assert server.log() == ""


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 360, "height": 700})
    context.set_default_timeout(DEADLINE * 1000)
    yield context
    context.close()


@pytest.fixture
def open_page(server: Server, context: BrowserContext) -> Iterator[OpenPage]:
    """Open pages, none of which may report an error or ask any other server."""
    problems: list[str] = []
    urls: list[str] = []
    context.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("request", lambda request: urls.append(request.url))

    def open_one(path: str) -> Page:
        page = context.new_page()
        page.goto(server.url + path)
        return page

    yield open_one
    assert problems == []
    assert [url for url in urls if not url.startswith(server.url + "/")] == []


@pytest.fixture
def client() -> FlaskClient:
    return create_app({"TESTING": True, **PACE}).test_client()


def send(server: Server, message: str) -> None:
    query = urllib.parse.urlencode({"message": message})
    with urllib.request.urlopen(f"{server.url}/send_message?{query}", timeout=DEADLINE) as response:
        assert response.status == 200


def width(page: Page) -> int:
    scroll_width: int = page.evaluate("document.documentElement.scrollWidth")
    return scroll_width


# Every page


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_html_that_loads_only_from_its_own_origin(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    assert response.headers["Content-Security-Policy"] == "default-src 'self'"


@pytest.mark.parametrize("path", PATHS)
def test_a_page_fits_a_phone(open_page: OpenPage, path: str) -> None:
    page = open_page(path)
    expect(page.locator("h1")).to_be_visible()
    assert width(page) <= 360


def test_the_index_links_to_every_page(open_page: OpenPage) -> None:
    page = open_page("/")
    for example in EXAMPLES:
        page.locator(f".card[href='/{example.name}']").click()
        expect(page.locator("h1")).to_have_text(example.title)
        page.locator(".brand").click()


def test_a_page_shows_the_source_that_runs(open_page: OpenPage) -> None:
    page = open_page("/typewriter")
    shown = page.locator("#server-source").text_content() or ""
    assert inspect.getsource(streams.typewriter).strip() in shown
    for name, id in [("typewriter", "client"), ("read-events", "parser")]:
        source = (MODULES / f"{name}.js").read_text("utf-8")
        assert (page.locator(f"#{id}-source").text_content() or "").strip() == source.strip()


def test_what_is_not_there_is_said_in_words(client: FlaskClient) -> None:
    response = client.get("/nowhere")
    assert (response.status_code, response.mimetype) == (404, "text/plain")


# Typewriter


def test_the_model_answers_a_prompt_always_the_same() -> None:
    answers = [list(answer(str(number))) for number in range(50)]
    assert answers == [list(answer(str(number))) for number in range(50)]
    assert all(80 <= len(tokens) <= 120 for tokens in answers)
    assert len({"".join(tokens) for tokens in answers}) == 50


def test_the_answer_to_the_tests_prompt_has_chinese_emoji_and_line_ends() -> None:
    text = "".join(ANSWER)
    assert re.search("[\u4e00-\u9fff]", text)
    assert re.search("[\U0001f300-\U0001faff]", text)
    assert "\n" in text


def test_typewriter_shows_the_answer_character_for_character(open_page: OpenPage) -> None:
    page = open_page("/typewriter")
    page.fill("#prompt", PROMPT)
    page.click("#fetch")
    expect(page.locator("#state")).to_have_text("finished")
    assert page.locator("#answer").text_content() == "".join(ANSWER)
    report = f"The generator ran to its end, after {len(ANSWER)} tokens."
    expect(page.locator("#report")).to_have_text(report)
    expect(page.locator("#started")).to_have_text("1")


@pytest.mark.parametrize("button", ["fetch", "eventsource"])
def test_stop_closes_the_generator_at_once_and_the_page_says_so(
    slow_server: Server, context: BrowserContext, button: str
) -> None:
    stop_in_the_middle(slow_server, context, button)


def test_stop_closes_the_generator_on_a_threaded_server_too(context: BrowserContext) -> None:
    with serving(SLOW_APP, "gthread", "--threads", "32") as server:
        stop_in_the_middle(server, context, "fetch")
        context.close()


def stop_in_the_middle(server: Server, context: BrowserContext, button: str) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/typewriter")
    page.fill("#prompt", PROMPT)
    page.click(f"#{button}")
    expect(page.locator("#answer")).to_contain_text("".join(ANSWER[:5]))
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped")
    closed = re.compile(r"The server closed the generator after \d+ tokens\.")
    # Or it says that the generator ran to its end.
    expect(page.locator("#report")).to_have_text(closed)
    tokens = int(re.sub(r"\D", "", page.locator("#report").text_content() or ""))
    assert 5 <= tokens < len(ANSWER)
    assert "".join(ANSWER[:tokens]).startswith(page.locator("#answer").text_content() or "?")


def test_an_event_source_does_not_start_the_generator_again_after_its_end(
    open_page: OpenPage,
) -> None:
    page = open_page("/typewriter")
    statuses: list[int] = []
    page.on("response", lambda got: statuses.append(got.status) if "?prompt=" in got.url else None)
    page.fill("#prompt", PROMPT)
    page.click("#eventsource")
    expect(page.locator("#state")).to_have_text("complete")
    expect(page.locator(".reconnecting")).to_be_visible()
    # Seconds later, when the browser has reconnected: from this state it never does again.
    expect(page.locator("#state")).to_have_text("finished")
    assert statuses == [200, 204]
    assert page.locator("#answer").text_content() == "".join(ANSWER)
    expect(page.locator("#started")).to_have_text("1")


def test_each_question_starts_the_generator_once(open_page: OpenPage) -> None:
    page = open_page("/typewriter")
    for started in ["1", "2"]:
        page.click("#fetch")
        expect(page.locator("#started")).to_have_text(started)
        page.click("#stop")
        expect(page.locator("#report")).to_contain_text("closed")


@pytest.mark.parametrize("sent", [{}, {"prompt": " "}, {"prompt": 5}, {"prompt": "x" * 501}])
def test_a_prompt_that_is_none_is_a_bad_request(client: FlaskClient, sent: dict[str, Any]) -> None:
    url = "/examples/typewriter/00000000-0000-4000-8000-000000000000"
    response = client.post(url, json=sent)
    assert (response.status_code, response.mimetype) == (400, "text/plain")
    assert response.text.startswith("The prompt is")


# Clock


def test_clock_shows_every_ready_state(open_page: OpenPage) -> None:
    page = open_page("/clock")
    expect(page.locator("#state")).to_have_text("OPEN (1)")
    expect(page.locator("#id")).to_have_text(re.compile(r"^[1-9]\d*$"))
    expect(page.locator("#time")).to_have_text(re.compile(r"\d+:\d\d:\d\d"))
    page.click("#disconnect")
    expect(page.locator("#state")).to_have_text("CLOSED (2)")
    page.click("#connect")
    expect(page.locator("#transitions")).to_have_text("CONNECTING OPEN CLOSED CONNECTING OPEN")
    expect(page.locator("#state")).to_have_text("OPEN (1)")


def test_clock_sends_custom_events_with_id_and_retry(open_page: OpenPage) -> None:
    event = open_page("/").evaluate(
        """async () => {
            const { readEvents } = await import("/static/js/read-events.js");
            const response = await fetch("/examples/clock");
            for await (const event of readEvents(response.body)) return event;
        }"""
    )
    assert (event["type"], event["lastEventId"], event["retry"]) == ("customEvent", "1", 1000)


def test_clock_counts_on_from_the_last_event_id(event_stream: OpenStream) -> None:
    stream = event_stream("/examples/clock", headers={"Last-Event-ID": "41"})
    assert [stream.next().id, stream.next().id] == ["42", "43"]


def test_clock_ignores_a_last_event_id_that_is_no_number(event_stream: OpenStream) -> None:
    assert event_stream("/examples/clock", headers={"Last-Event-ID": "x"}).next().id == "1"


# Interval and heartbeat


def test_interval_merges_data_and_heartbeats(open_page: OpenPage) -> None:
    page = open_page("/interval")
    expect(page.locator("#state")).to_have_text("open")
    expect(page.locator("#heartbeat")).to_have_text(re.compile(r"^([2-9]|\d\d+)$"))
    assert int(page.locator("#data").text_content() or 0) >= 3
    assert page.locator("#log .data").count() > page.locator("#log .heartbeat").count() > 0


# Broadcast


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "GET", "query_string": {"message": "Hello!"}},
        {"method": "POST", "query_string": {"message": "Hello!"}},
        {"method": "POST", "data": {"message": "Hello!"}},
        {"method": "POST", "json": {"message": "Hello!"}},
    ],
)
def test_send_message_publishes(
    client: FlaskClient, event_stream: OpenStream, request_: dict[str, Any]
) -> None:
    stream = event_stream("/stream")
    response = client.open("/send_message", **request_)
    event = stream.next()
    assert response.json == {"id": event.id}
    assert json.loads(event.data)["message"] == "Hello!"


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"data": {"message": " "}},
        {"json": {"message": 5}},
        {"json": ["message"]},
        {"data": {"message": "x" * 501}},
        {"data": "{", "content_type": "application/json"},
    ],
)
def test_send_message_refuses_what_is_no_message(
    client: FlaskClient, request_: dict[str, Any]
) -> None:
    response = client.post("/send_message", **request_)
    assert (response.status_code, response.mimetype) == (400, "text/plain")
    assert response.text.startswith("The message is")


def test_half_a_character_does_not_break_a_stream(
    client: FlaskClient, event_stream: OpenStream
) -> None:
    stream = event_stream("/stream")
    client.post("/send_message", data=r'{"message": "\ud83d!"}', content_type="application/json")
    assert json.loads(stream.next().data)["message"] == "?!"


def test_a_message_from_one_tab_arrives_in_another(server: Server, open_page: OpenPage) -> None:
    tabs = [open_page("/broadcast"), open_page("/broadcast")]
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("online")
    tabs[0].fill("#message", "你好 👩‍💻 <b>& co</b>")
    tabs[0].click("#send")
    for tab in tabs:
        expect(tab.locator("#messages li")).to_have_text(["你好 👩‍💻 <b>& co</b>"])
    send(server, "from the address bar")
    for tab in tabs:
        expect(tab.locator("#messages li")).to_have_text(
            [re.compile("你好"), "from the address bar"]
        )
    ids = {tab.locator("#last-event-id").text_content() for tab in tabs}
    assert len(ids) == 1


def test_a_tab_gets_what_it_missed_while_offline_in_order_and_once(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page("/broadcast")
    expect(page.locator("#state")).to_have_text("online")
    send(server, "before")
    expect(page.locator("#messages li")).to_have_text(["before"])
    page.click("#offline")
    expect(page.locator("#state")).to_have_text("offline")
    for number in range(3):
        send(server, f"missed {number}.")
    page.click("#online")
    missed = [f"missed {number}.missed while offline" for number in range(3)]
    expect(page.locator("#messages .missed")).to_have_text(missed)
    send(server, "after")
    expect(page.locator("#messages li")).to_have_text(["before", *missed, "after"])


def test_nothing_is_lost_between_the_page_and_its_connection(
    server: Server, context: BrowserContext, open_page: OpenPage
) -> None:
    def publish_first(route: Route) -> None:
        send(server, "sent while the page was loading")
        route.continue_()

    context.route("**/broadcast.js", publish_first)
    page = open_page("/broadcast")
    expect(page.locator("#messages li")).to_have_text(["sent while the page was loading"])


def test_a_long_word_does_not_widen_the_page(open_page: OpenPage) -> None:
    page = open_page("/broadcast")
    expect(page.locator("#state")).to_have_text("online")
    page.fill("#message", "x" * 500)
    page.click("#send")
    expect(page.locator("#messages li")).to_have_count(1)
    assert width(page) <= 360


def test_a_subscriber_is_open_before_any_event(open_page: OpenPage) -> None:
    first = open_page("/").evaluate(
        """() => new Promise((resolve) => {
            const source = new EventSource("/stream");
            source.onopen = source.onmessage = source.onerror = (event) => {
                source.close();
                resolve(event.type);
            };
            setTimeout(resolve, 5000, "nothing");
        })"""
    )
    assert first == "open"


def test_broadcast_survives_a_restart_and_says_what_is_gone(context: BrowserContext) -> None:
    with serving(APP, "gevent") as server:
        page = context.new_page()
        page.goto(f"{server.url}/broadcast")
        expect(page.locator("#state")).to_have_text("online")
        send(server, "before")
        expect(page.locator("#messages li")).to_have_text(["before"])
        last_event_id = page.locator("#last-event-id").text_content()
        server.stop()
        expect(page.locator("#state")).to_have_text("connecting")
        server.start()
        # It is not the cursor of the page's URL: the browser has sent Last-Event-ID.
        gone = f"Something is gone: what came after {last_event_id}."
        expect(page.locator("#messages .reset")).to_contain_text(gone)
        send(server, "after")
        expect(page.locator("#messages li")).to_have_text(["before", re.compile(gone), "after"])
        context.close()


@pytest.fixture
def many_processes() -> Iterator[Server]:
    """The example with four processes and a Redis of its own, as ``make example`` starts it."""
    system_part("redis-server")
    port = free_port()
    script = str(ROOT / "example_app" / "with_redis.sh")
    # gunicorn does not stop a worker that has only just begun, but kills it after that time.
    options = ["--workers=4", "--graceful-timeout=1"]
    with running(["sh", script, *gunicorn(APP, "gevent", *options, port=port)], port) as one:
        yield one


def test_tabs_of_all_processes_get_every_message(
    many_processes: Server, context: BrowserContext
) -> None:
    server = many_processes
    tabs: dict[str, Page] = {}
    # The kernel chooses the process, so that it may take some tabs until there are two.
    for _ in range(40):
        page = context.new_page()
        page.goto(f"{server.url}/broadcast")
        expect(page.locator("#process")).to_have_text(re.compile(r"^\d+$"))
        process = page.locator("#process").text_content() or ""
        if tabs.setdefault(process, page) is not page:
            page.close()
        if len(tabs) == 2:
            break
    assert len(tabs) == 2
    for number in range(8):
        send(server, f"{number}.")
    for page in tabs.values():
        expect(page.locator("#messages li")).to_have_text([f"{number}." for number in range(8)])


def test_the_redis_of_the_example_ends_with_it(many_processes: Server) -> None:
    shell = many_processes.process.pid
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    [redis] = [pid for pid in children if "redis-server" in command_of(pid)]
    many_processes.stop()
    assert many_processes.process.returncode is not None
    wait_for(lambda: not Path(f"/proc/{redis}").exists())


def command_of(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_clock_survives_a_restart_and_counts_on(context: BrowserContext) -> None:
    with serving(APP, "gevent") as server:
        page = context.new_page()
        page.goto(f"{server.url}/clock")
        expect(page.locator("#id")).to_have_text(re.compile(r"^\d+$"))
        server.stop()
        expect(page.locator("#state")).to_have_text("CONNECTING (0)")
        seen = int(page.locator("#id").text_content() or 0)
        server.start()
        expect(page.locator("#state")).to_have_text("OPEN (1)")
        expect(page.locator("#id")).not_to_have_text(str(seen))
        assert int(page.locator("#id").text_content() or 0) > seen
        context.close()


# Resume


def text_in(page: Page) -> str:
    return page.locator("#answer").text_content() or ""


RUN_URL = "**/examples/resume/*"


def ask(page: Page) -> None:
    """Ask, and return in the middle of the answer."""
    page.fill("#prompt", PROMPT)
    page.click("#ask")
    expect(page.locator("#answer")).to_contain_text("".join(ANSWER[:5]))


def test_an_answer_survives_a_reload_a_killed_connection_and_a_lost_network(
    slow_server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{slow_server.url}/resume")
    expect(page.locator("#state")).to_have_text("idle")
    ask(page)
    page.reload()
    expect(page.locator("#answer")).to_contain_text("".join(ANSWER[:5]))
    with page.expect_request(RUN_URL) as returning:
        page.click("#kill")
    assert returning.value.headers["last-event-id"]
    expect(page.locator("#reconnects")).to_have_text("1")
    # As from a proxy that has no server for a moment. The page begins anew.
    page.route(RUN_URL, lambda route: route.fulfill(status=404), times=1)
    page.click("#kill")
    expect(page.locator("#reconnects")).to_have_text("0")
    expect(page.locator("#state")).to_have_text("writing")
    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("connecting")
    context.set_offline(False)
    expect(page.locator("#state")).to_have_text("complete")
    assert text_in(page) == "".join(ANSWER)
    # One that says that it has started, the tokens, and the end: each once.
    events = 1 + len(ANSWER) + 1
    expect(page.locator("#events")).to_have_text(str(events))
    expect(page.locator("#cursor")).to_have_text(re.compile(rf"^[\w-]+\.{events}$"))
    expect(page.locator("#prompt")).to_have_value(PROMPT)


def test_stop_in_one_tab_stops_in_all_of_them_and_all_keep_the_same_text(
    slow_server: Server, context: BrowserContext
) -> None:
    first = context.new_page()
    first.goto(f"{slow_server.url}/resume")
    ask(first)
    with context.expect_page() as opening:
        first.click("#here")
    second = opening.value
    expect(second.locator("#answer")).to_contain_text("".join(ANSWER[:5]))
    second.click("#stop")
    tabs = [first, second]
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("cancelled")
        expect(tab.locator("#words")).to_contain_text("was stopped")
    first.reload()
    expect(first.locator("#state")).to_have_text("cancelled")
    [text] = {text_in(tab) for tab in tabs}
    assert text.startswith("".join(ANSWER[:5]))
    assert "".join(ANSWER[:-1]).startswith(text)


def test_the_page_says_why_nothing_was_begun(server: Server, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/resume")
    page.fill("#prompt", " ")
    page.click("#ask")
    expect(page.locator("#problem")).to_have_text("The prompt is empty.")
    context.set_offline(True)
    page.fill("#prompt", PROMPT)
    page.click("#ask")
    expect(page.locator("#problem")).to_have_text("Failed to fetch")
    expect(page.locator("#state")).to_have_text("failed")


def test_an_answer_is_lost_with_its_process_and_the_page_says_so(context: BrowserContext) -> None:
    # A log so short, and a pause so long, that a connection that is killed has missed something.
    short = {
        **PACE,
        "TOKEN_SECONDS": 0.1,
        "EVENTSTREAM_MAX_RUN_BYTES": 1000,
        "EVENTSTREAM_RETRY": 2000,
    }
    app = f"example_app:create_app({short!r})"
    with serving(app, "gthread", "--threads", "32") as server:
        page = context.new_page()
        page.goto(f"{server.url}/resume")
        ask(page)
        kill(page.locator("#writer").text_content())
        expect(page.locator("#state")).to_have_text("connecting")
        text = text_in(page)
        expect(page.locator("#state")).to_have_text("lost")
        expect(page.locator("#words")).to_contain_text("the server that wrote this is gone")
        assert text_in(page) == text
        assert "".join(ANSWER).startswith(text)
        expect(page.locator("#ask")).to_have_text("Ask again")
        ask(page)
        page.click("#kill")
        expect(page.locator("#problem")).to_contain_text("The beginning of this answer")
        text = text_in(page)
        assert text in "".join(ANSWER)
        assert "".join(ANSWER[:5]) not in text
        context.close()


def test_an_answer_is_read_to_its_end_though_the_process_that_serves_it_is_killed(
    redis: RedisServer, context: BrowserContext
) -> None:
    config = {
        "TOKEN_SECONDS": 0.1,
        "EVENTSTREAM_KEY_PREFIX": redis.prefix(),
        "EVENTSTREAM_RETRY": 20,
        "EVENTSTREAM_RUN_LEASE": 3,
    }
    app = f"example_app:create_app({config!r})"
    with serving(app, "gevent", "--workers=2", environ={"REDIS_URL": redis.url}) as server:
        page = context.new_page()
        page.goto(f"{server.url}/resume")
        ask(page)
        reader = page.evaluate(READ_THROUGH_ANOTHER_PROCESS)
        assert reader != page.locator("#writer").text_content()
        kill(reader)
        expect(page.locator("#state")).to_have_text("complete")
        assert text_in(page) == "".join(ANSWER)
        # The one that writes cannot be replaced.
        ask(page)
        kill(page.locator("#writer").text_content())
        expect(page.locator("#state")).to_have_text("lost")
        assert text_in(page).startswith("".join(ANSWER[:5]))
        assert "".join(ANSWER[:-1]).startswith(text_in(page))
        context.close()


READ_THROUGH_ANOTHER_PROCESS = """async () => {
    const [kill, writer, reader] = document.querySelectorAll("#kill, #writer, #reader");
    for (let tries = 0; tries < 1000 && reader.textContent === writer.textContent; tries++) {
        kill.click();
        await new Promise((resolve) => setTimeout(resolve, 10));
    }
    return reader.textContent;
}"""


def kill(pid: str | None) -> None:
    os.kill(int(pid or ""), signal.SIGKILL)


# Numbers


def test_numbers_are_counted(open_page: OpenPage) -> None:
    page = open_page("/numbers")
    page.fill("#first", "-3")
    page.fill("#last", "30")
    page.click("#count")
    expect(page.locator("#state")).to_have_text("finished")
    expect(page.locator("#numbers li")).to_have_text([str(number) for number in range(-3, 31)])


def test_numbers_stop_when_they_are_told_to(open_page: OpenPage) -> None:
    page = open_page("/numbers")
    page.fill("#last", "9999")
    page.click("#count")
    expect(page.locator("#numbers li").nth(5)).to_be_attached()
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped")
    assert page.locator("#numbers li").count() < 9999


@pytest.mark.parametrize("query", ["first=2&last=1", "first=1&last=10001"])
def test_numbers_refuse_to_count_down_or_for_ever(client: FlaskClient, query: str) -> None:
    response = client.get(f"/examples/numbers?{query}")
    assert (response.status_code, response.text[:14]) == (400, "Count upwards,")


# The parser in read-events.js


READ_CASES = """async (cases) => {
    const { readEvents } = await import("/static/js/read-events.js");
    const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const body = (chunks) => new ReadableStream({
        start(controller) {
            for (const chunk of chunks) controller.enqueue(bytes(chunk));
            controller.close();
        },
    });
    const read = async (chunks) => {
        const events = [];
        for await (const { type, data, lastEventId } of readEvents(body(chunks))) {
            events.push({ event: type, data, id: lastEventId });
        }
        return events;
    };
    const results = [];
    for (const chunks of cases) results.push(await read(chunks));
    return results;
}"""


@pytest.mark.parametrize("is_byte_by_byte", [False, True])
def test_the_parser_reads_what_the_standard_and_its_peers_demand(
    open_page: OpenPage, is_byte_by_byte: bool
) -> None:
    chunks = [byte_by_byte(case) if is_byte_by_byte else case["chunks"] for case in CASES]
    results = open_page("/").evaluate(READ_CASES, chunks)
    wrong = [
        (case["source"], case["name"], got, case["events"])
        for case, got in zip(CASES, results, strict=True)
        if got != case["events"]
    ]
    assert wrong == []


def byte_by_byte(case: dict[str, Any]) -> list[str]:
    stream = b"".join(base64.b64decode(chunk) for chunk in case["chunks"])
    return [base64.b64encode(bytes([byte])).decode() for byte in stream]
