from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from flask_eventstream.gunicorn_settings import Settings, SettingsError, read_settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUNICORN_CMD_ARGS", raising=False)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    return tmp_path


def test_the_command_the_environment_and_the_file_count_as_in_gunicorn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A program, which says something and which must not run in this process.
    file = "import sys\nsys.modules['patched'] = sys\nprint('{')\nworkers = 2\ntimeout = 7\n"
    (folder / "gunicorn.conf.py").write_text(f"{file}max_requests = 5\nthreads = 3\n")
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--threads 4 --timeout 8")
    found = read_settings("env A=1 /usr/bin/gunicorn -k gevent --timeout 9 'app:create_app()'")
    assert found == Settings("gevent", workers=2, threads=4, max_requests=5, timeout=9)
    assert "patched" not in sys.modules


def test_without_a_command_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(None) is None
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--threads 2")
    # Threads make gthread of sync.
    assert read_settings(None) == Settings("gthread", 3, 2, 0, 30)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("gunicorn --wrokers 4 app:app", "unrecognized arguments: --wrokers"),
        ("gunicorn -c nowhere.py app:app", "nowhere.py"),
        ("gunicorn --version", r"version \d"),
        ("gunicorn 'app", "is no command"),
    ],
)
def test_settings_that_cannot_be_read_are_an_error_that_says_why(command: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        read_settings(command)


def test_without_gunicorn_its_settings_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gunicorn", None)
    with pytest.raises(SettingsError, match="gunicorn is not installed here"):
        read_settings("gunicorn app:app")


@pytest.mark.parametrize(
    ("worker_class", "kind"),
    [
        ("gevent", (True, False, False)),
        ("gunicorn.workers.ggevent.GeventWorker", (True, False, False)),
        ("gthread", (False, True, False)),
        ("gunicorn.workers.gthread.ThreadWorker", (False, True, False)),
        ("sync", (False, False, True)),
        ("SyncWorker", (False, False, True)),
        ("tornado", (False, False, False)),
    ],
)
def test_the_kinds_of_workers_are_known_by_their_names(
    worker_class: str, kind: tuple[bool, bool, bool]
) -> None:
    found = Settings(worker_class, 1, 1, 0, 30)
    assert (found.has_greenlets, found.has_threads, found.is_sync) == kind
