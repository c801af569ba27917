"""The proxies of the documentation, each with the configuration that it shows."""

from __future__ import annotations

import re
import ssl
import subprocess
from collections import deque
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flask_eventstream import EventStreamParser

from .servers import (
    DEADLINE,
    ROOT,
    free_port,
    running,
    serving,
    skip_unless_ci,
    system_part,
    wait_for,
)
from .test_clients import state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream import ServerSentEvent

    from .servers import Server

    Changes = tuple[tuple[str, str], ...]

SHOWN = ROOT / "docs" / "proxies"
TIMEOUT = 1
"""Of a proxy for a silent stream, in seconds, where a test is about that."""

# Nothing here should take a second; whatever a proxy holds back does not come at all.
AT_ONCE = DEADLINE

_ADDRESS = "127.0.0.1:8000"


class Kind(NamedTuple):
    """How a proxy is started with what the documentation shows.

    :ivar programs: its names.
    :ivar file: of the documentation.
    :ivar head: what stands before that: where its own files are, and what the system loads.
    :ivar plain: what is replaced to have it listen for HTTP.
    :ivar tls: what is replaced to have it listen for HTTPS.
    :ivar timeout: for a silent stream, with the ``60`` that is replaced.
    :ivar away: how it is made quick to find that nobody listens, and to say so.
    :ivar arguments: which run it in the foreground.
    """

    programs: list[str]
    file: str
    head: str
    plain: Changes
    tls: Changes
    timeout: str
    away: Changes
    arguments: list[str]


_NGINX_PATHS = "".join(
    f"{part}_temp_path {part}; " for part in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)
_RETRY = ("retry: 2000", "retry: 20")

KINDS = {
    "nginx": Kind(
        ["nginx"],
        "nginx.conf",
        "daemon off; pid nginx.pid; error_log stderr;\n",
        (("listen 80;", "listen {at};"), ("listen 443 ssl http2;", "")),
        (("listen 80;", ""), ("listen 443 ssl", "listen {at} ssl")),
        "proxy_read_timeout 60s",
        (_RETRY,),
        ["-p", "{home}", "-c", "nginx.conf", "-e", "stderr"],
    ),
    "haproxy": Kind(
        ["haproxy"],
        "haproxy.cfg",
        "",
        (("bind :80", "bind {at}"), ("    bind :443", "    # ")),
        (("    bind :80", "    # "), ("bind :443", "bind {at}")),
        "timeout server 60s",
        (_RETRY, ("timeout connect 5s", "timeout connect 50ms")),
        ["-db", "-f", "{home}/haproxy.cfg"],
    ),
    "caddy": Kind(
        ["caddy"],
        "Caddyfile",
        "{{\n admin off\n auto_https off\n storage file_system {home}\n}}\n",
        (("example.com {", "http://{at} {{\n bind 127.0.0.1"),),
        (("example.com {", "https://{at} {{\n bind 127.0.0.1\n tls {pem} {pem}"),),
        "read_timeout 60s",
        (_RETRY, ("lb_try_duration 5s", "lb_try_duration 100ms")),
        ["run", "--adapter", "caddyfile", "--config", "{home}/Caddyfile"],
    ),
    "apache": Kind(
        ["apache2", "httpd"],
        "apache.conf",
        "ServerRoot {home}\nDefaultRuntimeDir {home}\nPidFile {home}/pid\nErrorLog /dev/stderr\n"
        "Mutex posixsem\n{modules}Listen {at}\n",
        (("<VirtualHost *:443>", "<VirtualHost *:1>"),),
        (("<VirtualHost *:443>", "<VirtualHost {at}>"),),
        "timeout=60",
        (),
        ["-f", "{home}/apache.conf", "-X"],
    ),
}
_MODULES = [Path("/usr/lib/apache2/modules"), Path("/usr/lib64/httpd/modules")]
_LOADED = ["mpm_event", "authz_core", "alias", "deflate", "env", "filter", "reqtimeout", "setenvif"]
"""Those of Debian's Apache that it has without being asked, and that could matter."""


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, f"there is no {old!r} any more"
        text = text.replace(old, new)
    return text


@contextmanager
def proxy(
    name: str,
    home: Path,
    app_port: int,
    *changes: tuple[str, str],
    timeout: int = 60,
    tls: bool = False,
) -> Iterator[Server]:
    """Run a proxy as documented: its ports, paths and times replaced, and what the test changes."""
    kind, port, pem = KINDS[name], free_port(), home / "example.com.pem"
    program = system_part(*kind.programs)
    places = {"at": f"127.0.0.1:{port}", "home": str(home), "pem": str(pem), "modules": ""}
    shown = (SHOWN / kind.file).read_text("utf-8")
    if name == "apache":
        places["modules"] = _load_modules(shown)
        (home / "away.asis").write_text(
            replaced((SHOWN / "away.asis").read_text("utf-8"), _RETRY), "utf-8"
        )
    own = [(old, new.format(**places)) for old, new in (kind.tls if tls else kind.plain)]
    silence = (kind.timeout, kind.timeout.replace("60", str(timeout)))
    text = replaced(shown, *changes, *own, silence, (_ADDRESS, f"127.0.0.1:{app_port}"))
    text = _with_paths(replaced(text, *kind.away), home)
    (home / kind.file).write_text(kind.head.format(**places) + text, "utf-8")
    _make_certificate(pem)
    arguments = [argument.format(**places) for argument in kind.arguments]
    with running(
        [program, *arguments], port, {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    ) as server:
        server.url = server.url.replace("http:", "https:" if tls else "http:")
        try:
            yield server
        finally:
            # The others are one process here, and some wait for their streams when told to stop.
            if name != "nginx":
                server.process.kill()


def _load_modules(shown: str) -> str:
    folder = next((folder for folder in _MODULES if folder.is_dir()), None)
    if folder is None:
        return skip_unless_ci("needs the modules of Apache")
    [asked] = re.findall(r"^# First: a2enmod (.*)$", shown, re.MULTILINE)
    # What a2enmod adds by itself: what those need.
    names = [*_LOADED, "proxy", *asked.split()]
    return "".join(f"LoadModule {name}_module {folder}/mod_{name}.so\n" for name in names)


def _with_paths(text: str, home: Path) -> str:
    text = text.replace("\nhttp {", f"\nhttp {{ access_log off; {_NGINX_PATHS}")
    return re.sub(r"/etc/\w+/(?=example\.com\.pem|away\.asis)", f"{home}/", text)


def _make_certificate(pem: Path) -> None:
    command = [system_part("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "-", "-out", "-"]
    pem.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)


@contextmanager
def nginx(
    home: Path, app_port: int, *changes: tuple[str, str], timeout: int = 60
) -> Iterator[Server]:
    with proxy("nginx", home, app_port, *changes, timeout=timeout) as server:
        yield server


@contextmanager
def app(heartbeat: float) -> Iterator[Server]:
    config = {"EVENTSTREAM_HEARTBEAT": heartbeat}
    with serving(f"tests.apps:create_app({config})", "gevent") as server:
        wait_for(lambda: state(server), what="the worker to answer")
        yield server


class Reader:
    """What a client receives of an event stream, as it comes."""

    def __init__(self, answer: HTTPResponse) -> None:
        self.headers = answer.headers
        self._answer = answer
        self._events: deque[ServerSentEvent] = deque()
        self._parser = EventStreamParser()

    def chunk(self) -> bytes:
        return self._answer.read1()

    def event(self) -> ServerSentEvent:
        while not self._events:
            chunk = self.chunk()
            assert chunk, "the stream has ended"
            self._events.extend(self._parser.feed(chunk))
        return self._events.popleft()

    def more(self) -> bytes:
        """Return what comes next; ``b""`` if the stream has ended or is broken."""
        try:
            return self.chunk()
        except (IncompleteRead, ConnectionError):
            return b""

    def end(self) -> str:
        """Read to the end, and tell whether it was ``"complete"`` or ``"broken"``."""
        try:
            while self.chunk():
                pass
        except (IncompleteRead, ConnectionError):
            return "broken"
        return "complete"


def connection_to(server: Server, timeout: float = AT_ONCE) -> HTTPConnection:
    if server.url.startswith("https:"):
        context = ssl._create_unverified_context()
        return HTTPSConnection("127.0.0.1", server.port, timeout=timeout, context=context)
    return HTTPConnection("127.0.0.1", server.port, timeout=timeout)


@contextmanager
def reading(server: Server, path: str = "/stream", timeout: float = AT_ONCE) -> Iterator[Reader]:
    """Read a stream of a server; what does not come in time is an error (seconds)."""
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "gzip"}
    with closing(connection_to(server, timeout)) as connection:
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as answer:
            yield Reader(answer)
