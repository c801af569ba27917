"""The settings of gunicorn, as gunicorn itself reads them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import EventStreamError

_READ = "from flask_eventstream.gunicorn_settings import print_settings; print_settings()"
_ENVIRON = ("GUNICORN_CMD_ARGS", "WEB_CONCURRENCY")
_FILE = "gunicorn.conf.py"


class SettingsError(EventStreamError):
    """The settings of gunicorn cannot be read."""


@dataclass(frozen=True)
class Settings:
    """What of gunicorn's settings matters to streams.

    :param worker_class: its name, or where it is imported from.
    :param workers: how many worker processes there are.
    :param threads: how many threads each has.
    :param max_requests: after how many requests a worker is replaced; 0 for never.
    :param timeout: after how many seconds of silence a worker is killed; 0 for never.
    """

    worker_class: str
    workers: int
    threads: int
    max_requests: int
    timeout: int

    @property
    def has_greenlets(self) -> bool:
        """Whether the workers are gevent's."""
        return "gevent" in self.worker_class

    @property
    def is_sync(self) -> bool:
        """Whether a worker serves one request at a time."""
        return self.worker_class == "sync" or self.worker_class.endswith("SyncWorker")

    @property
    def has_threads(self) -> bool:
        """Whether a worker has a thread for each request."""
        return self.worker_class == "gthread" or self.worker_class.endswith("ThreadWorker")


def read_settings(command: str | None) -> Settings | None:
    """Return the settings that gunicorn would run with in this directory and environment.

    :param command: the command that starts it; else they are of ``GUNICORN_CMD_ARGS``,
        ``WEB_CONCURRENCY`` and ``gunicorn.conf.py``.
    :returns: ``None`` if there is none of these.
    :raises SettingsError: if they cannot be read.
    """
    if command is None and not Path(_FILE).exists() and not any(map(os.environ.get, _ENVIRON)):
        return None
    if importlib.util.find_spec("gunicorn") is None:
        raise SettingsError("gunicorn is not installed here")
    # In a process of its own: the file is a program, which may patch this one or end it.
    told = subprocess.run(
        [sys.executable, "-c", _READ, *_options(command or "")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    try:
        return Settings(**json.loads(told.stdout.rpartition("\n")[2]))
    except ValueError as error:
        last = (told.stderr or told.stdout).strip().rpartition("\n")[2]
        raise SettingsError(last.removeprefix("-c: ") or "gunicorn says nothing") from error


def print_settings() -> None:
    """Print the settings of the process's own arguments as JSON, in the last line."""
    base = importlib.import_module("gunicorn.app.base")
    # Only its settings are read: it has no app, and is not run.
    kind = type("Reader", (base.Application,), {"init": lambda *_: None})
    found = kind().cfg
    settings = {field.name: found.settings[field.name].get() for field in fields(Settings)}
    # A class may be given as such; and sync with threads is gthread.
    settings["worker_class"] = found.worker_class_str
    print("", json.dumps(settings), sep="\n", end="")


def _options(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SettingsError(f"{command!r} is no command: {error}") from error
    programs = [n for n, word in enumerate(words) if Path(word).name == "gunicorn"]
    return words[programs[0] + 1 :] if programs else words
