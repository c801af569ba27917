"""The contract of both roads: a client cannot tell whether its server iterates or the hub sends.

Nor can it tell the broker.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from werkzeug.serving import make_server

from flask_eventstream import EventStream, EventStreamParser, ServerSentEvent
from flask_eventstream.signals import subscriber_connected, subscriber_disconnected

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from werkzeug.serving import BaseWSGIServer

    from .redis_server import RedisServer


EVENT_LAST = re.compile(rb"^data: last\nid: .*\n\n\Z", re.MULTILINE)


def count_up() -> Iterator[str]:
    """Yield some numbers in pieces of text, at once or each after a pause (milliseconds)."""
    items, pause = int(request.args["items"]), float(request.args.get("pause", 0))
    for n in range(items):
        yield f"{n} 世界\n🎉" if n else "x" * int(request.args.get("size", 1))
        if pause:
            time.sleep(pause / 1000)


class Site:
    """An app, a server that serves it in this process, and its clients."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.app = Flask("site")
        self.app.config.update(config)
        self.eventstream = EventStream("eventstream", __name__)
        self.eventstream.resumable("/run")(count_up)
        self.app.register_blueprint(self.eventstream)
        self.server: BaseWSGIServer = make_server("127.0.0.1", 0, self.app, threaded=True)
        # What still waits when the test is over, the test ends by itself.
        self.server.daemon_threads = True  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.clients: list[Client] = []

    def publish(self, data: Any, **fields: Any) -> str:
        with self.app.app_context():
            return self.eventstream.publish(data, **fields)

    def connect(self, path: str = "/stream", method: str = "GET", **headers: str) -> Client:
        self.clients.append(Client(self.server.server_port, path, headers, method))
        return self.clients[-1]

    def count(self) -> int:
        with self.app.app_context():
            return self.eventstream.subscriber_count()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.app.extensions["eventstream"].broker.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Client:
    def __init__(self, port: int, path: str, headers: dict[str, str], method: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        self.received = b""
        try:
            self.connection.request(method, path, headers=headers)
            self.response = self.connection.getresponse()
        except BaseException:
            # Nobody has it who could. Left to the garbage collector, it would fail another test.
            self.connection.close()
            raise

    def read_event(self, data: bytes) -> bytes:
        """Read up to the end of an event of one line."""
        event = re.compile(rb"^data: %b\n(id: .*\n)?\n" % re.escape(data), re.MULTILINE)
        return self._read_to(lambda received: event.search(received))

    def read_until(self, end: bytes) -> bytes:
        return self._read_to(lambda received: end in received)

    def _read_to(self, is_there: Callable[[bytes], Any]) -> bytes:
        while not is_there(self.received):
            part = self.response.read1(65536)
            assert part, f"the stream ended with {self.received[-200:]!r} what was awaited"
            self.received += part
        return self.received

    def read_all(self) -> bytes:
        # It raises IncompleteRead if the last chunk does not come.
        self.received += self.response.read()
        return self.received

    def data(self) -> list[str]:
        return [event.data for event in EventStreamParser().feed(self.received)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@pytest.fixture(params=["memory", "redis"])
def broker(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "memory":
        return {}
    server: RedisServer = request.getfixturevalue("redis")
    return {"EVENTSTREAM_BROKER_URL": server.url, "EVENTSTREAM_KEY_PREFIX": server.prefix()}


@pytest.fixture(params=[True, False], ids=["hub", "iterator"])
def make(request: pytest.FixtureRequest, broker: dict[str, str]) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make_site(**config: Any) -> Site:
        # Nobody lags for long enough to be cut off, however busy the machine is.
        config = {"hijack": request.param, "max_lag": 3600, **config}
        given = {f"EVENTSTREAM_{name.upper()}": value for name, value in config.items()}
        sites.append(Site({**broker, **given}))
        return sites[-1]

    yield make_site
    for site in sites:
        site.close()


@pytest.fixture
def site(make: Callable[..., Site]) -> Site:
    return make()


def test_the_head_and_the_first_bytes_come_at_once(site: Site) -> None:
    client = site.connect()
    client.read_until(b"retry: ")
    assert re.fullmatch(rb":\nretry: \d+\n", client.read_until(b"\n"))
    assert client.response.status == 200
    assert client.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert client.response.headers["Transfer-Encoding"] == "chunked"


def test_events_arrive_in_order_and_as_the_same_bytes(site: Site) -> None:
    client = site.connect("/stream")
    wire = b""
    for n in range(200):
        id = site.publish(f"{n} 世界 🎉\n2", type="tick")
        wire += f"event: tick\ndata: {n} 世界 🎉\ndata: 2\nid: {id}\n\n".encode()
    assert client.read_until(b"data: 199 ").startswith(b":\n")
    assert client.read_until(wire[-40:]).endswith(wire)


def test_a_large_event_arrives_whole(site: Site) -> None:
    client = site.connect()
    data = "".join(map(str, range(150_000)))
    site.publish(data)
    site.publish("after")
    client.read_event(b"after")
    assert client.data() == [data, "after"]


def test_a_client_that_returns_gets_exactly_what_it_missed(site: Site) -> None:
    cursor = site.publish("1")
    site.publish("2")
    client = site.connect("/stream", **{"Last-Event-ID": cursor})
    site.publish("3")
    client.read_event(b"3")
    assert client.data() == ["2", "3"]


def test_a_long_replay_arrives_whole_before_what_is_new(make: Callable[..., Site]) -> None:
    site = make(history=400)
    cursor = site.publish("first")
    for n in range(300):
        site.publish(f"{n:10000}")
    client = site.connect("/stream", **{"Last-Event-ID": cursor})
    site.publish("new")
    client.read_event(b"new")
    assert [data.strip() for data in client.data()] == [*map(str, range(300)), "new"]


def test_an_unknown_cursor_is_a_reset(site: Site) -> None:
    site.publish("1")
    client = site.connect("/stream?lastEventId=unknown")
    client.read_event(b"1")
    assert json.loads(client.data()[0])["requested"] == "unknown"


def test_a_snapshot_comes_between_history_and_news(site: Site) -> None:
    @site.app.get("/mine")
    def mine() -> Any:
        return site.eventstream.subscribe(history=1, snapshot=lambda: "snapshot")

    site.publish("old")
    client = site.connect("/mine")
    site.publish("new")
    client.read_event(b"new")
    assert client.data() == ["old", "snapshot", "new"]


def test_silence_is_broken_by_comments(make: Callable[..., Site]) -> None:
    client = make(heartbeat=0.1).connect()
    assert client.read_until(b":\n:\n:\n")
    assert client.data() == []


def test_a_busy_stream_gets_no_heartbeat(make: Callable[..., Site]) -> None:
    site, quiet = make(heartbeat=0.8), 0.2
    client = site.connect()
    times = [time.monotonic()]
    while times[-1] < times[0] + 1.5:
        id = site.publish("x")
        client.read_until(f"data: x\nid: {id}\n\n".encode())
        times.append(time.monotonic())
    # From one event to the one behind the next is longer than the silence between them. If that
    # was a quarter of the interval or more, since the machine stood still, there may be beats.
    pairs = zip(times, times[2:], strict=False)
    allowed = sum(int((after - before) / quiet) for before, after in pairs)
    assert 1 <= len(re.findall(rb"(?m)^:.*\n", client.received)) <= 1 + allowed


def test_disconnecting_ends_the_stream_cleanly_after_what_was_published(site: Site) -> None:
    client, other = site.connect(), site.connect()
    site.publish("last")
    with site.app.app_context():
        assert site.eventstream.disconnect("sse") == 2
    site.publish("secret")
    for one in (client, other):
        assert EVENT_LAST.search(one.read_all())
    wait_for(lambda: site.count() == 0)


def test_who_comes_after_a_disconnect_reads_on(site: Site) -> None:
    site.connect()
    with site.app.app_context():
        site.eventstream.disconnect("sse")
    client = site.connect()
    site.publish("new")
    assert client.read_event(b"new")


def test_closing_the_broker_ends_all_streams(site: Site) -> None:
    client = site.connect()
    site.publish("last")
    site.app.extensions["eventstream"].broker.close()
    assert EVENT_LAST.search(client.read_all())


def test_a_stream_ends_after_its_lifetime(make: Callable[..., Site]) -> None:
    site = make(max_lifetime=0.2, heartbeat=0.5)
    assert site.connect().read_all().startswith(b":\nretry: ")
    wait_for(lambda: site.count() == 0)


def test_a_subscriber_of_many_channels_gets_each_event_once(site: Site) -> None:
    @site.app.get("/many")
    def many() -> Any:
        return site.eventstream.subscribe("a", "b")

    client, same = site.connect("/many"), site.connect("/many")
    for n in range(6):
        site.publish(n, channel=["ab"[n % 2], "b"])
    for one in (client, same):
        one.read_event(b"5")
        assert one.data() == list("012345")


def test_signals_are_sent_once_for_each_connect_and_leave(make: Callable[..., Site]) -> None:
    site = make(heartbeat=0.2)
    seen: list[str] = []

    def connected(sender: Any, **more: Any) -> None:
        seen.append("connected")

    def disconnected(sender: Any, channels: tuple[str, ...], **more: Any) -> None:
        seen.append(f"disconnected {channels} {more['reason']}")

    with (
        subscriber_connected.connected_to(connected, site.app),
        subscriber_disconnected.connected_to(disconnected, site.app),
    ):
        client = site.connect()
        client.read_until(b"retry: ")
        assert seen == ["connected"]
        client.close()
        wait_for(lambda: len(seen) > 1)
    assert seen == ["connected", "disconnected ('sse',) left"]


def test_who_wants_to_know_when_the_response_ends_is_told_at_the_streams_end(site: Site) -> None:
    ended = threading.Event()

    @site.app.after_request
    def note(response: Any) -> Any:
        response.call_on_close(ended.set)
        return response

    client = site.connect()
    site.publish("x")
    client.read_event(b"x")
    assert not ended.is_set()
    with site.app.app_context():
        site.eventstream.disconnect("sse")
    assert ended.wait(DEADLINE)


def test_beyond_the_room_there_is_503_until_somebody_leaves(make: Callable[..., Site]) -> None:
    site = make(max_subscribers=2, heartbeat=0.2)
    clients = [site.connect(), site.connect()]
    refused = site.connect()
    assert (refused.response.status, refused.response.headers["Retry-After"]) == (503, "5")
    clients[0].close()
    wait_for(lambda: site.count() == 1)
    assert site.connect().response.status == 200


def test_a_thousand_events_in_a_burst_arrive_whole(site: Site) -> None:
    clients = [site.connect() for _ in range(5)]
    for n in range(1000):
        site.publish(f"{n}:" + "x" * 200)
    for client in clients:
        client.read_event(b"999:%b" % (b"x" * 200))
        assert [int(data.partition(":")[0]) for data in client.data()] == list(range(1000))


# --- Runs


def run_events(client: Client) -> list[ServerSentEvent]:
    events = EventStreamParser().feed(client.read_all())
    # The first has the reconnection time, which is not the same for all.
    return [ServerSentEvent(one.data, one.type, one.id) for one in events]


def test_a_run_of_many_items_reaches_all_its_clients_whole(site: Site) -> None:
    size = 1_000_000
    first = site.connect(f"/stream/run?items=20000&size={size}", "POST")
    others = [site.connect("/stream/run") for _ in range(3)]
    run = first.response.headers["X-Run-Id"]
    events = run_events(first)
    assert [event.id for event in events] == [f"{run}.{n}" for n in range(1, 20_002)]
    assert len(events[0].data) == size
    assert events[1].data == "1 世界\n🎉"
    assert events[-1].type == "end"
    late = site.connect("/stream/run")
    for client in (*others, late):
        assert run_events(client) == events


def test_a_client_of_a_run_that_is_cut_again_and_again_gets_every_item_once(site: Site) -> None:
    client = site.connect("/stream/run?items=1500&pause=0.2", "POST")
    run = client.response.headers["X-Run-Id"]
    got: list[ServerSentEvent] = []
    returns = seen = 0
    while not got or got[-1].type != "end":
        parser = EventStreamParser()
        while part := client.response.read1(100 + 37 * returns):
            got += parser.feed(part)
            if len(got) >= seen + 7:
                break
        seen = len(got)
        client.close()
        cursor = {"Last-Event-ID": got[-1].id or ""} if got else {}
        client = site.connect("/stream/run", **cursor)
        returns += 1
    assert [event.id for event in got] == [f"{run}.{n}" for n in range(1, 1502)]
    assert returns > 10
    # Its last connection came with the id of the end.
    assert client.response.status == 204


def test_a_run_that_is_cancelled_ends_for_all_its_clients(site: Site) -> None:
    clients = [site.connect("/stream/run?items=100000&pause=5", "POST")]
    clients += [site.connect("/stream/run") for _ in range(3)]
    clients[-1].read_until(b"data: 3 ")
    assert site.connect("/stream/run", "DELETE").response.status == 204
    ends = [run_events(client)[-1] for client in clients]
    assert {(end.type, end.id) for end in ends} == {("cancelled", ends[0].id)}
    wait_for(lambda: not site.app.extensions["eventstream"].runs._active)
    wait_for(lambda: site.count() == 0)
