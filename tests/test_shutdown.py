"""What is left open when a server is told to stop: nothing, and nobody waits for it."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import concurrency
from flask_eventstream.shutdown import Shutdown, farewell, gunicorn_worker

from .servers import DEADLINE, ROOT, Server, free_port, gunicorn, running, wait_for
from .stress import Readers, request
from .test_stress import publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask import Flask

    from flask_eventstream import EventStream

# Nothing else ends a stream here: no heartbeat comes, no stream is cut, and no server gives up.
CONFIG = {"EVENTSTREAM_HEARTBEAT": 3600, "TIME_TO_END": 3600}
OPTIONS = {
    "gevent": ["--worker-connections", "1000"],
    "gevent_pywsgi": ["--worker-connections", "1000"],
    "gthread": ["--threads", "150", "--worker-connections", "1000"],
    "sync": [],
}
FAREWELL = re.compile(rb"retry: \d+\n\r\n0\r\n\r\n\Z")


@contextmanager
def stage(command: list[str], port: int) -> Iterator[tuple[Server, Readers]]:
    with running(command, port) as server:
        clients = Readers(port)
        try:
            yield server, clients
        finally:
            clients.close()


def app(**config: Any) -> str:
    return f"tests.apps:create_app({CONFIG | config})"


@contextmanager
def serving(worker: str, **config: Any) -> Iterator[tuple[Server, Readers]]:
    port = free_port()
    options = [*OPTIONS[worker], "--graceful-timeout", "3600"]
    command = gunicorn(app(**config), worker, *options, port=port)
    with stage(command, port) as both:
        yield both
        assert "Traceback" not in both[0].log(), both[0].log()


def stop(server: Server, kind: signal.Signals = signal.SIGTERM) -> None:
    """Tell a server to stop, and wait until it is gone, which an open stream would prevent."""
    server.process.send_signal(kind)
    server.process.wait(DEADLINE)


@pytest.mark.parametrize(
    ("worker", "hijack"),
    [
        ("gevent", True),
        ("gevent", False),
        ("gevent_pywsgi", False),
        ("gthread", True),
        ("gthread", False),
    ],
)
def test_a_worker_that_is_told_to_stop_ends_all_its_streams_and_is_gone(
    worker: str, hijack: bool
) -> None:
    with serving(worker, EVENTSTREAM_HIJACK=hijack) as (server, clients):
        streams = clients.connect("/stream", 50)
        for path in ("ticks", "quiet", "silent", "merged"):
            streams += clients.connect(f"/stream/{path}", 5)
        runs = clients.connect("/stream/answer/one", method="POST")
        blocked = clients.connect("/stream/blocked", 5) if worker != "gthread" else []
        stop(server)
        ends = clients.ends(streams + blocked)
        assert [end for end in ends if not FAREWELL.search(end)] == []
        assert all(b"event: lost\n" in end for end in clients.ends(runs))
        assert server.log().count("blocked was closed") == len(blocked)


@pytest.mark.parametrize("path", ["/stream", "/stream/ticks", "/stream/quiet"])
def test_the_sync_worker_is_gone_too_though_a_stream_has_it(path: str) -> None:
    with serving("sync", EVENTSTREAM_HIJACK=False) as (server, clients):
        streams = clients.connect(path)
        stop(server)
        assert all(map(FAREWELL.search, clients.ends(streams)))


def test_the_sync_worker_ends_the_streams_of_its_hub() -> None:
    with serving("sync") as (server, clients):
        streams = clients.connect("/stream", 300)
        stop(server)
        assert all(map(FAREWELL.search, clients.ends(streams)))


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_client_that_reads_nothing_holds_up_no_worker(worker: str) -> None:
    # As long as streams that can end are given.
    with serving(worker, TIME_TO_END=0) as (server, clients), socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        stalled.sendall(request("/stream/large"))
        assert stalled.recv(1, socket.MSG_PEEK)
        others = clients.connect("/stream", 10)
        # By now the server waits until there is room for more.
        wait_for(lambda: is_stuck(server))
        stop(server)
        assert all(map(FAREWELL.search, clients.ends(others)))


@pytest.mark.parametrize(
    ("worker", "hijack"), [("gthread", False), ("gevent", False), ("gthread", True)]
)
def test_a_client_that_reads_nothing_of_history_holds_up_no_worker(
    worker: str, hijack: bool
) -> None:
    with (
        serving(worker, TIME_TO_END=0, EVENTSTREAM_HIJACK=hijack) as (server, _),
        socket.socket() as stalled,
    ):
        publish(server, 200, 100_000)
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        # A cursor that nobody has given it; and nothing else makes the server be looked at.
        stalled.sendall(request("/stream?last_event_id=x"))
        assert stalled.recv(1, socket.MSG_PEEK)
        wait_for(lambda: is_stuck(server, 100_000))
        stop(server)


CHAINED = """
import functools, os, signal, sys
from tests.apps import create_app

def chained(before, *arguments):
    return before(*arguments)

def chain(kind):
    before = signal.getsignal(kind)
    if "exit" in os.environ["CHAINED"]:
        signal.signal(kind, lambda *arguments: sys.exit(0))
    elif "partial" in os.environ["CHAINED"]:
        signal.signal(kind, functools.partial(chained, before))
    else:
        signal.signal(kind, lambda *arguments: before(*arguments))

app = create_app({"EVENTSTREAM_HIJACK": False, "EVENTSTREAM_HEARTBEAT": 3600})
for name in os.environ["CHAINED"].split()[1:]:
    chain(getattr(signal, name))
"""


@pytest.mark.parametrize(
    ("worker", "chained"),
    [
        *product(
            ["gevent", "gthread", "sync"], ["partial SIGTERM", "function SIGTERM SIGINT SIGQUIT"]
        ),
        # It does not call the server's. The sync worker is in the middle of its stream then.
        *product(["gevent", "gthread"], ["exit SIGTERM"]),
    ],
)
def test_an_app_may_have_its_own_handlers_before_the_servers_or_in_place_of_them(
    worker: str, chained: str, tmp_path: Path
) -> None:
    (tmp_path / "chained_app.py").write_text(CHAINED)
    port = free_port()
    options = *OPTIONS[worker], "--graceful-timeout", "3600"
    command = gunicorn("chained_app:app", worker, *options, port=port)
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CHAINED": chained}
    with running(command, port, environ) as server:
        clients = Readers(port)
        try:
            streams = clients.connect("/stream", 1 if worker == "sync" else 5)
            stop(server)
            assert all(map(FAREWELL.search, clients.ends(streams)))
        finally:
            clients.close()


def is_stuck(server: Server, least: int = 200_000) -> bool:
    """Tell whether something that was to be sent to a client stays where it is."""
    listed = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True)
    sender = f":{server.port:04X} "
    rows = [row.split() for row in listed.stdout.splitlines()[1:] if sender in row.split("rem")[0]]
    queues = [int(row[4].partition(":")[0], 16) for row in rows if row[1].endswith(sender.strip())]
    return any(size > least for size in queues)


PYWSGI = f"""
CONFIG = {CONFIG}
import signal, sys
import gevent
from gevent import monkey, pywsgi
if "patched" in sys.argv:
    monkey.patch_all()
from tests.apps import create_app
server = pywsgi.WSGIServer(
    ("127.0.0.1", int(sys.argv[1])),
    create_app(dict(CONFIG, EVENTSTREAM_HIJACK="hub" in sys.argv)),
    log=None,
)
gevent.signal_handler(signal.SIGTERM, server.stop)
server.serve_forever()
"""


@pytest.mark.parametrize("options", [["patched", "hub"], ["patched"], ["hub"], []])
def test_gevents_own_server_is_gone_once_it_is_stopped(options: list[str]) -> None:
    port = free_port()
    command = [sys.executable, "-c", PYWSGI, str(port), *options]
    with stage(command, port) as (server, clients):
        streams = clients.connect("/stream", 50)
        streams += clients.connect("/stream/quiet", 5)
        stop(server)
        assert all(map(FAREWELL.search, clients.ends(streams)))
        assert "Traceback" not in server.log(), server.log()


def flask_run(port: int, app: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "flask", "--app", app, "run", "--port", str(port), *options]


@pytest.mark.parametrize("hijack", [True, False])
def test_ctrl_c_ends_flasks_own_server_and_its_streams(hijack: bool) -> None:
    port = free_port()
    # What waits in a thread is not waited for without end.
    command = flask_run(port, app(EVENTSTREAM_HIJACK=hijack, TIME_TO_END=0))
    with stage(command, port) as (server, clients):
        streams = clients.connect("/stream", 10)
        streams += clients.connect("/stream/quiet", 2)
        blocked = clients.connect("/stream/blocked")
        stop(server, signal.SIGINT)
        assert len(clients.ends(blocked)) == 1
        # Werkzeug's server speaks HTTP/1.0, and has no chunks.
        ends = clients.ends(streams)
        assert [end for end in ends if not re.search(rb"retry: \d+\n(\r\n0\r\n\r\n)?\Z", end)] == []
        assert "Traceback" not in server.log(), server.log()


def test_a_change_of_the_code_restarts_flasks_own_server_at_once(tmp_path: Path) -> None:
    module = tmp_path / "changed_app.py"
    module.write_text(f"from tests.apps import create_app\napp = create_app({CONFIG})\n")
    port, environ = free_port(), {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = flask_run(port, "changed_app:app", "--debug")
    with running(command, port, environ) as server:
        clients = Readers(port)
        try:
            streams = clients.connect("/stream", 10)
            streams += clients.connect("/stream/quiet", 2)
            module.touch()
            clients.ends(streams)
            wait_for(lambda: not is_refused(port), what="the server to be back")
            clients.connect("/stream")
            assert "Traceback" not in server.log(), server.log()
        finally:
            clients.close()


def is_refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_more_streams_end_at_once_the_longer_it_takes_until_all_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def times(streams: int) -> list[int]:
        # What is drawn is spread evenly: what becomes of it is not left to chance.
        drawn = [n / 10_000 for n in range(10_000)]
        monkeypatch.setattr(random, "random", lambda: drawn.pop())
        lines = [farewell(3000, streams) for _ in range(10_000)]
        assert drawn == []
        assert all(re.fullmatch(rb"retry: \d+\n", line) for line in lines)
        return sorted(int(line.split()[1]) for line in lines)

    few, many = times(1), times(10_000)
    assert (few[0], few[-1]) == (2400, 3599)
    assert (many[0], many[-1]) == (2400, 12_399)
    # A thousand in each second.
    for second in range(10):
        begin = 2400 + 1000 * second
        assert sum(begin <= time < begin + 1000 for time in many) == 1000


class Part:
    """What has streams of its own, and notes when it is stopped."""

    def __init__(self) -> None:
        self.is_busy = False
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


class Held:
    """A stream that does not end, since its client takes nothing."""

    def __init__(self, shutdown: Shutdown) -> None:
        self.shutdown = shutdown
        self.is_cut = False

    def stop(self) -> None:
        """Do nothing: it waits for something else."""

    def cut(self) -> None:
        self.is_cut = True
        self.shutdown.leave(self)


def test_it_ends_everything_once_whoever_asks() -> None:
    part = Part()
    shutdown = Shutdown(3000, part)
    threads = [threading.Thread(target=shutdown.begin) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert part.stops == 1


def test_a_connection_is_cut_that_does_not_end_in_time_and_no_other() -> None:
    shutdown = Shutdown()
    held, other = Held(shutdown), Held(shutdown)
    shutdown.enter(held)
    shutdown.cut_late(held.cut)
    shutdown.cut_late(other.cut)()
    shutdown.begin()
    assert held.is_cut
    assert not other.is_cut


def test_a_connection_is_not_cut_while_the_server_sends_the_end_of_its_stream() -> None:
    shutdown = Shutdown()
    held, late = Held(shutdown), Held(shutdown)
    shutdown.enter(late)
    on_sent = shutdown.cut_late(held.cut)
    stopping = threading.Thread(target=shutdown.begin)
    stopping.start()
    wait_for(lambda: shutdown.has_begun)
    shutdown.leave(late)
    # It would be cut at once if only streams were waited for.
    stopping.join(0.1)
    assert not held.is_cut
    on_sent()
    stopping.join(20)


def test_a_connection_is_not_kept_for_another_request_once_the_server_stops() -> None:
    shutdown = Shutdown()
    held = Held(shutdown)
    on_sent = shutdown.cut_late(held.cut)
    shutdown.has_begun = True
    on_sent()
    assert held.is_cut


class Worker:
    """What gunicorn has: the owner of a handler of signals, which says when it stops."""

    def __init__(self) -> None:
        self.alive = True

    def handle_exit(self, *arguments: Any) -> None: ...


def test_a_worker_is_watched_as_long_as_there_are_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, part = Worker(), Part()
    monkeypatch.setattr(signal, "getsignal", lambda kind: worker.handle_exit)
    shutdown = Shutdown(3000, part)
    held = Held(shutdown)
    for _ in range(3):
        shutdown.enter(held)
        assert shutdown._is_watched
        shutdown.leave(held)
        wait_for(lambda: not shutdown._is_watched)
    part.is_busy = True
    shutdown.watch()
    worker.alive = False
    wait_for(lambda: part.stops)
    wait_for(lambda: not shutdown._is_watched)


def test_a_connection_that_may_be_cut_is_a_reason_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    monkeypatch.setattr(signal, "getsignal", lambda kind: worker.handle_exit)
    shutdown = Shutdown()
    on_sent = shutdown.cut_late(lambda: None)
    assert shutdown._is_watched
    on_sent()
    wait_for(lambda: not shutdown._is_watched)


def test_a_handler_of_the_apps_own_hides_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, app = Worker(), Worker()
    of_app = {signal.SIGTERM: app.handle_exit, signal.SIGINT: partial(worker.handle_exit)}
    monkeypatch.setattr(signal, "getsignal", lambda kind: of_app.get(kind, worker.handle_exit))
    assert gunicorn_worker() is worker


def test_a_stream_begins_though_there_is_no_thread_to_watch_its_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    worker = Worker()
    monkeypatch.setattr(signal, "getsignal", lambda kind: worker.handle_exit)
    shutdown = Shutdown()
    held = Held(shutdown)
    with monkeypatch.context() as patch:
        patch.setattr(concurrency, "spawn", fail)
        shutdown.enter(held)
    assert not shutdown._is_watched
    shutdown.watch()
    assert shutdown._is_watched
    shutdown.leave(held)
    wait_for(lambda: not shutdown._is_watched)


def test_a_forked_child_has_no_streams_to_end() -> None:
    shutdown = Shutdown()
    shutdown.enter(Held(shutdown))
    shutdown.has_begun = True
    shutdown._start()  # what os.register_at_fork() calls
    assert not shutdown.has_begun
    assert not shutdown._streams


def test_who_comes_when_the_server_stops_is_sent_away_for_a_while(
    make_app: Callable[..., Flask], eventstream: EventStream
) -> None:
    @eventstream.resumable("/run")
    def run() -> Iterator[str]:
        yield "x"

    app = make_app()
    app.extensions["eventstream"].shutdown.begin()
    client = app.test_client()
    for path in ("/stream", "/stream/run"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert re.fullmatch(r":\nretry: \d+\n", answer.text)
    answer = client.post("/stream/run")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
