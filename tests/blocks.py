"""The code blocks of the documentation, as its readers see them: for the tests that run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict, deque
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, NamedTuple

from .servers import ROOT, traced

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = ROOT / "docs"
_DIRECTIVE = re.compile(
    r"^( *)\.\. (code-block|sourcecode|code|literalinclude|parsed-literal|testcode|doctest"
    r"|testoutput):: *(.*)$"
)
_APPENDED = ", at its end"


class Block(NamedTuple):
    """A code block of a page.

    ``argument`` is its language, or the path of what is included.
    """

    page: str
    line: int
    directive: str
    argument: str
    options: dict[str, str]
    text: str

    @property
    def first_line(self) -> str:
        """What tells it from the others of its page."""
        return next(iter(self.text.splitlines()), self.argument)


def pages() -> list[str]:
    """Return the names of all pages, relative to ``docs``, and the README's."""
    found = (str(path.relative_to(DOCS)) for path in DOCS.rglob("*.rst"))
    return [*sorted(page for page in found if not page.startswith("_build")), "README.md"]


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page in their order."""
    if page.endswith(".md"):
        return list(_of_markdown(page, (ROOT / page).read_text("utf-8")))
    lines = (DOCS / page).read_text("utf-8").splitlines()
    starts = ((n, _DIRECTIVE.match(line)) for n, line in enumerate(lines))
    return [
        _of_rst(page, n, start[2], start[3], _indented(lines[n + 1 :], len(start[1])))
        for n, start in starts
        if start
    ]


def block(page: str, language: str, part: str = "") -> str:
    """Return the text of the only block of a page in a language, and with ``part`` in it."""
    found = [it.text for it in blocks(page) if it.argument == language and part in it.text]
    assert len(found) == 1, f"{page} has {len(found)} blocks in {language} with {part!r}"
    return found[0]


def commands(page: str, part: str = "") -> list[str]:
    """Return what a page has its reader type in a shell, as far as ``part`` is in it."""
    shown = (it.text for it in blocks(page) if it.argument in ("console", "bash"))
    lines = (line for text in shown for line in text.splitlines())
    return [line[2:] for line in lines if line.startswith("$ ") and part in line]


def write_files(page: str, home: Path, *captions: str) -> None:
    """Write the files that the page shows, which have their names as captions.

    :param captions: those to write, in this order; all of them by default. A caption that is
        here for the second time stands for what the page shows under it for the second time.
    """
    shown = [(it.options["caption"], it.text) for it in blocks(page) if "caption" in it.options]
    versions: defaultdict[str, deque[str]] = defaultdict(deque)
    for caption, text in shown:
        versions[caption].append(text)
    for caption in captions or [caption for caption, _ in shown]:
        path = home / caption.removesuffix(_APPENDED)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if caption.endswith(_APPENDED) else "w", encoding="utf-8") as file:
            file.write(versions[caption].popleft())


def typed(page: str, part: str) -> str:
    """Return the only command of a page with ``part`` in it."""
    [command] = commands(page, part)
    return command


class Shell:
    """Somebody who types what a page says, in the folder with its files."""

    def __init__(self, home: Path, **environ: str) -> None:
        self._home = home
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environ = {**os.environ, **environ, "PATH": path}

    def type(self, command: str) -> str:
        words = shlex.split(command)
        done = subprocess.run(
            words, cwd=self._home, env=self._environ_of(words),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def typing(self, command: str) -> Iterator[subprocess.Popen[str]]:
        """Type it, and interrupt it at the end of the block."""
        words = shlex.split(command)
        process = subprocess.Popen(
            words, cwd=self._home, env=self._environ_of(words), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.terminate()

    def _environ_of(self, command: list[str]) -> dict[str, str]:
        return {**traced(command), **self._environ}


def _of_markdown(page: str, text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, "code-block", found[1] or "text", {}, found[2])


def _of_rst(page: str, line: int, directive: str, argument: str, content: list[str]) -> Block:
    options = {}
    while content and (option := re.match(r":([\w-]+): ?(.*)", content[0])):
        options[option[1]] = option[2]
        del content[0]
    text = "\n".join(content).strip("\n") + "\n" if any(content) else ""
    return Block(page, line + 1, directive, argument, options, text)


def _indented(lines: list[str], margin: int) -> list[str]:
    """Return the lines that belong to a directive, without what they are indented by."""
    own = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= margin:
            break
        own.append(line)
    return dedent("\n".join(own)).splitlines()
