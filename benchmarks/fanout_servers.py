"""The servers that ``fanout.py`` compares: how each is started, stopped, and what it has used.

All listen on loopback and speak the same small interface: ``GET /stream``, ``POST /publish`` (the
body is the data) and ``POST /burst?n=100``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Command = list[str]

PEERS = Path(__file__).parent / "peers"
LIMIT = "C epoll loop"
RUN_SECONDS = 120.0
START_SECONDS = 20.0
STOP_SECONDS = 5.0
NCHAN_MODULE = "ngx_nchan_module.so"


class AbsentError(Exception):
    """A server cannot be had on this machine; the message says why."""


class Stage(NamedTuple):
    """Where a server is started.

    :param folder: empty, and gone when the server is.
    :param subscribers: how many it will have.
    """

    port: int
    folder: Path
    subscribers: int


class Server(NamedTuple):
    """A way to serve subscribers.

    :param commands: what to run; the last is the server, others are what it needs.
    :param most: how many subscribers it is asked to hold.
    :param has_threads: whether a request may compute while others are served.
    :param bursts_itself: whether it has ``/burst``.
    :param answers_at_once: whether the head of an answer comes before the first event.
    """

    name: str
    commands: Callable[[Stage], list[Command]]
    most: int = 10_000
    is_ours: bool = False
    has_threads: bool = False
    bursts_itself: bool = True
    answers_at_once: bool = True

    def target(self, number: int, sets: str) -> str:
        """Return what a subscriber asks for: all the same, or each a set of channels of its own."""
        own = f"&channel=user:{number}" if sets == "own" else ""
        return f"/stream?channel=shared{own}" if self.is_ours else "/stream"


class Cpu(NamedTuple):
    """CPU time that processes have spent, in seconds.

    :param total: what the scheduler has counted, to the nanosecond.
    :param user: its part outside of the kernel, in ticks of 10 ms.
    :param helpers: the total of what a server needs beside it, such as Redis.
    """

    total: float
    user: float
    system: float
    helpers: float


def servers() -> dict[str, Server]:
    """Return all servers by name."""
    found = [
        Server(LIMIT, _c_loop),
        *_ours(),
        Server("nchan", _nchan, bursts_itself=False),
        Server("Node http", partial(_node, "node_http.mjs")),
        Server("better-sse", _better_sse),
        Server("Starlette", partial(uvicorn_commands, "starlette_app", ["starlette"])),
        Server("sse-starlette", partial(uvicorn_commands, "sse_starlette_app", ["sse_starlette"])),
        Server("FastAPI", partial(uvicorn_commands, "fastapi_app", ["fastapi"])),
        Server("Flask with queues", _flask_with_queues),
        flask_sse(),
    ]
    return {server.name: server for server in found}


def _ours() -> list[Server]:
    found = [
        gunicorn_ours("gevent"),
        gunicorn_ours("gthread", has_threads=True),
        gunicorn_ours("sync"),
        _script_ours("gevent-pywsgi", ["gevent"]),
        _script_ours("werkzeug", has_threads=True),
        gunicorn_ours("gevent", "iterator"),
        # A thread for each subscriber.
        gunicorn_ours("gthread", "iterator", most=1_000, has_threads=True),
        _script_ours("gevent-pywsgi", ["gevent"], "iterator"),
        _script_ours("werkzeug", (), "iterator", most=1_000, has_threads=True),
    ]
    return [server._replace(is_ours=True) for server in found]


def gunicorn_ours(
    worker: str,
    road: str = "hub",
    most: int = 10_000,
    has_threads: bool = False,
    broker_url: str = "memory://",
) -> Server:
    """Return this package in gunicorn, with one worker."""

    def commands(stage: Stage) -> list[Command]:
        threads = stage.subscribers + 16 if road == "iterator" else 8
        options = ["--threads", str(threads)] if worker == "gthread" else []
        app = f"ours:create_app({road != 'iterator'}, {broker_url!r})"
        return [gunicorn_command(stage, worker, app, options)]

    return Server(_name(f"gunicorn-{worker}", road), commands, most, has_threads=has_threads)


def _script_ours(
    name: str,
    modules: Iterable[str] = (),
    road: str = "hub",
    most: int = 10_000,
    has_threads: bool = False,
) -> Server:
    def commands(stage: Stage) -> list[Command]:
        _need_modules(modules)
        return [[sys.executable, "serve_ours.py", name, str(stage.port), road]]

    return Server(_name(name, road), commands, most, has_threads=has_threads)


def _name(server: str, road: str) -> str:
    return f"{server}:iterator" if road == "iterator" else server


def gunicorn_command(stage: Stage, worker: str, app: str, options: Iterable[str] = ()) -> Command:
    """Return the command that serves a WSGI app with one worker."""
    _need_modules(["gunicorn", *(["gevent"] if worker == "gevent" else [])])
    return [
        sys.executable, "-m", "gunicorn", "-k", worker, "-b", f"127.0.0.1:{stage.port}",
        "--log-level", "warning", "--backlog", "4096", "--timeout", "120", "--keep-alive", "30",
        "--graceful-timeout", "1", "--worker-connections", str(stage.subscribers + 1000),
        *options, app,
    ]  # fmt: skip


def _c_loop(stage: Stage) -> list[Command]:
    compiler = _need_program("cc", "gcc", "clang")
    program = str(stage.folder / "loop")
    _run([compiler, "-O2", "-o", program, str(PEERS / "loop.c")])
    return [[program, str(stage.port)]]


def _node(script: str, stage: Stage) -> list[Command]:
    return [[_need_program("node"), script, str(stage.port)]]


def _better_sse(stage: Stage) -> list[Command]:
    command = _node("better_sse.mjs", stage)
    if not (PEERS / "node_modules" / "better-sse").exists():
        npm = _need_program("npm")
        _run([npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"])
    return command


def uvicorn_commands(module: str, modules: Iterable[str], stage: Stage) -> list[Command]:
    """Return what serves an ASGI app that needs some modules."""
    _need_modules(["uvicorn", "uvloop", "httptools", *modules])
    return [[
        sys.executable, "-m", "uvicorn", f"{module}:app", "--host", "127.0.0.1",
        "--port", str(stage.port), "--loop", "uvloop", "--http", "httptools",
        "--backlog", "4096", "--no-access-log", "--log-level", "warning",
        "--timeout-graceful-shutdown", "1",
    ]]  # fmt: skip


def _flask_with_queues(stage: Stage) -> list[Command]:
    return [gunicorn_command(stage, "gevent", "queues_app:create_app()")]


def flask_sse(redis_url: str = "") -> Server:
    """Return Flask-SSE, with a Redis server of its own unless it is given one."""
    return Server("Flask-SSE", partial(_flask_sse, redis_url), most=1_000, answers_at_once=False)


def _flask_sse(redis_url: str, stage: Stage) -> list[Command]:
    _need_modules(["flask_sse"])
    own = stage._replace(port=free_port())
    redis = [] if redis_url else _redis(own)
    redis_url = redis_url or f"redis://127.0.0.1:{own.port}"
    return [*redis, gunicorn_command(stage, "gevent", f"flask_sse_app:create_app({redis_url!r})")]


def redis_server() -> Server:
    """Return a Redis server, which keeps nothing on the disk."""
    return Server("Redis", _redis)


def _redis(stage: Stage) -> list[Command]:
    redis = [_need_program("redis-server"), "--port", str(stage.port), "--bind", "127.0.0.1"]
    # An empty text is no schedule for saving to the disk.
    return [[*redis, "--save", "", "--dir", str(stage.folder)]]


def _nchan(stage: Stage) -> list[Command]:
    nginx = _need_program("nginx")
    values = {
        "MODULE": _nchan_module(nginx),
        "FOLDER": str(stage.folder),
        "PORT": str(stage.port),
        # Else root's worker becomes somebody who may not enter the folder.
        "USER": "user root;" if os.geteuid() == 0 else "",
    }
    text = (PEERS / "nchan.conf").read_text()
    head, _, rest = text.partition("\n")
    filled = re.sub("|".join(values), lambda match: values[match[0]], rest)
    (stage.folder / "nginx.conf").write_text(head + "\n" + filled)
    return [[nginx, "-p", str(stage.folder), "-c", str(stage.folder / "nginx.conf")]]


def _nchan_module(nginx: str) -> str:
    told = re.search(r"--modules-path=(\S+)", _run([nginx, "-V"]))
    folders = [told[1] if told else "", "/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"]
    for folder in folders:
        if folder and (Path(folder) / NCHAN_MODULE).exists():
            return str(Path(folder) / NCHAN_MODULE)
    raise AbsentError("nginx is here, its module nchan is not (Debian: libnginx-mod-nchan)")


def _need_modules(names: Iterable[str]) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise AbsentError(f"needs the Python package {', '.join(missing)}")


def _need_program(*names: str) -> str:
    for name in names:
        found = shutil.which(name) or shutil.which(f"/usr/sbin/{name}")
        if found:
            return found
    raise AbsentError(f"needs the program {names[0]}")


def _run(command: Command) -> str:
    """Return what a program prints."""
    name = Path(command[0]).name
    try:
        result = subprocess.run(
            command, cwd=PEERS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=RUN_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AbsentError(f"{name} failed: {error}") from error
    if result.returncode:
        last = result.stdout.strip().splitlines()[-1:]
        raise AbsentError(f"{name} failed: {' '.join(last)}")
    return result.stdout


def program_versions() -> dict[str, str]:
    """Return the versions of the programs that are no Python packages, where they are."""
    found = {
        "cc": _version_of(["cc", "--version"], r" (\d+\.\d+\.\d+)"),
        "nginx": _version_of(["nginx", "-v"], r"nginx/(\S+)"),
        "node": _version_of(["node", "--version"], r"v(\S+)"),
        "redis-server": _version_of(["redis-server", "--version"], r"v=(\S+)"),
        "nchan": _nchan_version(),
        "better-sse": _better_sse_version(),
    }
    return {name: version for name, version in found.items() if version}


def _version_of(command: Command, pattern: str) -> str | None:
    try:
        program = _need_program(command[0])
        match = re.search(pattern, _run([program, *command[1:]]))
    except AbsentError:
        return None
    return match[1] if match else None


def _nchan_version() -> str | None:
    # The module does not tell; Debian's package does.
    return _version_of(["dpkg-query", "-W", "libnginx-mod-nchan"], r"\t(?:\d+:)?(\d\S*)")


def _better_sse_version() -> str | None:
    manifest = PEERS / "node_modules" / "better-sse" / "package.json"
    match = re.search(r'"version": *"(.+?)"', manifest.read_text()) if manifest.exists() else None
    return match[1] if match else None


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A server that runs, with what it needs; ``pids`` are those of all its processes."""

    def __init__(self, server: Server, stage: Stage) -> None:
        self.server = server
        self.port = stage.port
        self._log = stage.folder / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._commands = server.commands(stage)

    def start(self) -> None:
        """Start the processes, and wait until the server listens."""
        for command in self._commands:
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    command, cwd=PEERS, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            self._processes.append(process)
        end = time.monotonic() + START_SECONDS
        while not _listens(self.port):
            if time.monotonic() > end or self._processes[-1].poll() is not None:
                raise AbsentError(f"it does not start: {self.last_words()}")
            time.sleep(0.02)

    def last_words(self) -> str:
        """Return the last line that the processes wrote."""
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def cpu(self) -> Cpu:
        """Return the CPU time that all processes have spent so far."""
        helpers = sum(_seconds(pid) for process in self._processes[:-1] for pid in _family(process))
        pids = list(self._pids())
        ticks = [_ticks(pid) for pid in pids]
        user, system = (sum(column) for column in zip(*ticks, strict=True))
        return Cpu(sum(map(_seconds, pids)), user, system, helpers)

    def memory(self) -> int:
        """Return the bytes of memory of all processes, what they share counted once."""
        return sum(_proportional_bytes(pid) for pid in self._pids())

    def _pids(self) -> Iterator[int]:
        for process in self._processes:
            yield from _family(process)

    def stop(self) -> None:
        """End all processes that were started: with patience first, then without."""
        for process in reversed(self._processes):
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            # Its workers too, which have no other parent; each has a session of its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def running(server: Server, subscribers: int) -> Iterator[Running]:
    """Run a server for so many subscribers as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="fanout-") as folder:
        found = Running(server, Stage(free_port(), Path(folder), subscribers))
        try:
            found.start()
            yield found
        finally:
            found.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _family(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Yield a process and all its descendants."""
    pids = [process.pid]
    for pid in pids:
        yield pid
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            pids += map(int, children.split())


def _seconds(pid: int) -> float:
    # The clock of another process (clock_getcpuclockid(3)): its threads too, and those that ended.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _ticks(pid: int) -> tuple[float, float]:
    """Return the seconds of a process in user and in system mode."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    rate = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / rate, int(fields[12]) / rate


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
