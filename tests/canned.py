"""A server of HTTP that answers one request after another with bytes that the test has chosen."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .servers import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Answer = bytes | Callable[[str], bytes]

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
STREAM = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
END = b"0\r\n\r\n"
GONE = b"HTTP/1.1 204 No Content\r\n\r\n"


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


def answered(status: str, body: str = "", *fields: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*head, "", body]).encode()


class CannedServer:
    """Answers one connection after another, each with the next of some answers.

    :ivar requests: the requests so far.
    """

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(answers,), daemon=True)
        self._thread.start()

    def _run(self, answers: tuple[Answer, ...]) -> None:
        # What is left when the test is over is asked for by nobody.
        with suppress(OSError):
            for answer in answers:
                connection, _ = self._server.accept()
                with connection:
                    self._answer(connection, answer)

    def _answer(self, connection: socket.socket, answer: Answer) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += connection.recv(4096)
        self.requests.append(request.decode())
        wire = answer if isinstance(answer, bytes) else answer(self.requests[-1])
        connection.sendall(wire.removesuffix(b"..."))
        if wire.endswith(b"..."):
            # The stream goes on, without another word, until the client leaves.
            connection.settimeout(DEADLINE)
            connection.recv(1)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(DEADLINE)


@contextmanager
def canned(*answers: Answer) -> Iterator[CannedServer]:
    server = CannedServer(answers)
    try:
        yield server
    finally:
        server.close()
