"""The relay of the documentation, between a real upstream and clients."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.testing import client_stream

from .apps import UPSTREAM_EVENTS, create_relay
from .servers import DEADLINE, Server, free_port, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask

KEY = "sk-4f9a-nobody-may-see-this"
AT_ONCE = DEADLINE
MIB = 1024 * 1024
FAILED = ServerSentEvent({"message": "The stream failed on the server."}, "stream-error", "end")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Server]:
    with serving("tests.apps:create_upstream()", "gevent") as server:
        wait_for(lambda: told(server), what="the upstream to answer")
        yield server


@pytest.fixture(scope="module")
def relay(upstream: Server) -> Iterator[Server]:
    environ = {"UPSTREAM_URL": f"{upstream.url}/v1", "UPSTREAM_KEY": KEY}
    with serving("tests.apps:create_relay()", "gevent", environ=environ) as server:
        wait_for(lambda: httpx.get(server.url, timeout=DEADLINE), what="the relay to answer")
        yield server
        # Both take a second to stop, at the same time.
        upstream.process.terminate()


@pytest.fixture(autouse=True)
def is_left(upstream: Server) -> Iterator[None]:
    """Whatever a test does, in the end the upstream is left alone."""
    yield
    wait_for(lambda: told(upstream)["open"] == 0, timeout=AT_ONCE, what="the upstream to be left")


def told(upstream: Server) -> dict[str, int]:
    with urllib.request.urlopen(f"{upstream.url}/told", timeout=AT_ONCE) as answer:
        counts: dict[str, int] = json.load(answer)
        return counts


def question(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


@contextmanager
def asking(server: Server, prompt: str, path: str = "/stream/chat") -> Iterator[Iterator[Any]]:
    """Ask a relay; yield the events as they come. What does not come in time is an error."""
    url = f"{server.url}{path}"
    with httpx.stream("POST", url, json=question(prompt), timeout=AT_ONCE) as answer:
        yield events_in(answer.iter_bytes())


def events_in(chunks: Iterator[bytes]) -> Iterator[ServerSentEvent]:
    parser = EventStreamParser()
    for chunk in chunks:
        yield from parser.feed(chunk)


def connected(server: Server, prompt: str, receive_buffer: int = 0) -> socket.socket:
    """Ask a relay, and read nothing yet."""
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(AT_ONCE)
    client.connect(("127.0.0.1", server.port))
    body = json.dumps(question(prompt)).encode()
    head = "POST /stream/chat HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def all_of(client: socket.socket) -> bytes:
    with closing(client):
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_events_are_relayed_unchanged_and_one_by_one(relay: Server, upstream: Server) -> None:
    produced = told(upstream)["produced"]
    with asking(relay, "events") as events:
        first = next(events)
        assert told(upstream)["produced"] == produced + 1
        httpx.post(f"{upstream.url}/go/events", timeout=DEADLINE)
        others = list(events)
    sent = [(event.data, event.type, None, None) for event in UPSTREAM_EVENTS]
    got = [(event.data, event.type, event.id, event.retry) for event in [first, *others]]
    assert got == [*sent, ("{}", "end", "end", None)]


# A browser that reads nothing, or leaves


def worker_memory(server: Server) -> int:
    """Return how much memory a server's worker has, in bytes."""
    pid = server.process.pid
    [worker] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def count_that_stands_still(upstream: Server, before: int, seconds: float = 0.5) -> int:
    """Wait until an upstream has produced something, and then nothing for a time."""
    counts = [(time.monotonic(), before)]

    def stands_still() -> bool:
        now, count = time.monotonic(), told(upstream)["produced"]
        if count != counts[-1][1]:
            counts.append((now, count))
        return len(counts) > 1 and now - counts[-1][0] > seconds

    wait_for(stands_still, what="the upstream to stop producing")
    return counts[-1][1] - before


def test_a_browser_that_reads_nothing_stops_the_upstream_and_costs_no_memory(
    relay: Server, upstream: Server
) -> None:
    with asking(relay, "flood") as events:
        next(events)
    wait_for(lambda: told(upstream)["open"] == 0)
    before, memory = told(upstream)["produced"], worker_memory(relay)
    with connected(relay, "flood", receive_buffer=4096) as client:
        produced = count_that_stands_still(upstream, before)
        grown = worker_memory(relay) - memory
        # Between the events are the head and the sizes of chunks, which are no fields of events.
        events = events_in(iter(lambda: client.recv(65536), b""))
        numbers = [int(event.data.split()[0]) for event in islice(events, produced + 2)]
    assert numbers == list(range(len(numbers)))
    assert produced * 16_000 < 64 * MIB
    assert grown < 2 * MIB


@pytest.mark.parametrize("sent", ["tokens", "heartbeats"])
def test_the_upstream_is_closed_when_the_browser_leaves(
    relay: Server, upstream: Server, sent: str
) -> None:
    with asking(relay, sent) as events:
        next(events)
        assert told(upstream)["open"] == 1
    wait_for(lambda: told(upstream)["open"] == 0, timeout=AT_ONCE)


# An upstream that fails, and the key


@pytest.mark.parametrize("prompt", ["401", "500", "302"])
def test_an_upstream_that_refuses_is_a_plain_error_without_its_body_and_headers(
    relay: Server, upstream: Server, prompt: str
) -> None:
    url = f"{upstream.url}/v1/chat/completions"
    answer = httpx.post(
        url, json=question(prompt), headers={"Authorization": KEY}, timeout=DEADLINE
    )
    assert answer.status_code == int(prompt)
    assert answer.text == f"Your key {KEY} is refused."
    assert answer.headers["X-Your-Key"] == KEY
    received = all_of(connected(relay, prompt))
    assert received.startswith(b"HTTP/1.1 502 ")
    assert KEY.encode() not in received
    assert b"key" not in received.lower()


@pytest.mark.parametrize("prompt", ["broken", "unfinished"])
def test_an_upstream_that_breaks_off_in_mid_answer_is_a_stream_error(
    relay: Server, prompt: str
) -> None:
    with asking(relay, prompt) as events:
        assert list(events) == [ServerSentEvent("before"), FAILED]
    assert KEY.encode() not in all_of(connected(relay, prompt))


def test_an_answer_that_is_whole_has_no_key_in_it(relay: Server, upstream: Server) -> None:
    httpx.post(f"{upstream.url}/go/events", timeout=DEADLINE)
    received = all_of(connected(relay, "events"))
    assert b"event: end" in received
    assert KEY.encode() not in received


def test_an_upstream_that_cannot_be_reached_is_a_plain_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = relay_of(f"http://127.0.0.1:{free_port()}", monkeypatch)
    answer = app.test_client().post("/stream/chat", json=question("events"))
    assert answer.status_code == 502
    assert KEY not in f"{answer.headers}{answer.text}"


def test_in_debug_mode_too_the_failure_of_an_upstream_tells_no_key(
    upstream: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = relay_of(upstream.url, monkeypatch)
    app.debug = True
    answer = app.test_client().post("/stream/chat", json=question("broken"))
    assert "Traceback" in answer.text
    assert KEY not in answer.text


def test_an_upstream_that_falls_silent_is_waited_for_with_heartbeats_and_then_given_up(
    upstream: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = relay_of(
        upstream.url, monkeypatch, ("heartbeat=15", "heartbeat=0.1"), ("read=60", "read=3")
    )
    chat = client_stream(app.test_client(), "/stream/chat", method="POST", json=question("silence"))
    with chat as stream:
        assert list(stream) == [ServerSentEvent("thinking"), FAILED]
    assert len(stream.comments) >= 3
    httpx.post(f"{upstream.url}/go/silence", timeout=DEADLINE)


def relay_of(
    upstream_url: str, monkeypatch: pytest.MonkeyPatch, *replaced: tuple[str, str]
) -> Flask:
    monkeypatch.setenv("UPSTREAM_URL", f"{upstream_url}/v1")
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    return create_relay(*replaced)


# The relay as a run


def test_as_a_run_the_upstream_is_asked_once_for_all_who_read(
    relay: Server, upstream: Server
) -> None:
    asked = told(upstream)["asked"]
    with asking(relay, "events", "/stream/chats/1") as events:
        first = next(events)
    httpx.post(f"{upstream.url}/go/events", timeout=DEADLINE)
    url = f"{relay.url}/stream/chats/1"
    for method in ("GET", "POST"):
        headers = {"Last-Event-ID": str(first.id)}
        with httpx.stream(method, url, headers=headers, timeout=AT_ONCE) as answer:
            rest = list(events_in(answer.iter_bytes()))
        assert [event.data for event in rest[:-1]] == [event.data for event in UPSTREAM_EVENTS[1:]]
        assert rest[-1].type == "end"
    assert told(upstream)["asked"] == asked + 1
