"""Servers that have the site of :mod:`tests.hijack_apps`, and a strict client for them."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import h11

from .servers import Server, free_port, gunicorn, running, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

TIMEOUT = 20.0
"""Less than the time after which a client that takes nothing is cut off."""
MAX_HEAD_BYTES = 1_000_000
NO_HEADERS: Mapping[str, str] = {}

GUNICORN = {
    "gevent": ["gevent"],
    "gthread": ["gthread", "--threads=8"],
    "sync": ["sync"],
    "gevent-pywsgi": ["gevent_pywsgi"],
    "gevent-tls": ["gevent"],
    "gthread-tls": ["gthread", "--threads=8"],
    "sync-tls": ["sync"],
}
HIJACKABLE = [
    *("gevent", "gthread", "sync", "gevent-pywsgi"),
    *("werkzeug", "werkzeug-threaded", "pywsgi", "pywsgi-patched"),
]
"""The servers whose clients' sockets can be taken."""

SERVERS = [*HIJACKABLE, "gevent-tls", "gthread-tls", "waitress"]

KEEPING_ALIVE = ["gevent", "gthread", "gevent-pywsgi", "pywsgi", "pywsgi-patched"]
"""The hijackable ones that keep a connection for the next request."""

CLOSING = ["sync", "werkzeug", "werkzeug-threaded"]
"""Those that close every connection."""

READING_BODIES = ["sync", *KEEPING_ALIVE]
"""The hijackable ones that tell how much of a request's body was read."""

ONE_AT_A_TIME = ["sync", "werkzeug"]
"""Those that answer nobody else while they iterate a response."""


class Client:
    """A connection to a server, as a strict client has it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    def ask(self, target: str, *arguments: Any, **options: Any) -> None:
        """Send a request; see :meth:`request`."""
        self.send(self.request(target, *arguments, **options))

    def send(self, wire: bytes) -> None:
        self._socket.sendall(wire)

    def request(
        self,
        target: str,
        method: str = "GET",
        body: bytes = b"",
        version: str = "1.1",
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> bytes:
        """Return the bytes of a request, whose answer is read next."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        fields = {"Host": "test", **headers}
        if body and "Transfer-Encoding" not in headers:
            fields["Content-Length"] = str(len(body))
        head = h11.Request(method=method, target=target, headers=list(fields.items()))
        events = [head, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        wire = b"".join([self._http.send(event) or b"" for event in events])
        return wire.replace(b" HTTP/1.1\r\n", f" HTTP/{version}\r\n".encode(), 1)

    def head(self) -> h11.Response:
        event = self._event()
        assert isinstance(event, h11.Response), event
        return event

    def piece(self) -> bytes:
        """Return the next bytes of the body; none at its end."""
        event = self._event()
        if isinstance(event, h11.EndOfMessage):
            return b""
        assert isinstance(event, h11.Data), event
        return bytes(event.data)

    def until(self, end: bytes) -> bytes:
        body = b""
        while not body.endswith(end):
            piece = self.piece()
            assert piece, body
            body += piece
        return body

    def body(self) -> bytes:
        return b"".join(iter(self.piece, b""))

    def answer(self) -> tuple[int, bytes]:
        return self.head().status_code, self.body()

    def rest(self) -> bytes:
        """Return what the server sends behind the answer before it closes the connection."""
        rest, is_closed = self._http.trailing_data
        while not is_closed and (part := self._socket.recv(65536)):
            rest += part
        return rest

    def leave(self) -> None:
        self._socket.close()

    def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(self._socket.recv(65536))
        return event


class Site:
    """A server with the site, and how it is reached."""

    def __init__(self, server: Server, tls: ssl.SSLContext | None, path: Path) -> None:
        self.server = server
        self._tls = tls
        self._path = path

    @contextmanager
    def client(self, is_local: bool = False) -> Iterator[Client]:
        """Connect, over a Unix socket if ``is_local``."""
        family = socket.AF_UNIX if is_local else socket.AF_INET
        address: Any = str(self._path) if is_local else ("127.0.0.1", self.server.port)
        with closing(socket.socket(family)) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(address)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection)
            with closing(connection):
                yield Client(connection)

    def get(self, target: str) -> Any:
        return self._json_of(target, "GET", b"")

    def post(self, target: str, value: Any = None) -> Any:
        return self._json_of(target, "POST", json.dumps(value).encode())

    def _json_of(self, target: str, method: str, body: bytes) -> Any:
        with self.client() as client:
            headers = {"Connection": "close", "Content-Type": "application/json"}
            client.ask(target, method, body, headers=headers)
            status, answer = client.answer()
        assert status == 200, (status, answer)
        return json.loads(answer)

    def publish(self, data: Any, prefix: str = "") -> str:
        id: str = self.post(f"{prefix}/publish", {"data": data})["id"]
        return id

    def counts(self, prefix: str = "") -> dict[str, int]:
        counts: dict[str, int] = self.get(f"{prefix}/counts")
        return counts

    def has_no_sockets(self) -> bool:
        return not any(self.counts(app)["sockets"] for app in ("", "/beating"))


class Sites:
    """Starts each server once, when it is first asked for."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self._home = home
        self._stack = stack
        self._sites: dict[str, Site] = {}

    def __call__(self, name: str) -> Site:
        """Return the server; nobody of an earlier test is left on its hubs."""
        if name not in self._sites:
            self._sites[name] = self._started(name)
        wait_for(self._sites[name].has_no_sockets, what="those of an earlier test to be gone")
        return self._sites[name]

    def stop(self) -> None:
        # All at once: each takes its time.
        for site in self._sites.values():
            site.server.process.terminate()

    def failures(self) -> list[str]:
        """Return the logs that tell of an error. With TLS, the probe for the port is one."""
        logs = [site.server.log() for name, site in self._sites.items() if "tls" not in name]
        return [log for log in logs if "Traceback" in log]

    def _started(self, name: str) -> Site:
        port, path = free_port(), self._home / f"{name}.sock"
        command = [sys.executable, "-m", "tests.hijack_servers", name, str(port)]
        tls = None
        if name in GUNICORN:
            options = ["--config=python:tests.hijack_gunicorn", f"--bind=unix:{path}"]
            if name.endswith("-tls"):
                key, certificate = self._certificate()
                options += [f"--keyfile={key}", f"--certfile={certificate}"]
                tls = trusting_context()
            worker_class, *own = GUNICORN[name]
            app = "tests.hijack_apps:create_site()"
            command = gunicorn(app, worker_class, *options, *own, port=port)
        return Site(self._stack.enter_context(running(command, port)), tls, path)

    def _certificate(self) -> tuple[Path, Path]:
        key, certificate = self._home / "key.pem", self._home / "certificate.pem"
        if not key.exists():
            command = [system_part("openssl"), "req", "-x509", "-nodes", "-subj", "/CN=localhost"]
            command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
            command += ["-keyout", str(key), "-out", str(certificate)]
            subprocess.run(command, check=True, capture_output=True)
        return key, certificate


def trusting_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def numbered(wire: bytes) -> bytes:
    """Return events with ids that count from 1 in place of those that a broker has minted."""
    numbers: dict[bytes, int] = {}
    return re.sub(
        rb"(?m)^id: (\w+-\d+)$",
        lambda found: b"id: %d" % numbers.setdefault(found[1], len(numbers) + 1),
        wire,
    )
