"""The walls between the rooms, and how large a function may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flask_eventstream

PACKAGE = Path(flask_eventstream.__file__).parent
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py"))
TREES = {room: ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8")) for room in ROOMS}
WITH_FLASK = {
    "access",
    "blueprint",
    "cli",
    "contexts",
    "flask_sse",
    "generator_stream",
    "opening",
    "refusals",
    "response",
    "resumable",
    "rights",
    "signals",
    "state",
    "testing",
}
WITH_SOCKETS = {"descriptors", "hijack"}
SOCKETS = {"socket", "select", "selectors", "ssl", "asyncio"}


def imports(room: str) -> set[str]:
    """Return the modules that a room imports, lazily and for typing too; its own with a dot."""
    found = set()
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f".{name}" for name in names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_only_some_rooms_know_flask(room: str) -> None:
    assert not {"flask", "werkzeug"} & imports(room) or room in WITH_FLASK


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_optional_stays_in_its_room_and_gevent_is_used_only_where_it_runs(
    room: str,
) -> None:
    assert "redis" not in imports(room) or room == "redis_link"
    assert "prometheus_client" not in imports(room) or room == "metrics"
    assert "gevent" not in imports(room)


@pytest.mark.parametrize("room", ROOMS)
def test_only_some_rooms_touch_sockets(room: str) -> None:
    assert not SOCKETS & imports(room) or room in WITH_SOCKETS


def test_no_rooms_import_each_other_in_a_circle() -> None:
    left = {room: {name[1:] for name in imports(room) if name[0] == "."} for room in ROOMS}
    while left:
        free = {room for room, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {room: needed for room, needed in left.items() if room not in free}


@pytest.mark.parametrize("room", ROOMS)
def test_functions_stay_small(room: str) -> None:
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert lines - docstring <= 40, node.name


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__init__"])
def test_every_room_has_its_tests(room: str) -> None:
    assert (Path(__file__).parent / f"test_{room}.py").exists()


def test_the_public_names_are_few_and_documented() -> None:
    assert len(flask_eventstream.__all__) <= 12
    for name in flask_eventstream.__all__:
        assert getattr(flask_eventstream, name).__doc__


def test_the_errors_have_one_parent() -> None:
    from flask_eventstream import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(one, flask_eventstream.EventStreamError) for one in classes)
