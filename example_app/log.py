"""A log file that grows, and a view that follows it as ``tail -F`` does."""

from __future__ import annotations

import fcntl
import os
import random
import re
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from flask import current_app, request

from flask_eventstream import EventStream, ServerSentEvent, interval

if TYPE_CHECKING:
    from collections.abc import Iterator

log = EventStream("log", __name__, url_prefix="/log")

MAX_BYTES = 512 * 1024
"""A file that is larger than this, in bytes, is replaced by a new one."""

BURST = 1000
"""How many lines a burst has."""

_WHAT = ("GET / 200", "GET /cart 200", "POST /order 201", "GET /image 304", "GET /admin 403")
_LEVELS = ("INFO", "INFO", "INFO", "DEBUG", "WARNING")


@log.stream("/lines", methods=["GET"])
def follow() -> Iterator[ServerSentEvent]:
    """Send each line with an id that tells where the next one begins."""
    path = Path(current_app.config["LOG_FILE"])
    pause = current_app.config["LOG_SECONDS"]
    with written_to(path, pause), closing(Tail(path)) as tail:
        cursor = request.headers.get("Last-Event-ID")
        if not tail.starts_at(cursor):
            # Like a channel whose history ends: never a hole without a word.
            yield ServerSentEvent({"requested": cursor}, "reset")
        for _ in interval(pause / 4):
            for id, line in tail.new_lines():
                yield ServerSentEvent(line, id=id)


@log.post("/burst")
def burst() -> dict[str, int]:
    """Write more at once than a slow reader can take."""
    append(Path(current_app.config["LOG_FILE"]), BURST)
    return {"lines": BURST}


class Tail:
    """Where one reader is in the file, and in the one that replaces it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("rb")
        # The number of its first line tells it from all the others.
        self._name = self._file.readline().split(b" ")[0].decode()
        self._file.seek(0)

    def starts_at(self, cursor: str | None) -> bool:
        """Go to a cursor; tell whether that was possible."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if cursor is None:
            if end > 1000:
                self._file.seek(end - 1000)
                self._file.readline()  # which is half a line
            return True
        name, _, offset = cursor.partition("-")
        if name != self._name or not offset.isdecimal() or int(offset) > end:
            return False
        self._file.seek(int(offset))
        return True

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """Yield what was written since, and where it ends."""
        # Asked before the rest is read: what is written later is in the new file.
        is_replaced = self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        offset = self._file.tell()
        for line in self._file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                # The rest of it is still being written.
                self._file.seek(offset)
                break
            offset += len(line)
            yield f"{self._name}-{offset}", line.decode().rstrip("\n")
        if is_replaced:
            self.close()
            self._open()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@contextmanager
def written_to(path: Path, pause: float) -> Iterator[None]:
    """Have a thread or greenlet write, as long as the block runs."""
    append(path, 1)
    over = Event()

    def write() -> None:
        while not over.wait(pause):
            append(path, 1)

    Thread(target=write, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def append(path: Path, lines: int) -> None:
    """Add lines, which are numbered without a gap, whichever process writes."""
    with locked(path):
        numbers = count(last_number(path) + 1)
        text = "".join(new_line(next(numbers)) for _ in range(lines))
        if path.exists() and path.stat().st_size < MAX_BYTES:
            with path.open("a") as file:
                file.write(text)
        else:
            # In place with its first line, by which readers know it.
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def last_number(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200))
        return int(re.findall(rb"(?:^|\n)(\d+) ", file.read())[-1])


def new_line(number: int) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    level, what = random.choice(_LEVELS), random.choice(_WHAT)
    took = random.randrange(2, 90)
    return f"{number} {now} [{os.getpid()}] {level} {what} in {took} ms\n"
