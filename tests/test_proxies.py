"""What the documentation says of proxies, with each of them and the configuration shown there."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .canned import canned
from .proxies import AT_ONCE, KINDS, TIMEOUT, app, connection_to, nginx, proxy, reading
from .servers import Server, serving, wait_for
from .test_clients import publish, state
from .test_stress import drop_all_packets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.beside

EVENT_STREAM = {"Accept": "text/event-stream"}
EVERY_PROXY = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def quiet() -> Iterator[Server]:
    """An app whose heartbeats push nothing through: what arrives has come by itself."""
    with app(heartbeat=60) as server:
        yield server


@pytest.fixture(scope="module")
def beating() -> Iterator[Server]:
    with app(heartbeat=0.1) as server:
        yield server


def subscribers(server: Server) -> int:
    count: int = state(server)["subscribers"]
    return count


def becomes(server: Server, number: int) -> None:
    wait_for(lambda: subscribers(server) == number, what=f"{number} subscribers")


# Events


def seconds_of_events(server: Server, proxied: Server) -> list[float]:
    """Return how long each of some events takes, from before it is published."""
    seconds = []
    with reading(proxied) as reader:
        assert reader.chunk().startswith(b":\nretry: ")
        for n in range(5):
            start = time.monotonic()
            id = publish(server, {"n": n})
            event = reader.event()
            seconds.append(time.monotonic() - start)
            assert (event.id, event.data) == (id, f'{{"n": {n}}}')
    return seconds


def hands_on_at_once(server: Server, proxied: Server) -> None:
    # The fastest event, and more of them if need be, as the machine may be busy. What a proxy holds
    # back, it does each time.
    wait_for(lambda: min(seconds_of_events(server, proxied)) < 0.1, what="an event at once")


@EVERY_PROXY
def test_the_first_bytes_and_each_event_arrive_at_once(
    quiet: Server, tmp_path: Path, name: str
) -> None:
    with proxy(name, tmp_path, quiet.port) as proxied:
        hands_on_at_once(quiet, proxied)
        with reading(proxied, "/stream/ticks") as reader:
            assert [reader.event().data for _ in range(2)] == ["0", "1"]


def test_without_its_option_haproxy_holds_each_event_back(quiet: Server, tmp_path: Path) -> None:
    change = ("option http-no-delay", "no option http-no-delay")
    with proxy("haproxy", tmp_path, quiet.port, change) as proxied:
        assert min(seconds_of_events(quiet, proxied)) > 0.15


@EVERY_PROXY
def test_heartbeats_keep_a_silent_stream_open(beating: Server, tmp_path: Path, name: str) -> None:
    with proxy(name, tmp_path, beating.port, timeout=TIMEOUT) as proxied:
        # Once more if need be: a busy machine may hold a heartbeat up for as long, but not each
        # time.
        wait_for(lambda: stays_open(beating, proxied), what="a stream that the proxy does not cut")


def stays_open(server: Server, proxied: Server) -> bool:
    """Tell whether a stream of heartbeats is open for longer than the proxy waits for one."""
    with reading(proxied) as reader:
        end, received = time.monotonic() + 1.3 * TIMEOUT, b""
        while time.monotonic() < end and (received := reader.more()):
            pass
        publish(server, "still here")
        while b"still here" not in received and (chunk := reader.more()):
            received += chunk
        return b"still here" in received


@EVERY_PROXY
def test_a_stream_that_is_silent_for_longer_than_the_timeout_is_cut(
    quiet: Server, tmp_path: Path, name: str
) -> None:
    # HAProxy's timeout for tunnels is not for streams, whatever its name may promise.
    tunnel = [("timeout client", "timeout tunnel 60s\n    timeout client")]
    changes = tunnel if name == "haproxy" else []
    with (
        proxy(name, tmp_path, quiet.port, *changes, timeout=TIMEOUT) as proxied,
        reading(proxied) as reader,
    ):
        assert reader.chunk()
        # Caddy 2.6 sends the last chunk, as if the app had.
        assert reader.end() == ("complete" if name == "caddy" else "broken")


def test_haproxys_timeout_for_clients_cuts_no_stream(quiet: Server, tmp_path: Path) -> None:
    change = ("timeout client 60s", f"timeout client {TIMEOUT}s")
    with proxy("haproxy", tmp_path, quiet.port, change) as proxied:
        with reading(proxied) as reader:
            assert reader.chunk()
            end = time.monotonic() + 1.3 * TIMEOUT
            wait_for(lambda: time.monotonic() > end)
            publish(quiet, "still here")
            assert reader.event().data == "still here"


# Clients that leave


@EVERY_PROXY
def test_a_subscriber_that_leaves_is_noticed_by_the_app(
    quiet: Server, beating: Server, tmp_path: Path, name: str
) -> None:
    # Apache looks at its client only when it has something to send.
    server = beating if name == "apache" else quiet
    becomes(server, 0)
    with proxy(name, tmp_path, server.port) as proxied:
        with reading(proxied) as reader:
            assert reader.chunk()
            assert subscribers(server) == 1
        becomes(server, 0)


@EVERY_PROXY
def test_a_client_of_a_generator_view_that_leaves_is_noticed_by_the_app(
    quiet: Server, tmp_path: Path, name: str
) -> None:
    with proxy(name, tmp_path, quiet.port) as proxied:
        with reading(proxied, "/stream/silent") as reader:
            assert reader.event().data == "0"
            assert state(quiet)["silent"] == 1
        wait_for(lambda: state(quiet)["silent"] == 0, what="the view to be closed")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("haproxy", "option abortonclose", "no option abortonclose"),
        ("caddy", "lb_try_duration 5s", "flush_interval -1\n\t\tlb_try_duration 5s"),
        ("apache", "ServerName", "ServerName"),
    ],
)
def test_who_leaves_is_not_noticed_before_something_is_sent(
    quiet: Server, tmp_path: Path, name: str, old: str, new: str
) -> None:
    becomes(quiet, 0)
    with proxy(name, tmp_path, quiet.port, (old, new)) as proxied:
        with reading(proxied) as reader:
            assert reader.chunk()
        start = time.monotonic()
        while time.monotonic() - start < TIMEOUT / 2:
            assert subscribers(quiet) == 1
    becomes(quiet, 0)


def test_haproxy_notices_who_vanishes_without_a_word(beating: Server, tmp_path: Path) -> None:
    becomes(beating, 0)
    change = ("tcp-ut 20s", "tcp-ut 1s")
    with proxy("haproxy", tmp_path, beating.port, change) as proxied:
        with socket.create_connection(("127.0.0.1", proxied.port), timeout=AT_ONCE) as client:
            client.sendall(b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n")
            assert client.recv(4096)
            becomes(beating, 1)
            drop_all_packets(client)
            becomes(beating, 0)


# Whose address


BEHIND_PROXY = """
from flask import request
from werkzeug.middleware.proxy_fix import ProxyFix
from tests.apps import create_app

app = create_app({"EVENTSTREAM_MAX_SUBSCRIBERS_PER_ADDRESS": 1})
app.wsgi_app = ProxyFix(app.wsgi_app)
app.add_url_rule("/scheme", "scheme", lambda: request.scheme)
"""


@pytest.fixture(scope="module")
def behind_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("behind-proxy")
    (home / "behind_proxy.py").write_text(BEHIND_PROXY, "utf-8")
    with serving("behind_proxy:app", "gthread", f"--pythonpath={home}") as server:
        yield server


def status_of(open_ones: ExitStack, server: Server, path: str, **headers: str) -> int:
    """Ask for something on a connection that stays open."""
    connection = open_ones.enter_context(closing(connection_to(server)))
    connection.request("GET", path, headers=headers)
    return open_ones.enter_context(connection.getresponse()).status


@pytest.mark.parametrize(
    ("name", "line"),
    [
        *[(name, "") for name in KINDS],
        ("nginx", "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"),
        ("haproxy", "http-request set-header X-Forwarded-For %[src]"),
    ],
)
def test_nobody_gives_himself_another_address(
    behind_proxy: Server, tmp_path: Path, name: str, line: str
) -> None:
    becomes(behind_proxy, 0)
    without = [(line, "")] if line else []
    with proxy(name, tmp_path, behind_proxy.port, *without) as proxied, ExitStack() as open_ones:
        statuses = [
            status_of(open_ones, proxied, "/stream", **{"X-Forwarded-For": address})
            for address in ("198.51.100.7", "198.51.100.8")
        ]
    assert statuses == [200, 200 if line else 429]


@EVERY_PROXY
def test_the_app_is_told_that_the_client_speaks_tls(
    behind_proxy: Server, tmp_path: Path, name: str
) -> None:
    with proxy(name, tmp_path, behind_proxy.port, tls=True) as proxied:
        answer = answer_to(proxied, "GET", "/scheme", **{"X-Forwarded-Proto": "http"})
        assert answer == (200, b"https")


# Compression


COMPRESSING = {
    "nginx": (
        "server {",
        "gzip on; gzip_types *; gzip_proxied any; proxy_ignore_headers X-Accel-Buffering; server {",
    ),
    "haproxy": (
        "frontend web",
        "frontend web\n    filter compression\n    compression algo gzip\n"
        "    compression type text/event-stream",
    ),
    "caddy": ("encode gzip {", "encode gzip {\n\t\tminimum_length 1"),
    "apache": ("ServerName", "SetOutputFilter DEFLATE\nServerName"),
}
"""How the site compresses everything, where the app's own headers do not prevent it."""


@EVERY_PROXY
def test_a_site_that_compresses_holds_no_event_back(
    quiet: Server, tmp_path: Path, name: str
) -> None:
    with proxy(name, tmp_path, quiet.port, COMPRESSING[name]) as proxied:
        hands_on_at_once(quiet, proxied)
        with reading(proxied) as reader:
            assert reader.headers["Content-Encoding"] is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nginx", [COMPRESSING["nginx"], ("proxy_buffering off;", ""), ("gzip off;", "")]),
        # As without the match. Caddy then takes what begins with 512 bytes or more.
        ("caddy", [("text/html*", "text/*")]),
    ],
)
def test_without_some_of_its_lines_it_would(
    quiet: Server, tmp_path: Path, name: str, changes: list[tuple[str, str]]
) -> None:
    publish(quiet, "x" * 512)
    with proxy(name, tmp_path, quiet.port, *changes) as proxied:
        with pytest.raises(TimeoutError):
            take_two_chunks(quiet, proxied)


def take_two_chunks(server: Server, proxied: Server) -> None:
    # From Caddy comes the head of gzip's format, and no more.
    with reading(proxied, "/stream?last_event_id=none", timeout=TIMEOUT / 2) as reader:
        for n in range(2):
            assert reader.chunk()
            publish(server, n)


def test_apache_compresses_a_stream_without_holding_it_back(quiet: Server, tmp_path: Path) -> None:
    change = ("SetEnvIf Accept text/event-stream no-gzip", "")
    with proxy("apache", tmp_path, quiet.port, COMPRESSING["apache"], change) as proxied:
        with reading(proxied) as reader:
            assert reader.headers["Content-Encoding"] == "gzip"
            assert reader.chunk()
            publish(quiet, "x")
            assert reader.chunk()


# The app is away


LISTENING = """() => {
    window.seen = [];
    window.errors = 0;
    window.source = new EventSource("/stream");
    source.onmessage = (event) => seen.push(event.data);
    source.addEventListener("reset", () => seen.push("reset"));
    source.onerror = () => { errors += 1; };
}"""
NO_ANSWER = {
    "nginx": ("error_page 502 504 = @away;", ""),
    "haproxy": ("use_backend streams", "# "),
    "caddy": ("method GET", "method NONE"),
    "apache": ("ErrorDocument 503", "# "),
}


def listening(browser_page: Page, proxied: Server) -> Page:
    browser_page.goto(f"{proxied.url}/state")
    browser_page.evaluate(LISTENING)
    browser_page.wait_for_function("source.readyState === EventSource.OPEN")
    return browser_page


def answer_to(proxied: Server, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    with closing(connection_to(proxied)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def restarted() -> Iterator[Server]:
    config = {"EVENTSTREAM_RETRY": 20, "EVENTSTREAM_MAX_SUBSCRIBERS": 2}
    with serving(f"tests.apps:create_app({config})", "gthread", "--threads=8") as server:
        yield server


@EVERY_PROXY
def test_a_restart_is_survived_by_a_browser_and_without_its_lines_it_is_not(
    restarted: Server, browser: Browser, tmp_path: Path, name: str
) -> None:
    server = restarted
    homes = [tmp_path / "as-shown", tmp_path / "without"]
    for home in homes:
        home.mkdir()
    becomes(server, 0)
    with (
        proxy(name, homes[0], server.port) as proxied,
        proxy(name, homes[1], server.port, NO_ANSWER[name]) as other,
        closing(browser.new_context()) as context,
    ):
        page, without_page = (listening(context.new_page(), one) for one in (proxied, other))
        # What the app itself refuses stays refused.
        assert answer_to(proxied, "GET", "/stream", **EVENT_STREAM)[0] == 503
        publish(server, "before")
        page.wait_for_function("seen.includes('before')")
        server.stop()
        page.wait_for_function("errors > 3")
        assert page.evaluate("source.readyState") == 0
        without_page.wait_for_function("source.readyState === EventSource.CLOSED")
        assert answer_to(proxied, "GET", "/stream", **EVENT_STREAM) == (200, b":\nretry: 20\n")
        status = 503 if name in {"haproxy", "apache"} else 502
        assert answer_to(proxied, "GET", "/stream")[0] == status
        assert answer_to(proxied, "POST", "/stream", **EVENT_STREAM)[0] == status
        server.start()
        page.wait_for_function("seen.includes('reset')")
        publish(server, "after")
        page.wait_for_function("seen.at(-1) === 'after'")


@EVERY_PROXY
def test_an_app_that_hangs_up_without_an_answer_is_away_too(tmp_path: Path, name: str) -> None:
    # Caddy asks more than once.
    with canned(*[b""] * 100) as server, proxy(name, tmp_path, server.port) as proxied:
        assert answer_to(proxied, "GET", "/stream", **EVENT_STREAM) == (200, b":\nretry: 20\n")
        assert answer_to(proxied, "GET", "/stream")[0] == 502


# Many tabs


@pytest.fixture(scope="module")
def eight_tabs(browser: Browser) -> Iterator[list[Page]]:
    with closing(browser.new_context(ignore_https_errors=True)) as context:
        yield [context.new_page() for _ in range(8)]


@contextmanager
def listening_all(pages: list[Page], proxied: Server) -> Iterator[None]:
    for page in pages:
        page.goto(f"{proxied.url}/started")
    # Not before, as the pages need connections, too; one by one, so that the first are served.
    for number, page in enumerate(pages):
        page.evaluate(LISTENING)
        if number < 6:
            page.wait_for_function("source.readyState === EventSource.OPEN")
    yield
    for page in pages:
        page.goto("about:blank")


@EVERY_PROXY
def test_over_http_2_eight_tabs_have_a_stream_each(
    quiet: Server, eight_tabs: list[Page], tmp_path: Path, name: str
) -> None:
    becomes(quiet, 0)
    protocol = "performance.getEntriesByType('navigation')[0].nextHopProtocol"
    with proxy(name, tmp_path, quiet.port, tls=True) as proxied:
        with listening_all(eight_tabs, proxied):
            becomes(quiet, 8)
            publish(quiet, "to all")
            for page in eight_tabs:
                page.wait_for_function("seen.includes('to all')")
                assert page.evaluate(protocol) == "h2"


def test_over_http_1_1_the_seventh_tab_waits(
    quiet: Server, eight_tabs: list[Page], tmp_path: Path
) -> None:
    becomes(quiet, 0)
    first, *_, seventh = tabs = eight_tabs[:7]
    with proxy("nginx", tmp_path, quiet.port, (" ssl http2;", " ssl;"), tls=True) as proxied:
        with listening_all(tabs, proxied):
            publish(quiet, "to six")
            for tab in tabs[:6]:
                tab.wait_for_function("seen.includes('to six')")
            assert seventh.evaluate("source.readyState") == 0
            first.evaluate("source.close()")
            seventh.wait_for_function("source.readyState === EventSource.OPEN")


# A worker that crashes


def children(server: Server) -> list[int]:
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("name", "changes", "end"),
    [
        ("nginx", [], "broken"),
        ("nginx", [("proxy_http_version 1.1;", "proxy_http_version 1.0;")], "complete"),
        ("haproxy", [], "broken"),
        ("caddy", [], "complete"),
        ("apache", [], "broken"),
    ],
)
def test_a_browser_is_told_of_a_broken_stream(
    quiet: Server, tmp_path: Path, name: str, changes: list[tuple[str, str]], end: str
) -> None:
    wait_for(lambda: children(quiet), what="a worker")
    wait_for(lambda: state(quiet), what="the worker to answer")
    with proxy(name, tmp_path, quiet.port, *changes) as proxied, reading(proxied) as reader:
        assert reader.chunk()
        [worker] = children(quiet)
        os.kill(worker, signal.SIGKILL)
        assert reader.end() == end


# What nginx asks the app for


@pytest.mark.parametrize(
    ("without", "asked"),
    [
        ([], b"HTTP/1.1, connection: "),
        ([("proxy_http_version 1.1;", "proxy_http_version 1.0;")], b"HTTP/1.0, connection: "),
        ([('proxy_set_header Connection "";', "")], b"HTTP/1.1, connection: close"),
    ],
)
def test_nginx_asks_the_app_for_a_connection_that_stays(
    tmp_path: Path, without: list[tuple[str, str]], asked: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        upstream.settimeout(AT_ONCE)
        with nginx(tmp_path, upstream.getsockname()[1], *without) as proxied:
            client = socket.create_connection(("127.0.0.1", proxied.port), timeout=AT_ONCE)
            client.sendall(b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n")
            connection, _ = upstream.accept()
            with client, connection:
                request = connection.recv(4096)
    version = request.partition(b"\r\n")[0].split()[-1]
    found = re.search(rb"(?i)\r\nconnection: ?(\w*)", request)
    assert version + b", connection: " + (found[1] if found else b"") == asked
