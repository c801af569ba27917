"""What users install: the wheel, on each supported Python that this machine has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import dedent
from urllib.request import Request, urlopen

import pytest

from flask_eventstream import EventStreamParser

from .servers import DEADLINE, ROOT, free_port, running

pytestmark = pytest.mark.beside
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
NO_SOURCES = (".*", "node_modules", "_build", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not done.returncode, f"{command}: {done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source package, and the wheel from that, beside and not in the sources."""
    home = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, home / "sources", ignore=shutil.ignore_patterns(*NO_SOURCES))
    run(sys.executable, "-m", "build", "--outdir", home / "dist", home / "sources", cwd=home)
    return home / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


def test_the_package_index_would_take_both(dist: Path) -> None:
    packages = sorted(dist.iterdir())
    assert [package.suffix for package in packages] == [".whl", ".gz"]
    told = run(sys.executable, "-m", "twine", "check", "--strict", *packages, cwd=dist)
    assert told.count("PASSED") == 2


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "flask_eventstream").rglob("*") if path.is_file())
    sources = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert names == sources


def python_of(version: str) -> str:
    """Return the path of a Python of some version; without it, skip the test."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    installed = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    for path in (shutil.which(f"python{version}"), *map(str, installed)):
        # pyenv puts a name on the path also of versions that are not chosen.
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return path
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_quickstart_runs_from_the_wheel(version: str, wheel: Path, tmp_path: Path) -> None:
    run(python_of(version), "-m", "venv", tmp_path / "fresh", cwd=tmp_path)
    programs = tmp_path / "fresh" / "bin"
    run(programs / "pip", "install", "--quiet", wheel, cwd=tmp_path)
    quickstart = (ROOT / "docs" / "quickstart.rst").read_text("utf-8")
    program = re.findall(r"as ``app.py``:\n\n.. testcode::\n\n((?:   .*\n|\n)+)", quickstart)[0]
    app, port = tmp_path / "app.py", free_port()
    app.write_text(dedent(program), "utf-8")
    # Not as a module, which would find the sources in the working directory.
    command = [str(programs / "flask"), "--app", str(app), "run", "--port", str(port)]
    with running(command, port) as server, urlopen(f"{server.url}/stream", timeout=DEADLINE) as one:
        with urlopen(Request(f"{server.url}/greet", method="POST"), timeout=DEADLINE) as answer:
            id = json.load(answer)["id"]
        [event] = EventStreamParser().feed(b"".join(iter(one.readline, b"\n")) + b"\n")
    assert (event.type, event.data, event.id) == ("greeting", '{"text": "Hello!"}', id)
