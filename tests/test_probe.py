from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import probe
from flask_eventstream.probe import check_stream, margin

from .canned import END, HEAD, STREAM, answered, canned, chunked
from .proxies import TIMEOUT, nginx
from .proxies import app as served_app
from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flask_eventstream.doctor import Finding

    from .servers import Server

pytestmark = pytest.mark.beside

# What is expected is later than what comes, so that a busy machine changes nothing.
OF_THE_APP, HEARTBEAT = 0.2, 3.0
IGNORED = "proxy_ignore_headers X-Accel-Buffering; proxy_buffering on;"
BUFFERING = [("proxy_buffering off;", IGNORED), ("proxy_http_version 1.1;", "")]
GZIP = [("gzip off;", "gzip on; gzip_types *; gzip_proxied any;")]


def checked(url: str, heartbeat: float = HEARTBEAT, idle: float | None = None) -> list[Finding]:
    return list(check_stream(url, {"X-Own": "1"}, heartbeat, idle))


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    assert all(bool(finding.cure) == (finding.level != "ok") for finding in findings)
    return [(found.level, found.what) for found in findings if found.level != "ok"]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "AT_ONCE", DEADLINE)


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with served_app(OF_THE_APP) as server:
        yield server


def test_through_the_nginx_of_the_docs_all_is_well(served: Server, tmp_path: Path) -> None:
    with nginx(tmp_path, served.port) as proxy:
        # Once more if need be: the machine may hold a heartbeat up, but not each time.
        findings = wait_for(lambda: heard_at_the_apps_pace(f"{proxy.url}/stream"))
    assert findings[0].what == f"{proxy.url}/stream answers 200 with text/event-stream"


def heard_at_the_apps_pace(url: str) -> list[Finding]:
    """Return what is found if all is well, and no silence was much longer than the app's."""
    findings = checked(url, idle=HEARTBEAT)
    silence = re.fullmatch(r".*, and the longest silence was (\d\.\d) s", findings[-1].what)
    is_well = not wrong(findings) and silence and float(silence[1]) < HEARTBEAT / 2
    return findings if is_well else []


def test_a_proxy_that_buffers_is_found(
    served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "AT_ONCE", 0.5)
    with nginx(tmp_path, served.port, *BUFFERING) as proxy:
        findings = checked(f"{proxy.url}/stream")
    assert wrong(findings) == [("fail", "nothing of the stream came within 0.5 s")]
    assert "proxy_buffering off" in findings[-1].cure


def test_a_proxy_that_compresses_is_found(served: Server, tmp_path: Path) -> None:
    with nginx(tmp_path, served.port, *GZIP) as proxy:
        findings = checked(f"{proxy.url}/stream", idle=HEARTBEAT)
    assert wrong(findings) == [("fail", "the stream is compressed on the way (gzip)")]
    assert "gzip off" in findings[1].cure


def test_a_proxy_that_compresses_and_buffers_is_told_from_one_that_only_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "AT_ONCE", 0.3)

    def only_plain(request: str) -> bytes:
        return b"..." if "Accept-Encoding: gzip, br" in request else STREAM + chunked(b":\n")

    with canned(only_plain, only_plain) as server:
        findings = checked(server.url)
    assert [found.level for found in findings] == ["fail"]
    assert "unless no compression was asked for" in findings[0].what
    assert "gzip off" in findings[0].cure


def test_a_proxy_that_cuts_silent_streams_is_found(served: Server, tmp_path: Path) -> None:
    # A stream whose heartbeat is 3 seconds, and an nginx that waits for one.
    with nginx(tmp_path, served.port, timeout=TIMEOUT) as proxy:
        findings = checked(f"{proxy.url}/stream/mute", heartbeat=3)
    [(level, what)] = wrong(findings)
    # nginx counts from when it has read the last byte, and we from when that is here.
    assert level == "fail"
    assert re.match(r"the stream was cut after (0\.[89]|[1-9]\.\d) s", what), what
    cure = "proxy_read_timeout in nginx must be more than EVENTSTREAM_HEARTBEAT, 3"
    assert findings[-1].cure == cure


@pytest.mark.parametrize(
    ("answer", "what", "cure"),
    [
        (answered("401 Unauthorized", "who?"), "401 Unauthorized who?", "--token"),
        (answered("403 Forbidden"), "403 Forbidden", "authorize()"),
        (answered("404 Not Found"), "404 Not Found", "flask routes"),
        (answered("502 Bad Gateway"), "502 Bad Gateway", "proxy_pass"),
        (answered("503 Service Unavailable"), "503", "EVENTSTREAM_MAX_SUBSCRIBERS"),
        (answered("504 Gateway Timeout"), "504", "generator streams"),
        (answered("204 No Content"), "204", "give the URL of a stream"),
        (answered("200 OK", "<p>", "Content-Type: text/html"), "text/html", "give the URL"),
        (b"nonsense", "cannot be read", "is this its URL"),
        (b"", "cannot be read", "is this its URL"),
    ],
)
def test_an_answer_that_is_no_stream_is_named_with_its_cure(
    answer: bytes, what: str, cure: str
) -> None:
    with canned(answer) as server:
        [finding] = checked(server.url)
    assert finding.level == "fail"
    assert what in finding.what
    assert cure in finding.cure


def test_where_nobody_listens_nothing_can_be_read() -> None:
    [finding] = checked("http://127.0.0.1:1/stream")
    assert (finding.level, "no connection" in finding.what) == ("fail", True)


def test_a_redirect_is_followed_and_named() -> None:
    moved = answered("308 Permanent Redirect", "", "Location: /stream")
    with canned(moved, STREAM + chunked(b":\n") + b"...") as server:
        findings = checked(server.url, idle=0.01)
        assert wrong(findings)[0] == ("warn", f"{server.url} redirects to {server.url}/stream")
    assert all("X-Own: 1" in request for request in server.requests)


def test_an_answer_of_http_1_0_is_named() -> None:
    with canned(HEAD.replace("1.1", "1.0").encode() + b"\r\n:\n" + b"...") as server:
        findings = checked(server.url, heartbeat=10, idle=0.01)
    assert [level for level, _ in wrong(findings)] == ["warn", "warn"]
    assert "HTTP/1.0" in findings[1].what
    assert findings[1].cure == "proxy_http_version 1.1 in nginx's location"


def test_who_leaves_before_a_heartbeat_is_due_has_not_seen_whether_it_comes() -> None:
    with canned(STREAM + chunked(b":\n") + b"...") as server:
        findings = checked(server.url, heartbeat=15, idle=0.01)
    assert wrong(findings) == [
        ("warn", "the stream is open after 0.01 s, but heartbeats are due every 15 s")
    ]
    assert findings[-1].cure == "stay longer: --idle 21"


def test_heartbeats_that_do_not_come_when_due_are_found() -> None:
    with canned(STREAM + chunked(b":\n") + b"...") as server:
        findings = checked(server.url, heartbeat=0.01, idle=0.6)
    [(level, what)] = wrong(findings)
    assert level == "fail"
    assert re.fullmatch(r"\d+\.\d s of silence, and heartbeats are due every 0\.01 s", what)
    assert "proxy_buffering off" in findings[-1].cure


def test_a_stream_that_ends_has_ended_by_itself_or_was_ended() -> None:
    complete = STREAM + chunked(b":\n", b"data: 1\n\nevent: end\ndata: {}\n\n") + END
    with canned(complete, STREAM + chunked(b":\n") + END, STREAM + END) as server:
        findings = [wrong(checked(server.url))[-1] for _ in range(3)]
    assert findings[0] == ("warn", "the stream is complete, and has ended")
    for level, what in findings[1:]:
        assert (level, what.startswith("the stream ended after ")) == ("fail", True)


@pytest.mark.parametrize(("heartbeat", "late"), [(0.5, 0.5), (15, 3), (60, 12)])
def test_a_heartbeat_may_be_a_little_late(heartbeat: float, late: float) -> None:
    assert margin(heartbeat) == late
