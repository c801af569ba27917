"""What clients that misbehave, come and go, or are too many do to a server and to each other.

``EVENTSTREAM_STRESS=full`` takes the full sizes, which take minutes.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream.hub import SocketHub
from flask_eventstream.subscriber import Source, Subscriber

from .servers import (
    DEADLINE,
    Server,
    free_port,
    gunicorn,
    running,
    serving,
    standing_still,
    wait_for,
)
from .stress import UNTRACED, Client, cpu_seconds, crowd, is_ready, memory_mib, workers
from .test_cleanup import state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Connect = Callable[..., Client]

IS_FULL = os.environ.get("EVENTSTREAM_STRESS") == "full"
OPTIONS = {
    "gevent": ["--worker-connections", "3000"],
    "gthread": ["--threads", "4", "--worker-connections", "3000"],
    "sync": [],
}
EVENTS = 200 if IS_FULL else 60
LONG = 3600.0
"""A heartbeat that plays no part, and how long servers wait for what does not end."""

SO_ATTACH_FILTER = 26


def app(**config: Any) -> str:
    keys = {f"EVENTSTREAM_{key.upper()}": value for key, value in config.items()}
    keys["TIME_TO_END"] = LONG
    return f"tests.apps:create_app({keys})"


@contextmanager
def serve(
    worker: str, *options: str, environ: dict[str, str] | None = None, **config: Any
) -> Iterator[Server]:
    """Serve the app, and see at the end that nothing went wrong in it."""
    options = (*OPTIONS[worker], *options)
    environ = {**UNTRACED, **(environ or {})}
    with serving(app(**config), worker, *options, environ=environ) as server:
        yield server
        assert "Traceback" not in server.log(), server.log()


def post(server: Server, path: str) -> dict[str, Any]:
    asked = urllib.request.Request(server.url + path, method="POST")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def publish(server: Server, number: int = 1, size: int = 1) -> int:
    """Publish some events at once; return the number of the last one."""
    last: int = post(server, f"/flood?batch={number}&size={size}")["published"] - 1
    return last


def flood(server: Server, size: int, batch: int, pause: float) -> None:
    post(server, f"/flood?size={size}&batch={batch}&pause={pause}")


def subscribers(server: Server) -> int:
    count: int = state(server)["subscribers"]
    return count


def wait_for_subscribers(server: Server, number: int) -> None:
    wait_for(lambda: subscribers(server) == number, what=f"{number} subscribers")


def report(**figures: Any) -> None:
    print(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[2], figures)


@pytest.fixture(scope="module", autouse=True)
def _enough_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Return what makes a :class:`Client`, and closes it at the end."""
    with ExitStack() as clients:
        yield lambda *arguments, **options: clients.enter_context(
            closing(Client(*arguments, **options))
        )


# --- Clients that misbehave


@pytest.mark.parametrize(("worker", "history"), [("gevent", 100_000), ("gthread", 8)])
def test_a_client_that_reads_nothing_delays_nobody_and_is_cut_off(
    connect: Connect, worker: str, history: int
) -> None:
    # So long that none of the good ones stands still for it, however busy the machine is.
    config: dict[str, Any] = {"heartbeat": LONG, "max_lag": 8, "history": history}
    with serve(worker, **config) as server, crowd("audience", server, good=20) as good:
        flood(server, size=4096, batch=1, pause=0.01)
        alone = good.next_figures(150)
        process = workers(server)[0]
        memory, bad_ones = [0.0], list[Client]()

        def harms_nobody() -> bool:
            # More than once, as the machine may have other things to do. A hub that waited for one
            # would do so each time, until it cuts it off.
            bad_ones.append(connect(server, buffer=4096).begin())
            memory.append(memory_mib(process))
            beside = good.next_figures(150)["arrival_p99"]
            report(alone=alone["arrival_p99"], beside=beside)
            return bool(beside < 1.5 * alone["arrival_p99"] + 100)

        wait_for(harms_nobody)
        wait_for_subscribers(server, 20)
        # What was published meanwhile is kept for those who return.
        assert memory_mib(process) - memory[-1] < 16
        bad = bad_ones[-1]
        # More than a short history keeps.
        good.next_figures(10)
        assert_gets_the_rest(connect, server, bad, resumes=history > 8)
        post(server, "/flood/end")
        figures = good.figures()
        assert (figures["faults"], figures["ended"]) == ([], 0)


def assert_gets_the_rest(connect: Connect, server: Server, cut: Client, resumes: bool) -> None:
    """See that a client that was cut off gets what it missed, or is told that it is gone."""
    got = cut.wait_for_end()
    assert (got.faults, got.is_complete) == ([], False)
    again = connect(server, last_event_id=got.id).begin()
    wait_for(lambda: again.read_all().events, what="events after the return")
    assert again.wire.resets == (0 if resumes else 1)
    assert (again.wire.first == got.last + 1) is resumes
    assert again.wire.faults == []


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_client_that_reads_in_small_pieces_gets_everything_in_order(
    connect: Connect, worker: str
) -> None:
    with serve(worker, heartbeat=LONG, max_lag=10) as server:
        client = connect(server, buffer=4096).begin()
        last = publish(server, 1000, size=2000)
        pace = threading.Event()
        while client.read(4096, timeout=20) and client.wire.last < last:
            pace.wait(0.001)
        assert (client.wire.last, client.wire.faults) == (last, [])


@pytest.mark.parametrize(("size", "buffer"), [(10, 0), (10_000, 4096)])
def test_a_client_that_reads_byte_by_byte_gets_its_bytes_or_is_ended(
    connect: Connect, size: int, buffer: int
) -> None:
    with serve("gthread", heartbeat=LONG, max_lag=1) as server:
        client = connect(server, buffer=buffer).begin()
        flood(server, size, batch=1, pause=0.01)
        pace, deadline = threading.Event(), time.monotonic() + 3
        while time.monotonic() < deadline and client.read(1, timeout=20):
            pace.wait(1)
        published = post(server, "/flood/end")["published"]
        if buffer:
            assert client.wait_for_end().last < published - 1
            assert subscribers(server) == 0
        else:
            client.wait_for_event(published - 1)
        assert client.wire.faults == []


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
@pytest.mark.parametrize("hijack", [True, False])
def test_a_client_that_closes_its_half_goes_on_reading(
    connect: Connect, worker: str, hijack: bool
) -> None:
    with serve(worker, heartbeat=LONG, hijack=hijack) as server:
        early, late = connect(server), connect(server).begin()
        early.socket.shutdown(socket.SHUT_WR)
        early.begin()
        late.socket.shutdown(socket.SHUT_WR)
        for _ in range(3):
            last = publish(server)
            early.wait_for_event(last)
            late.wait_for_event(last)
        assert early.wire.faults == late.wire.faults == []


@pytest.mark.parametrize("worker", OPTIONS)
def test_a_client_that_leaves_is_gone_without_a_heartbeat(connect: Connect, worker: str) -> None:
    with serve(worker, heartbeat=LONG) as server:
        clients = [connect(server).begin() for _ in range(20)]
        assert subscribers(server) == 20
        for rudely in (True, False):
            for _ in range(10):
                clients.pop().close(rudely)
            wait_for_subscribers(server, len(clients))


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_client_that_vanishes_is_gone_after_a_heartbeat_and_the_lag(
    connect: Connect, worker: str
) -> None:
    with serve(worker, heartbeat=1, max_lag=1) as server:
        client = connect(server).begin()
        drop_all_packets(client.socket)
        wait_for_subscribers(server, 0)


def drop_all_packets(client: socket.socket) -> None:
    """Have the kernel drop what comes for a socket, unacknowledged, as if its cable were cut."""
    return_nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(return_nothing))
    client.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


class Garbage:
    """Bytes that nobody asked for, so many in each millisecond, as long as the block runs."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients = clients
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send)
        # So few that they can arrive for seconds before the server's kernel takes no more.
        self.size = 30

    def _send(self) -> None:
        while not self._is_over.wait(0.001):
            for client in self._clients:
                with suppress(BlockingIOError, ConnectionError):
                    client.socket.send(b"x" * self.size)

    def __enter__(self) -> Garbage:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.mark.parametrize(
    ("worker", "loop"),
    [("gevent", "libev-cext"), ("gevent", "libuv-cffi"), ("gthread", ""), ("sync", "")],
)
def test_garbage_behind_a_request_costs_no_time_and_no_event(
    connect: Connect, worker: str, loop: str
) -> None:
    if loop == "libuv-cffi":
        pytest.importorskip("cffi", reason="gevent's libuv needs it")
    environ = {"GEVENT_LOOP": loop} if loop else {}
    with serve(worker, environ=environ, heartbeat=LONG) as server:
        clients = [connect(server, slowly=True).begin() for _ in range(5)]
        process = workers(server)[0]
        with Garbage(clients) as garbage:
            # Once more if need be: the machine may have taken its time away. A loop that is woken
            # in vain, or for each byte, is so each time.
            wait_for(lambda: share_of_processor(process) < 0.3, what="it to rest beside a trickle")
            garbage.size = 30_000
            wait_for(lambda: share_of_processor(process) < 0.3, what="it to rest beside a flood")
            last = publish(server, 200, size=100)
            post(server, "/disconnect")
            wires = [client.wait_for_end() for client in clients]
        assert [(wire.last, wire.faults) for wire in wires] == [(last, [])] * 5
        assert all(wire.is_complete for wire in wires)


def share_of_processor(process: int) -> float:
    """Return how much of a second's time a process spends working."""
    start, used = time.monotonic(), cpu_seconds(process)
    wait_for(lambda: time.monotonic() > start + 1)
    return (cpu_seconds(process) - used) / (time.monotonic() - start)


@pytest.mark.parametrize("worker", OPTIONS)
def test_who_sent_garbage_and_reads_late_still_gets_the_end(connect: Connect, worker: str) -> None:
    with serve(worker, heartbeat=LONG) as server:
        client = connect(server, buffer=4096).begin()
        for _ in range(10):
            assert is_ready(client.socket, select.POLLOUT, 20)
            client.socket.send(b"x" * 30_000)
        last = publish(server, 40, size=2000)
        post(server, "/disconnect")
        # Closed by now, with most of the events still on their way.
        wait_for_subscribers(server, 0)
        wire = client.wait_for_end()
        assert (wire.last, wire.is_complete, wire.faults) == (last, True, [])


# --- Many of them


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_thousand_stalled_clients_take_nothing_from_a_thousand_others(worker: str) -> None:
    with (
        serve(worker, "--graceful-timeout", f"{LONG:g}", heartbeat=LONG, max_lag=600) as server,
        crowd("audience", server, good=1000, stalled=1000) as clients,
    ):
        process, idle = workers(server)[0], memory_mib(workers(server)[0])
        # More than the kernel takes for those who do not read.
        clients.figures(publish(server, 60, size=4000))
        flood(server, size=1000, batch=1, pause=0.05)
        clients.next_figures(20)
        memory = memory_mib(process)
        figures = clients.next_figures(1200 if IS_FULL else 60)
        growth = memory_mib(process) - memory
        # Who has not everything when the server stops gets no clean end.
        last = clients.figures(post(server, "/flood/end")["published"] - 1)["last"]
        assert last >= figures["last"]
        report(idle=idle, at_first=memory, growth=growth, p99=figures["arrival_p99"])
        assert subscribers(server) == 2000
        assert (figures["served"], figures["first"]) == (1000, 0)
        assert (figures["faults"], figures["ended"]) == ([], 0)
        # History and tail may fill up: 4 MiB.
        assert growth < 8
        server.process.terminate()
        server.process.wait(DEADLINE)
        wait_for(lambda: clients.figures()["ended"] == 1000, what="the end of the good")
        assert clients.figures()["complete"] == 1000


@pytest.mark.parametrize("worker", OPTIONS)
def test_nothing_is_lost_or_left_when_clients_come_and_go(connect: Connect, worker: str) -> None:
    clients = 50_000 if IS_FULL else 3000
    with serve(worker, heartbeat=LONG) as server:
        # The first ones start what stays: the hub's descriptors, caches, a full history.
        come_and_go(server, 300)
        wait_for_subscribers(server, 0)
        before, process = settled_state(server), workers(server)[0]
        objects, memory, start = blocks(server), memory_mib(process), time.monotonic()
        figures = come_and_go(server, clients)
        seconds = time.monotonic() - start
        wait_for(lambda: is_as_before(server, before), what=f"{before} again")
        growth, left = memory_mib(process) - memory, blocks(server) - objects
        report(growth=growth, left=left, seconds=seconds, **figures)
        assert figures["faults"] == []
        # Nobody's connection was closed in somebody else's place.
        assert figures["closed"] == 0
        assert figures["events"] > 100 * figures["cut"]
        # Memory has holes, which come and go. Objects have none: nobody left one behind.
        assert left < clients / 4
        assert growth < 16


def come_and_go(server: Server, clients: int) -> dict[str, Any]:
    """Let clients come and leave beside a flood; return what they got, once all have left."""
    flood(server, size=20, batch=100, pause=0.001)
    with crowd("churn", server, clients=clients) as they:
        figures = they.figures()
    return {**figures, **post(server, "/flood/end")}


def blocks(server: Server) -> int:
    """Return how many pieces of memory the objects of a worker have."""
    with urllib.request.urlopen(f"{server.url}/blocks", timeout=20) as answer:
        found: int = json.load(answer)["blocks"]
        return found


def is_as_before(server: Server, before: dict[str, Any]) -> bool:
    now = state(server)
    now.pop("channels")
    changed = {key: value for key, value in now.items() if value != before[key]}
    if changed:
        print(f"{changed} are not as in {before}")
    return not changed


def settled_state(server: Server) -> dict[str, Any]:
    """Return the least of each figure, since some connection may still be about to be closed."""
    states = [state(server) for _ in range(10)]
    return {key: min(one[key] for one in states) for key in states[0]}


# --- The life of a process


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_preloaded_workers_have_a_hub_each(connect: Connect, worker: str) -> None:
    with serve(worker, "--preload", "--workers", "2", heartbeat=LONG) as server:
        wait_for(lambda: len(workers(server)) == 2, what="two workers")
        clients = [connect(server, "/who").begin()]
        pids = {pid_of(clients[0])}
        with standing_still(*pids):
            clients.append(connect(server, "/who").begin())
            pids.add(pid_of(clients[-1]))
        assert pids == set(workers(server))
        wait_for(lambda: all_got_an_event(server, clients), what="an event from each worker")
        assert [client.wire.faults for client in clients] == [[]] * len(clients)


def all_got_an_event(server: Server, clients: list[Client]) -> bool:
    # Which worker publishes it is as it comes.
    publish(server)
    return all(client.read_all().events for client in clients)


def pid_of(client: Client) -> int:
    wait_for(lambda: client.read_all().snapshot, what="the worker's process id")
    return int(client.wire.snapshot)


@pytest.mark.parametrize("worker", OPTIONS)
def test_streams_end_and_return_when_a_worker_has_served_enough(
    connect: Connect, worker: str
) -> None:
    with serve(worker, "--max-requests", "4", heartbeat=LONG) as server:
        old = workers(server)
        clients = [connect(server).begin() for _ in range(3)]
        publish(server)
        for client in clients:
            assert client.wait_for_end().is_complete
            assert (client.wire.last, client.wire.faults) == (0, [])
        wait_for_another_worker(server, old)
        again = connect(server, last_event_id=clients[0].wire.id).begin()
        publish(server)
        wait_for(lambda: again.read_all().events)
        assert again.wire.resets == 1


def wait_for_another_worker(server: Server, old: list[int]) -> None:
    """Wait as long as browsers do at least: the old one accepts for up to a second more."""
    wait_for(lambda: not set(old) & set(workers(server)), what="another worker")


@pytest.mark.parametrize("worker", OPTIONS)
def test_streams_end_and_return_when_the_code_changes(
    connect: Connect, worker: str, tmp_path: Path
) -> None:
    module = tmp_path / "reloaded_app.py"
    module.write_text("from tests.apps import create_app\napp = create_app()\n")
    command = gunicorn(
        "reloaded_app:app", worker, *OPTIONS[worker], "--reload", "--pythonpath", str(tmp_path)
    )
    port = free_port()
    with running([part.replace(":0", f":{port}") for part in command], port, UNTRACED) as server:
        client, old = connect(server).begin(), workers(server)
        publish(server)
        wait_for(lambda: ends_when_touched(client, module))
        assert client.wire.is_complete
        wait_for_another_worker(server, old)
        again = connect(server, last_event_id=client.wire.id).begin()
        publish(server)
        wait_for(lambda: again.read_all().events)
        assert again.wire.resets == 1


def ends_when_touched(client: Client, module: Path) -> bool:
    # More than once: at first the server may not know yet how old it was.
    module.touch()
    client.read_all()
    return client.is_ended


@pytest.mark.parametrize("worker", OPTIONS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT", "SIGINT"])
def test_a_signal_ends_streams_and_process_at_once(
    connect: Connect, worker: str, name: str
) -> None:
    options = [*OPTIONS[worker], "--graceful-timeout", f"{LONG:g}"]
    with serving(app(heartbeat=LONG), worker, *options, environ=UNTRACED) as server:
        clients = [connect(server).begin() for _ in range(50)]
        last = publish(server)
        server.process.send_signal(signal.Signals[name])
        # Nothing else would end them, and the server would wait for them.
        server.process.wait(DEADLINE)
        wires = [client.wait_for_end() for client in clients]
        assert [(wire.last, wire.faults) for wire in wires] == [(last, [])] * 50
        assert all(wire.is_complete for wire in wires)
        # SIGQUIT and SIGINT may hit the end of the last request, which gunicorn tells then.
        assert "flask_eventstream" not in server.log(), server.log()


@pytest.mark.parametrize("worker", OPTIONS)
def test_streams_by_the_thousand_end_cleanly(worker: str) -> None:
    number = 9000 if IS_FULL else 1000
    with (
        serve(worker, "--graceful-timeout", f"{LONG:g}", heartbeat=LONG) as server,
        crowd("audience", server, good=number) as clients,
    ):
        clients.figures(publish(server))
        server.process.terminate()
        server.process.wait(DEADLINE)
        wait_for(lambda: clients.figures()["ended"] == number, what="the end of the streams")
        figures = clients.figures()
        assert (figures["complete"], figures["faults"]) == (number, [])


@pytest.mark.parametrize("worker", OPTIONS)
@pytest.mark.parametrize("kind", ["?forked=60", ""], ids=["forked", "executed"])
def test_a_child_process_keeps_no_clients(connect: Connect, worker: str, kind: str) -> None:
    # gunicorn does not stop a worker that has only just begun, but kills it after that time.
    with (
        serve(worker, "--graceful-timeout=1", heartbeat=LONG) as server,
        ExitStack() as children,
    ):
        clients = [connect(server).begin() for _ in range(5)]
        child = post(server, f"/child{kind}")["child"]
        children.callback(os.kill, child, signal.SIGKILL)
        last = publish(server)
        for client in clients:
            client.wait_for_event(last)
        clients.pop().close()
        wait_for_subscribers(server, 4)
        # The hub would shut the connections down; now the kernel closes them, if nobody has them.
        os.kill(workers(server)[0], signal.SIGKILL)
        for client in clients:
            assert client.wait_for_end().faults == []
        os.kill(child, 0)


@pytest.mark.parametrize("worker", OPTIONS)
def test_a_child_process_that_ends_ends_no_streams(connect: Connect, worker: str) -> None:
    with serve(worker, heartbeat=LONG) as server:
        client = connect(server).begin()
        child = post(server, "/child?forked=0")["child"]
        wait_for(lambda: has_ended(child), what="the end of the child")
        client.wait_for_event(publish(server))
        assert client.wire.faults == []


def has_ended(process: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_flasks_own_server_ends_at_ctrl_c(connect: Connect) -> None:
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", "tests.apps", "run", "--port", str(port)]
    with running(command, port, UNTRACED) as server:
        clients = [connect(server).begin() for _ in range(5)]
        last = publish(server)
        for client in clients:
            client.wait_for_event(last)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(DEADLINE)
        assert [client.wait_for_end().faults for client in clients] == [[]] * 5
        assert "Traceback" not in server.log(), server.log()


# --- Descriptors


@pytest.mark.parametrize("worker", OPTIONS)
def test_there_is_no_room_for_more_streams_than_descriptors(connect: Connect, worker: str) -> None:
    limit, reserve = 1024, 102
    command = gunicorn(app(heartbeat=LONG), worker, *OPTIONS[worker])
    port = free_port()
    limited = ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh"]
    command = [*limited, *(part.replace(":0", f":{port}") for part in command)]
    with running(command, port, UNTRACED) as server:
        # Each takes some more while it comes. Without any left, gunicorn with threads ends.
        with crowd("audience", server, good=1200, at_once=15) as clients:
            assert clients.connected["served"] == limit - reserve
            refused = clients.connected["refused"]
            assert len(refused) == 1200 - (limit - reserve)
            assert all(" 503 " in head and "Retry-After: 5" in head for head in refused)
            assert subscribers(server) == limit - reserve
        wait_for_subscribers(server, 0)
        client = connect(server).begin()
        client.wait_for_event(publish(server))
        assert "Traceback" not in server.log(), server.log()


class Passage:
    """A source at whose end another client comes, in the very turn in which one has gone."""

    def __init__(self) -> None:
        self.turns = 0
        self.come: Callable[[], None] = lambda: None
        self._may_pass = threading.Event()

    def news(self) -> list[Source]:
        """Hold up the hub's turn, until :meth:`let_pass`."""
        self.turns += 1
        self._may_pass.wait(20)
        return []

    def let_pass(self) -> None:
        self._may_pass.set()

    def read(
        self, after: int, until: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, int]:
        # There is no news before the second one comes, who knows it already.
        return (b"x", 1) if self._may_pass.is_set() else (b"", after)

    @property
    def end(self) -> int | None:
        self.come()
        return None

    @end.setter
    def end(self, position: int | None) -> None: ...


class Stranger:
    """One end of a connection, of which the hub has the other."""

    def __init__(self, hub: SocketHub, source: Passage, position: int) -> None:
        server, self.client = socket.socketpair()
        hub.add(Subscriber(server.detach(), self, source, position, b"", False, math.inf))

    def end(self, reason: str) -> None:
        """Do nothing about it."""


def test_what_a_socket_had_to_tell_does_not_hit_the_next_one_with_its_number() -> None:
    source = Passage()
    hub = SocketHub(lambda ring: source.news, LONG, b":\n", LONG, lambda streams: b"")
    with ExitStack() as clients:
        clients.callback(hub.stop)
        came: list[socket.socket] = []

        def come(position: int) -> None:
            came.append(clients.enter_context(Stranger(hub, source, position).client))

        come(0)
        wait_for(lambda: source.turns == 1)
        # It gets the number of the first one, if that is free.
        source.come = lambda: come(1) if len(came) == 2 else None
        came[0].close()
        come(1)
        source.let_pass()
        wait_for(lambda: len(came) == 3 and source.turns > 2)
        assert not is_ready(came[2], select.POLLIN, 0)


# --- A thread that computes


def test_a_thread_that_computes_delays_no_event_much() -> None:
    number, pause = (1000, 0.05) if IS_FULL else (300, 0.03)
    with (
        serve("gthread", heartbeat=LONG) as server,
        crowd("audience", server, good=number) as clients,
    ):
        flood(server, size=100, batch=1, pause=pause)
        alone = clients.next_figures(EVENTS)

        def delays_little() -> bool:
            # More than once, as other programs may compute as well. One that delays events in this
            # process does so each time.
            computing = threading.Thread(target=compute, args=(server, EVENTS * pause + 1.5))
            computing.start()
            clients.next_figures(3)
            beside = clients.next_figures(EVENTS)
            has_computed = computing.is_alive()
            computing.join()
            figures = {"alone": alone["everybody_p99"], "beside": beside["everybody_p99"]}
            report(**figures, median=beside["everybody_p50"], events=beside["events"])
            assert (beside["faults"], beside["ended"]) == ([], 0)
            is_whole = beside["events"] >= EVENTS * 0.8
            return has_computed and is_whole and beside["everybody_p99"] < 500

        wait_for(delays_little)


def compute(server: Server, seconds: float) -> None:
    with urllib.request.urlopen(f"{server.url}/compute?seconds={seconds}", timeout=60) as answer:
        answer.read()
