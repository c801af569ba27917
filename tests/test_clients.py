"""The habits that real clients need, each with the client that breaks without it.

For each habit there is the counter-proof: the same client reads bytes without it, and breaks.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import urllib.request
from contextlib import closing, suppress
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import httpx_sse
import openai
import pytest

from .apps import AFTER, BEFORE
from .npm import CLIENTS, node
from .servers import DEADLINE, Server, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

NPM = ["eventsource", "fetch-event-source"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    config = "{'EVENTSTREAM_HEARTBEAT': 0.1, 'EVENTSTREAM_RETRY': 50}"
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
    found: dict[str, Any] = httpx.get(f"{server.url}/state", timeout=DEADLINE).json()
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
        ('data: {"id": "a"}\nid: 1\n\n:\ndata: [DONE]\n\n', "a blank line after a heartbeat"),
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
    with (
        httpx.Client(timeout=DEADLINE) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
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
        ("data: a\nid: 1\n\n:\ndata: b\n\n", ["a", "b"]),
        ("data: a\nid: 1\n\n:\n\ndata: b\n\n", ["a", "", "b"]),
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
    answer = httpx.get(f"{server.url}/ids", headers={"Accept": accept}, timeout=DEADLINE)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"


def test_retry_is_the_first_line_of_the_first_block(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/stream", timeout=DEADLINE) as answer:
        publish(server, "x", retry=7)
        lines = answer.iter_lines()
        first = [line for line in (next(lines) for _ in range(4)) if not line.startswith(":")]
    assert first[0].startswith("retry: ")


def test_httpx_sse_reads_a_channel(server: Server) -> None:
    url = f"{server.url}/stream"
    with (
        httpx.Client(timeout=DEADLINE) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
        id = publish(server, "Hello!", type="greeting")
        event = next(source.iter_sse())
    assert (event.event, event.data, event.id) == ("greeting", "Hello!", id)
    assert event.retry is not None
    assert 40 <= event.retry <= 60


# The clients from npm


class NpmClient:
    def __init__(self, client: str, url: str, seconds: float = 60) -> None:
        self._process = subprocess.Popen(
            [node(), "read.mjs", client, url, str(seconds)],
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


@pytest.mark.parametrize(
    ("client", "texts"),
    [("eventsource", ["\na", '"\\na"', "{}"]), ("fetch-event-source", ["a", '"\\na"', "{}"])],
)
def test_a_line_break_at_the_start_of_a_text_reaches_fetch_event_source_only_as_json(
    server: Server, client: str, texts: list[str]
) -> None:
    wire = 'data: \ndata: a\n\ndata: "\\na"\n\ndata: {}\n\n'
    with NpmClient(client, raw(server, wire)) as reader:
        told = [reader.next() for _ in range(4)]
    assert [one["data"] for one in told[1:]] == texts


def test_a_finished_stream_is_not_run_again_for_an_eventsource(server: Server) -> None:
    before = int(httpx.get(f"{server.url}/started", timeout=DEADLINE).text)
    with NpmClient("eventsource", f"{server.url}/stream/count/2?retry=50") as reader:
        told = reader.until("closed")
    assert [one["what"] for one in told] == ["open", "message", "message", "end", "error", "closed"]
    assert int(httpx.get(f"{server.url}/started", timeout=DEADLINE).text) == before + 1


def test_an_eventsource_returns_with_its_cursor_and_misses_nothing(server: Server) -> None:
    with NpmClient("eventsource", f"{server.url}/stream") as reader:
        assert reader.next()["what"] == "open"
        publish(server, "1")
        assert reader.next()["data"] == "1"
        assert httpx.post(f"{server.url}/disconnect", timeout=DEADLINE).json() >= [1]
        publish(server, "2")
        told = reader.until("message")
    assert [one["what"] for one in told] == ["error", "open", "message"]
    assert told[-1]["data"] == "2"


def test_an_eventsource_returns_with_an_id_that_is_not_ascii(server: Server) -> None:
    with NpmClient("eventsource", f"{server.url}/stream") as reader:
        assert reader.next()["what"] == "open"
        publish(server, "1", id="数")
        assert reader.next()["id"] == "数"
        assert httpx.post(f"{server.url}/disconnect", timeout=DEADLINE).json() >= [1]
        publish(server, "2")
        told = reader.until("message")
    assert [(one["what"], one["data"]) for one in told[1:]] == [("open", None), ("message", "2")]


# The clients from npm, on a run


LAST_WORDS = {"eventsource": "closed", "fetch-event-source-post": "done"}
SECONDS = 20


class CuttingProxy:
    """Passes connections on to a server, and cuts some of them in the middle of the answer.

    :param target: the server's port.
    :param lasts: of the first connections in turn, what is the last to come through, as a pattern.
    """

    def __init__(self, target: int, *lasts: bytes) -> None:
        self._target = target
        self._lasts = lasts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        for last in chain(self._lasts, repeat(b"")):
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client, last), daemon=True).start()

    def _serve(self, client: socket.socket, last: bytes) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            asking = threading.Thread(target=self._pass_on, args=(client, server, b""))
            asking.start()
            self._pass_on(server, client, last)
            asking.join()

    def _pass_on(self, one: socket.socket, other: socket.socket, last: bytes) -> None:
        passed, found = b"", None
        with suppress(OSError):
            while not found and (data := one.recv(65536)):
                start, passed = len(passed), passed + data
                found = re.search(last, passed) if last else None
                other.sendall(passed[start : found.end()] if found else data)
        for socket_ in (one, other):
            # close() alone would tell nobody as long as the other thread waits for something.
            with suppress(OSError):
                socket_.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()


class Answer:
    """A run of the server's, and its URL at a proxy."""

    def __init__(self, server: Server, proxy: CuttingProxy, name: str) -> None:
        self._host = f"127.0.0.1:{proxy.port}"
        self._path = f"/stream/answer/{name}"
        self._go = f"{server.url}/go/{name}"
        self._server = server
        self.url = f"http://{self._host}{self._path}"

    def request(self, method: str, last_event_id: str = "") -> int:
        """Ask for it past the proxy, and leave; return the status."""
        # A run is found by the host that was asked for, too.
        headers = {"Host": self._host, "Last-Event-ID": last_event_id}
        with httpx.stream(
            method, f"{self._server.url}{self._path}", headers=headers, timeout=DEADLINE
        ) as answer:
            return answer.status_code

    def go_on(self) -> None:
        httpx.post(self._go, timeout=DEADLINE)


def whats(told: list[dict[str, Any]]) -> list[str]:
    return [one["what"] for one in told]


def assert_whole(told: list[dict[str, Any]]) -> str:
    """Check that a run came once and in order, with its end; return the end's id."""
    events = [one for one in told if one["id"]]
    assert [event["data"] for event in events] == [*BEFORE, *AFTER, "{}"]
    assert whats(events) == ["message"] * (len(events) - 1) + ["end"]
    run, _, last = events[-1]["id"].rpartition(".")
    assert [event["id"] for event in events] == [f"{run}.{n + 1}" for n in range(int(last))]
    return str(events[-1]["id"])


CUTS = ("👋🏽".encode()[:6], "再".encode()[:2])
BEHIND_THE_END = rb"event: end\ndata: {}\nid: \S+\n\n"


@pytest.mark.parametrize("client", LAST_WORDS)
def test_a_client_that_is_cut_off_in_mid_answer_gets_the_rest_of_the_run_and_stops(
    server: Server, client: str
) -> None:
    before = int(httpx.get(f"{server.url}/started", timeout=DEADLINE).text)
    with closing(CuttingProxy(server.port, *CUTS)) as proxy:
        run = Answer(server, proxy, client)
        if client == "eventsource":
            # It can only GET what somebody else has started.
            run.request("POST")
        with NpmClient(client, run.url, seconds=SECONDS) as reader:
            told = reader.until("error")
            run.go_on()
            told += reader.until("error")
            told += reader.until(LAST_WORDS[client])
        last = assert_whole(told)
        assert [run.request(method, last) for method in ("GET", "POST")] == [204, 204]
    assert whats(told).count("open") == 3
    end = ["end", "error", "closed"] if client == "eventsource" else ["end", "end of body", "done"]
    assert whats(told)[-3:] == end
    assert int(httpx.get(f"{server.url}/started", timeout=DEADLINE).text) == before + 1


@pytest.mark.parametrize("client", LAST_WORDS)
def test_a_client_that_is_cut_off_behind_the_end_of_a_run_is_told_that_there_is_no_more(
    server: Server, client: str
) -> None:
    with closing(CuttingProxy(server.port, BEHIND_THE_END)) as proxy:
        run = Answer(server, proxy, f"{client}-to-the-end")
        run.go_on()
        run.request("POST")
        with NpmClient(client, run.url, seconds=SECONDS) as reader:
            told = reader.until(LAST_WORDS[client])
    assert_whole(told)
    expected = ["end", "error", "closed"] + ["done"] * (LAST_WORDS[client] == "done")
    assert whats(told)[whats(told).index("end") :] == expected


def test_subscribers_of_clients_that_were_killed_are_gone(server: Server) -> None:
    wait_for(lambda: state(server)["subscribers"] == 0)
