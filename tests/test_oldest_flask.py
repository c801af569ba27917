"""The oldest Flask that is allowed keeps contexts in another way than the newest."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from .servers import ROOT, skip_unless_ci, traced

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.beside

OLDEST = ("flask==3.0.0", "werkzeug==3.0.0")
TESTS = ("contexts", "generator_stream", "response", "common_apps")


def test_streams_have_their_contexts_on_the_oldest_flask_too(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    if subprocess.run([*pip, str(tmp_path), *OLDEST]).returncode:
        skip_unless_ci("needs the oldest Flask from a package index")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getenv('PYTHONPATH', '')}"}
    program = "from importlib.metadata import version; print(version('flask'))"
    found = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "3.0.0"
    files = [f"tests/test_{name}.py" for name in TESTS]
    # One worker class is enough here.
    some = ["-k", "gthread or not test_common_apps"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some, *files]
    environ.update(traced(command))
    told = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-5000:]
