"""What the gallery of the example application promises, as two visitors see it in Chromium."""

from __future__ import annotations

import os
import re
import signal
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from example_app import create_app, log
from example_app.binary import HEIGHT, WIDTH, picture
from example_app.catalog import GROUPS
from example_app.inspector import STREAMS
from example_app.job import PARTS, primes_in

from .browser import PHONE, Visitor, number_in, reaches
from .servers import ROOT, Server, free_port, gunicorn, running, serving, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask import Flask
    from flask.testing import FlaskClient
    from playwright.sync_api import Browser, Page

    from flask_eventstream.testing import ClientStream

    OpenPage = Callable[..., Page]
    OpenStream = Callable[..., ClientStream]

pytestmark = pytest.mark.beside

PACE = {
    "LOG_SECONDS": 0.05,
    "STEP_SECONDS": 0.02,
    "FRAME_SECONDS": 0.02,
    "PULSE_SECONDS": 0.05,
    "CLOCK_SECONDS": 0.05,
    "DATA_SECONDS": 0.05,
    "NUMBER_SECONDS": 0.001,
    "EVENTSTREAM_RETRY": 200,
}

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """One process, which has a broker of its own."""
    app = f"example_app:create_app({ {**PACE, 'LOG_FILE': str(folder / 'one.log')}!r})"
    with serving(app, "gevent") as server:
        yield server
        assert server.log() == ""


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Iterator[Server]:
    """Two processes and a Redis, as ``make example`` starts them."""
    system_part("redis-server")
    config = {
        **PACE,
        "LOG_FILE": str(folder / "two.log"),
        "RIGHT_SECONDS": 1,
        "STEP_SECONDS": 0.5,
    }
    port = free_port()
    app = f"example_app:create_app({config!r})"
    script = str(ROOT / "example_app" / "with_redis.sh")
    command = ["sh", script, *gunicorn(app, "gevent", "--workers=2", port=port)]
    with running(command, port) as server:
        yield server
        assert server.log() == ""


@pytest.fixture
def visitor(new_visitor: Callable[[], Visitor]) -> Visitor:
    return new_visitor()


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return create_app({"TESTING": True, **PACE, "LOG_FILE": str(tmp_path / "own.log")})


# The menu


def test_the_menu_opens_without_a_script_and_leads_to_every_page(
    server: Server, browser: Browser
) -> None:
    page = browser.new_page(viewport=PHONE, java_script_enabled=False)  # type: ignore[arg-type]
    page.goto(f"{server.url}/binary")
    menu = page.locator("#menu")
    expect(menu).to_be_hidden()
    page.click(".menu-button")
    expect(menu.locator("a")).to_have_count(sum(len(group.examples) for group in GROUPS))
    expect(menu.locator("[aria-current]")).to_have_text("Binary")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.keyboard.press("Escape")
    expect(menu).to_be_hidden()
    page.click(".menu-button")
    menu.get_by_text("Progress").click()
    expect(page.locator("h1")).to_have_text("Progress")
    page.close()


# Notifications


def notify(page: Page, to: str, text: str) -> None:
    page.fill("#to", to)
    page.fill("#text", text)
    page.click("#send")
    expect(page.locator("#text")).to_have_value("")


def texts(page: Page) -> list[str]:
    rows = page.locator("#inbox li").all()
    return [row.evaluate("row => row.firstChild.textContent") for row in rows]


# They go after some seconds.
KEEP_TOASTS = """() => {
    window.toasts = [];
    const keep = (changes) => toasts.push(...changes.flatMap(({ addedNodes }) =>
        Array.from(addedNodes, (node) => node.textContent)));
    new MutationObserver(keep).observe(document.querySelector("#toasts"), { childList: true });
}"""


def test_only_the_addressee_is_notified_in_all_tabs_and_all_count_the_same(
    server: Server, new_visitor: Callable[[], Visitor]
) -> None:
    ann, bob = new_visitor(), new_visitor()
    page = ann.logs_in(server, "ann")
    tabs = [bob.logs_in(server, "Bob"), bob.opens(server, "/notifications")]
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("online")
        tab.evaluate(KEEP_TOASTS)
    notify(page, "bob", "你好 <b>& co</b>")
    expect(page.locator("#sent")).to_have_text("Sent. bob has 2 tabs open.")
    notify(page, "ann", "To myself.")
    notify(page, "bob", "Once more.")
    for tab in tabs:
        expect(tab.locator("#unread")).to_have_text("2 unread")
        assert tab.evaluate("toasts") == ["ann: 你好 <b>& co</b>", "ann: Once more."]
        assert texts(tab) == ["Once more.", "你好 <b>& co</b>"]
        expect(tab).to_have_title(re.compile(r"^\(2\) "))
    expect(page.locator("#unread")).to_have_text("1 unread")
    assert texts(page) == ["To myself."]
    tabs[1].click("#read")
    for tab in tabs:
        expect(tab.locator("#unread")).to_have_text("0 unread")
    notify(page, "bob", "The third.")
    tabs[0].reload()
    expect(tabs[0].locator("#unread")).to_have_text("1 unread")
    assert texts(tabs[0]) == ["The third.", "Once more.", "你好 <b>& co</b>"]
    expect(tabs[0].locator("#toasts")).to_be_empty()


def test_what_was_missed_offline_comes_in_order_and_once(
    server: Server, new_visitor: Callable[[], Visitor]
) -> None:
    page, other = new_visitor().logs_in(server, "carl"), new_visitor().logs_in(server, "dora")
    notify(other, "carl", "1")
    expect(page.locator("#unread")).to_have_text("1 unread")
    page.click("#offline")
    expect(page.locator("#state")).to_have_text("offline")
    notify(other, "carl", "2")
    notify(other, "carl", "3")
    page.click("#online")
    expect(page.locator("#unread")).to_have_text("3 unread")
    assert texts(page) == ["3", "2", "1"]
    expect(page.locator("#inbox li").first).to_contain_text("before you were here")


def test_to_log_out_ends_the_stream_of_every_tab_of_that_browser_and_of_no_other(
    server: Server, new_visitor: Callable[[], Visitor]
) -> None:
    visitor, elsewhere = new_visitor(), new_visitor()
    page, other = visitor.logs_in(server, "eve"), elsewhere.logs_in(server, "eve")
    tab = visitor.opens(server, "/notifications")
    expect(tab.locator("#state")).to_have_text("online")
    page.click("#log-out")
    expect(page.locator("#name")).to_be_visible()
    expect(tab.locator("#state")).to_have_text("logged out")
    expect(tab.locator("#problem")).to_have_text("Nobody is logged in here.")
    expect(other.locator("#state")).to_have_text("online")
    notify(other, "eve", "Still here.")
    expect(other.locator("#unread")).to_have_text("1 unread")
    assert texts(tab) == []
    # Chromium's own words for what the server refuses: the stream, and then the token.
    assert len(visitor.problems) >= 2
    assert all("401 (UNAUTHORIZED)" in problem for problem in visitor.problems)
    visitor.problems.clear()


def test_a_token_opens_its_users_channel_alone_until_he_logs_out(client: FlaskClient) -> None:
    assert client.post("/notifications/token", data={"user": "ann"}).status_code == 401
    client.post("/notifications/log_in", data={"name": "ann"})
    assert client.post("/notifications/token", data={"user": "bob"}).status_code == 401
    token = client.post("/notifications/token", data={"user": "ann"}).get_json()["token"]
    assert status_of(client, "user:ann", token) == 200
    assert status_of(client, "user:bob", token) == 403
    assert status_of(client, "user:ann", "") == 403
    client.post("/notifications/log_out")
    assert status_of(client, "user:ann", token) == 401


def status_of(client: FlaskClient, channel: str, token: str) -> int:
    query = {"channel": channel, **({"token": token} if token else {})}
    return client.head("/stream", query_string=query).status_code


@pytest.mark.parametrize("name", ["", "a b", "x" * 21, "user:ann"])
def test_a_name_that_is_none_is_refused(client: FlaskClient, name: str) -> None:
    response = client.post("/notifications/log_in", data={"name": name})
    assert (response.status_code, response.mimetype) == (400, "text/plain")


def test_a_token_that_expires_is_replaced_and_nothing_is_lost(
    two_processes: Server, new_visitor: Callable[[], Visitor]
) -> None:
    reader, writer = new_visitor(), new_visitor()
    page = reader.logs_in(two_processes, "ann")
    other = writer.logs_in(two_processes, "bob")
    sent = 0
    while number_in(page, "#tokens") < 2:
        sent += 1
        notify(other, "ann", f"{sent}")
    expect(page.locator("#inbox li")).to_have_count(sent)
    assert texts(page) == [str(number) for number in range(sent, 0, -1)]
    # Chromium's own words for what the server refuses once a token has expired.
    for one in (reader, writer):
        assert all("401 (UNAUTHORIZED)" in problem for problem in one.problems)
        one.problems.clear()


# Log


def follows_without_a_hole(page: Page) -> None:
    expect(page.locator("#lost")).to_have_text("0")
    expect(page.locator("#twice")).to_have_text("0")
    first, last, count = page.evaluate(
        """() => [...document.querySelector("#range").textContent.split(" to "),
                  document.querySelector("#count").textContent].map(Number)"""
    )
    assert count == last - first + 1


def test_a_log_goes_on_where_it_was_paused_though_much_was_written(
    two_processes: Server, visitor: Visitor
) -> None:
    page = visitor.opens(two_processes, "/log")
    reaches(page, "#count", 5)
    page.click("#pause")
    expect(page.locator("#state")).to_have_text("paused")
    before = number_in(page, "#count")
    page.click("#burst")
    with page.expect_request("**/log/lines") as returning:
        page.click("#pause")
    assert re.fullmatch(r"\d+-\d+", returning.value.headers["last-event-id"])
    reaches(page, "#count", before + log.BURST)
    follows_without_a_hole(page)


def test_a_slow_reader_loses_nothing_and_catches_up(server: Server, visitor: Visitor) -> None:
    page = visitor.opens(server, "/log")
    reaches(page, "#count", 1)
    page.check("#slow")
    page.click("#burst")
    reaches(page, "#count", 3)
    assert number_in(page, "#count") < log.BURST
    page.uncheck("#slow")
    reaches(page, "#count", log.BURST)
    follows_without_a_hole(page)


def test_a_filter_shows_the_lines_that_have_it(server: Server, visitor: Visitor) -> None:
    page = visitor.opens(server, "/log")
    page.click("#burst")
    reaches(page, "#count", 100)
    page.click("#pause")
    page.fill("#filter", "warning")
    shown = page.locator("#lines li:visible")
    assert 0 < shown.count() < page.locator("#lines li").count()
    assert all("WARNING" in text for text in shown.all_text_contents())


def test_a_follower_reads_a_file_to_its_end_and_then_the_one_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.log"
    monkeypatch.setattr(log, "MAX_BYTES", 500)
    log.append(path, 5)
    with closing(log.Tail(path)) as tail:
        assert tail.starts_at(None)
        assert numbers_in(tail) == [1, 2, 3, 4, 5]
        log.append(path, 5)
        log.append(path, 5)  # in a new file
        assert numbers_in(tail) + numbers_in(tail) == list(range(6, 16))


def test_half_a_line_is_left_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "half.log"
    path.write_text("1 one\n2 t")
    with closing(log.Tail(path)) as tail, path.open("a") as file:
        assert list(tail.new_lines()) == [("1-6", "1 one")]
        file.write("wo\n")
        file.flush()
        assert list(tail.new_lines()) == [("1-12", "2 two")]


def numbers_in(tail: log.Tail) -> list[int]:
    return [int(line.split()[0]) for _, line in tail.new_lines()]


def test_a_cursor_of_a_file_that_is_gone_is_told_by_a_reset(
    app: Flask, event_stream: OpenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = event_stream("/log/lines").next()
    cursor = {"Last-Event-ID": first.id or ""}
    assert event_stream("/log/lines", headers=cursor).next().type == "message"
    monkeypatch.setattr(log, "MAX_BYTES", 0)
    # Whoever comes now has a line written, which replaces the file.
    event = event_stream("/log/lines", headers=cursor).next()
    assert event.type == "reset"
    assert str(first.id) in event.data


@pytest.mark.parametrize("cursor", ["", "x", "1-x", "1-999999", "2-0", "1-²", "1--1"])
def test_a_cursor_that_is_none_is_told_by_a_reset(tmp_path: Path, cursor: str) -> None:
    log.append(tmp_path / "own.log", 1)
    with closing(log.Tail(tmp_path / "own.log")) as tail:
        assert not tail.starts_at(cursor)
        assert numbers_in(tail) == [1]


# Progress


def start_jobs(page: Page, number: int) -> None:
    for count in range(1, number + 1):
        page.click("#start")
        expect(page.locator("#jobs li")).to_have_count(count)


def test_jobs_run_at_once_and_a_reload_finds_them_with_their_results(
    server: Server, new_visitor: Callable[[], Visitor]
) -> None:
    page, stranger = (new_visitor().opens(server, "/progress") for _ in range(2))
    expect(page.locator("#where")).to_contain_text("In threads of the server")
    page.select_option("#limit", "10000")
    start_jobs(page, 3)
    for _ in range(2):
        expect(page.locator("#jobs .badge")).to_have_text(["finished"] * 3)
        expect(page.locator("#jobs .words")).to_have_text(["1,229 primes."] * 3)
        assert page.locator("progress").first.evaluate("bar => bar.value") == 100
        page.reload()
    expect(stranger.locator("#state")).to_have_text("open")
    expect(stranger.locator("#jobs li")).to_have_count(0)


def test_jobs_of_other_processes_are_told_of_also_if_one_dies(
    two_processes: Server, visitor: Visitor
) -> None:
    page = visitor.opens(two_processes, "/progress")
    expect(page.locator("#where")).to_contain_text("Each in a process of its own")
    start_jobs(page, 2)
    expect(page.locator("#jobs .badge")).to_have_text(["running", "running"])
    processes = [number_in(page, f"#jobs li:nth-child({n}) .where") for n in (1, 2)]
    page.reload()
    expect(page.locator("#jobs .badge")).to_have_text(["running", "running"])
    os.kill(processes[0], signal.SIGKILL)
    page.locator(".cancel").nth(1).click()
    expect(page.locator("#jobs .badge")).to_have_text(["failed", "cancelled"])
    expect(page.locator("#jobs .words").first).to_have_text("Its process has died.")


def test_the_parts_of_a_job_find_every_prime() -> None:
    for limit, primes in [(10_000, 1_229), (100_000, 9_592)]:
        size = limit // PARTS
        assert sum(primes_in(part * size, (part + 1) * size) for part in range(PARTS)) == primes


def test_one_job_can_be_watched_by_whoever_knows_its_id(
    client: FlaskClient, event_stream: OpenStream
) -> None:
    id = client.post("/progress/jobs", data={"limit": "10000"}).get_json()["id"]
    stream = event_stream(f"/progress/jobs/{id}")
    while '"finished"' not in (event := stream.next()).data:
        assert f'"id": "{id}"' in event.data
    assert "1,229 primes." in event.data


def test_a_job_that_is_none_and_one_too_many_are_refused(app: Flask, client: FlaskClient) -> None:
    assert client.post("/progress/jobs", data={"limit": "7"}).status_code == 400
    app.config["STEP_SECONDS"] = 20
    started = [client.post("/progress/jobs", data={"limit": "10000"}) for _ in range(5)]
    assert [response.status_code for response in started] == [200, 200, 200, 200, 429]
    for response in started[:4]:
        client.post(f"/progress/jobs/{response.get_json()['id']}/cancel")
    wait_for(lambda: not app.extensions["jobs"])


# Binary


@pytest.mark.parametrize("is_gzipped", [True, False])
def test_the_canvas_shows_the_servers_pixels(
    server: Server, visitor: Visitor, is_gzipped: bool
) -> None:
    page = visitor.opens(server, "/binary")
    page.set_checked("#gzip", is_gzipped)
    share = page.locator("#ratio")
    expect(share).to_have_text(re.compile("^2[0-9] %$") if is_gzipped else "133 %")
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("closed")
    number, pixels = page.evaluate(
        f"""() => [Number(document.querySelector("#number").textContent), Array.from(
            document.querySelector("#canvas").getContext("2d")
                .getImageData(0, 0, {WIDTH}, {HEIGHT}).data)]"""
    )
    assert bytes(pixels) == picture(number)
    expect(page.locator("#raw")).to_have_text("76,800 bytes")


# Inspector


def test_the_inspector_shows_everything_and_goes_on_after_a_cut(
    server: Server, visitor: Visitor
) -> None:
    page = visitor.opens(server, "/inspector")
    reaches(page, "#events", 3)
    reaches(page, "#comments", 2)
    expect(page.locator("#retry")).to_have_text("1000 ms")
    expect(page.locator("#median")).to_have_text(re.compile(r"^-?\d+\.\d ms$"))
    with page.expect_request("**/inspector/pulse") as returning:
        page.click("#cut")
    seen = int(returning.value.headers["last-event-id"])
    reaches(page, "#cursor", seen + 2)
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#reconnects")).to_have_text("1")
    ids = page.locator("#rows tr:not(.comment) td:nth-child(3)").all_text_contents()
    numbers = [int(id) for id in reversed(ids) if id]
    assert numbers == list(range(1, numbers[-1] + 1))
    page.locator("#rows tr", has_text="greeting").last.locator("button").click()
    expect(page.locator("#raw")).to_contain_text("retry: 1000.even")
    sizes = page.locator("#rows td:nth-child(4)").all_text_contents()
    assert sum(map(int, sizes)) == number_in(page, "#bytes")


def test_the_inspector_reads_every_stream_of_its_list(server: Server, visitor: Visitor) -> None:
    page = visitor.opens(server, "/inspector")
    for url in STREAMS:
        page.select_option("#stream", url)
        page.click("#connect")
        expect(page.locator("#rows tr").nth(0)).to_be_attached()
        assert number_in(page, "#bytes") > 0
    page.select_option("#stream", "/examples/numbers?last=200")
    page.click("#connect")
    expect(page.locator("#state")).to_have_text("finished")
    expect(page.locator("#events")).to_have_text("201")
