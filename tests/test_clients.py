"""The habits that real clients need, each with the client that breaks without it.

For each habit there is the counter-proof: the same client reads bytes without it, and breaks.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import httpx_sse
import openai
import pytest

from .servers import Server, serving, skip_unless_ci, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENTS = Path(__file__).parent / "clients"
NPM = ["eventsource", "fetch-event-source"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    config = "{'EVENTSTREAM_HEARTBEAT': 0.1, 'EVENTSTREAM_RETRY': 100}"
    with serving(f"tests.apps:create_app({config})", "gevent") as started:
        yield started


def publish(server: Server, data: Any, **fields: Any) -> str:
    body = json.dumps({"data": data, "fields": fields}).encode()
    ask = urllib.request.Request(
        f"{server.url}/publish", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(ask, timeout=20) as answer:
        id: str = json.load(answer)["id"]
        return id


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/state").json()
    return found


def raw(server: Server, wire: str) -> str:
    return f"{server.url}/raw?wire={quote(wire)}"


# The openai Python client


def openai_chunks(server: Server, query: dict[str, str]) -> list[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return list(
            client.chat.completions.create(model="m", messages=[], stream=True, extra_query=query)
        )


def test_openais_client_reads_openais_format_with_heartbeats_in_between(server: Server) -> None:
    chunks = openai_chunks(server, {})
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hel", "lo", " 世界"]


@pytest.mark.parametrize(
    ("habit", "mistake"),
    [
        ('id: 1\ndata: {"id": "a"}\n\n:\ndata: [DONE]\n\n', "a blank line after a heartbeat"),
        ('retry: 5\ndata: {"id": "a"}\n\ndata: [DONE]\n\n', "a lone retry"),
    ],
)
def test_a_block_without_data_would_break_openais_client(
    server: Server, habit: str, mistake: str
) -> None:
    assert [chunk.id for chunk in openai_chunks(server, {"wire": habit})] == ["a"]
    line = ":\n" if "heartbeat" in mistake else "retry: 5\n"
    with pytest.raises(json.JSONDecodeError):
        openai_chunks(server, {"wire": habit.replace(line, line + "\n")})


# httpx-sse


def httpx_events(url: str) -> list[httpx_sse.ServerSentEvent]:
    with httpx.Client() as client, httpx_sse.connect_sse(client, "GET", url) as source:
        return list(source.iter_sse())


def test_httpx_sse_sees_events_and_no_heartbeats(server: Server) -> None:
    events = httpx_events(f"{server.url}/ids")
    assert [(event.data, event.id) for event in events] == [
        ('{"n": 0}', "0"),
        ('{"n": 1}', "1"),
        ('{"n": 2}', "2"),
        ("{}", "end"),
    ]


@pytest.mark.parametrize(
    ("wire", "data"),
    [
        ("id: 1\ndata: a\n\n:\ndata: b\n\n", ["a", "b"]),
        ("id: 1\ndata: a\n\n:\n\ndata: b\n\n", ["a", "", "b"]),
        (":\nretry: 5\ndata: a\n\n", ["a"]),
        (":\nretry: 5\n\ndata: a\n\n", ["", "a"]),
        ("id: 1\n\ndata: a\n\n", ["", "a"]),
        ("event: x\n\ndata: a\n\n", ["", "a"]),
    ],
)
def test_a_block_without_data_would_be_an_event_to_httpx_sse(
    server: Server, wire: str, data: list[str]
) -> None:
    assert [event.data for event in httpx_events(raw(server, wire))] == data


def test_a_byte_order_mark_would_cost_httpx_sse_the_first_event(server: Server) -> None:
    mark = "\ufeff".encode().decode("latin-1")
    assert [event.data for event in httpx_events(raw(server, "data: a\n\ndata: b\n\n"))] == [
        "a",
        "b",
    ]
    assert [event.data for event in httpx_events(raw(server, f"{mark}data: a\n\n"))] == []


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "application/json, text/event-stream", "*/*", "text/plain", ""]
)
def test_a_stream_is_given_whatever_the_client_says_it_accepts(server: Server, accept: str) -> None:
    answer = httpx.get(f"{server.url}/ids", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"


def test_retry_is_the_first_line_of_the_first_block(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/stream") as answer:
        publish(server, "x", retry=7)
        lines = answer.iter_lines()
        first = [line for line in (next(lines) for _ in range(4)) if not line.startswith(":")]
    assert first[0].startswith("retry: ")


def test_httpx_sse_reads_a_channel(server: Server) -> None:
    url = f"{server.url}/stream"
    with httpx.Client() as client, httpx_sse.connect_sse(client, "GET", url) as source:
        id = publish(server, "Hello!", type="greeting")
        event = next(source.iter_sse())
    assert (event.event, event.data, event.id) == ("greeting", "Hello!", id)
    assert event.retry is not None
    assert 80 <= event.retry <= 120


# The clients from npm


class NpmClient:
    def __init__(self, client: str, url: str, seconds: float = 60) -> None:
        node = system_part("node")
        if not (CLIENTS / "node_modules").exists():
            skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
        self._process = subprocess.Popen(
            [node, "read.mjs", client, url, str(seconds)],
            cwd=CLIENTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("{"), line + self._process.stdout.read()
        told: dict[str, Any] = json.loads(line)
        return told

    def until(self, what: str) -> list[dict[str, Any]]:
        told = [self.next()]
        while told[-1]["what"] != what:
            told.append(self.next())
        return told

    def __enter__(self) -> NpmClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("client", NPM)
def test_an_npm_client_opens_before_any_event_and_sees_no_heartbeats(
    server: Server, client: str
) -> None:
    with NpmClient(client, f"{server.url}/stream") as reader:
        assert reader.next()["what"] == "open"
        beats = state(server)["subscribers"]
        assert beats >= 1
        id = publish(server, "Hello!")
        event = reader.next()
        assert (event["what"], event["data"], event["id"]) == ("message", "Hello!", id)


@pytest.mark.parametrize("client", NPM)
def test_a_block_without_data_would_reach_the_user_of_fetch_event_source(
    server: Server, client: str
) -> None:
    with NpmClient(client, raw(server, ":\nretry: 60000\n\ndata: a\n\n:\n\n")) as reader:
        told = reader.until("end of body" if client == "fetch-event-source" else "error")
    empty = [one for one in told if one["what"] == "message" and not one["data"]]
    assert len(empty) == (2 if client == "fetch-event-source" else 0)


def test_a_finished_stream_is_not_run_again_for_an_eventsource(server: Server) -> None:
    before = int(httpx.get(f"{server.url}/started").text)
    with NpmClient("eventsource", f"{server.url}/stream/count/2") as reader:
        told = reader.until("closed")
    assert [one["what"] for one in told] == ["open", "message", "message", "end", "error", "closed"]
    assert int(httpx.get(f"{server.url}/started").text) == before + 1


def test_an_eventsource_returns_with_its_cursor_and_misses_nothing(server: Server) -> None:
    with NpmClient("eventsource", f"{server.url}/stream") as reader:
        assert reader.next()["what"] == "open"
        publish(server, "1")
        assert reader.next()["data"] == "1"
        assert httpx.post(f"{server.url}/disconnect").json() >= [1]
        publish(server, "2")
        told = reader.until("message")
    assert [one["what"] for one in told] == ["error", "open", "message"]
    assert told[-1]["data"] == "2"


def test_an_id_that_no_header_can_carry_would_cut_an_eventsource_off(server: Server) -> None:
    id = "数".encode().decode("latin-1")
    for wire, returns in (
        (f"retry: 1\nid: {id}\ndata: a\n\n", False),
        ("retry: 1\ndata: a\n\n", True),
    ):
        with NpmClient("eventsource", raw(server, wire), seconds=2) as reader:
            assert [one["what"] for one in reader.until("error")] == ["open", "message", "error"]
            assert (reader.next()["what"] == "open") is returns


def test_subscribers_of_clients_that_were_killed_are_gone(server: Server) -> None:
    wait_for(lambda: state(server)["subscribers"] == 0)
