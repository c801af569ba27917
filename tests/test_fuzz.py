from __future__ import annotations

import importlib
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.memory_broker import MemoryBroker
from flask_eventstream.tokens import Token, verified
from fuzz import cursor, encoder, inputs, parser, token, world
from fuzz.__main__ import TARGETS, main
from fuzz.shrinking import smallest

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.mark.parametrize("target", TARGETS)
def test_some_cases_of_each_target_find_nothing(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([target, "--cases", "500", "--seed", "7"]) == 0
    told = capsys.readouterr().out
    assert "seed 7" in told
    assert f"fuzz {target}: 500 cases, " in told


def test_it_ends_after_the_seconds_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    # There is no other end.
    assert main(["parser", "--seconds", "0.01", "--seed", "7"]) == 0
    assert "no failure" in capsys.readouterr().out


class ForgetfulParser(EventStreamParser):
    """Takes no notice of a NUL in a type."""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        return super().feed(chunk.replace(b"\0", b""))


class CarelessEvent(ServerSentEvent):
    """Leaves what ``str.splitlines()`` takes for a line end to clients."""

    def encode(self, max_bytes: int | None = None) -> bytes:
        return super().encode(max_bytes).replace("\u2028".encode(), b"\n")


class GenerousBroker(MemoryBroker):
    """Sends who returns its last event once more."""

    def _begin(self, *arguments: Any) -> tuple[bytes, int, bool]:
        start, position, resumed = super()._begin(*arguments)
        return start, position - resumed, resumed


class SilentBroker(MemoryBroker):
    """Resumes who may have missed something, and does not tell it."""

    def _begin(self, *arguments: Any) -> tuple[bytes, int, bool]:
        start, position, resumed = super()._begin(*arguments)
        return b"", position, resumed or b"event: reset" in start


def believe(text: str, keys: Sequence[str]) -> Token:
    """Verify a token, and take another app's for one of one's own."""
    return verified(text, [*keys, "other"])


def tidy(text: str, keys: Sequence[str]) -> Token:
    """Verify a token in which somebody has left a line break."""
    return verified(text.replace("\n", ""), keys)


PLANTED = [
    ("parser", parser, "EventStreamParser", ForgetfulParser, "\\x00"),
    ("encoder", encoder, "ServerSentEvent", CarelessEvent, "\\u2028"),
    ("cursor", world, "MemoryBroker", GenerousBroker, "('publish', "),
    ("cursor", world, "MemoryBroker", SilentBroker, "('return', "),
    ("token", token, "verified", believe, "'other'"),
    ("token", token, "verified", tidy, "\\n"),
]


@pytest.mark.parametrize(("target", "module", "name", "broken", "evidence"), PLANTED)
def test_a_planted_bug_is_found_and_its_input_named(
    target: str,
    module: Any,
    name: str,
    broken: Any,
    evidence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, broken)
    assert main([target, "--cases", "20000", "--seed", "7"]) == 1
    told = capsys.readouterr().out
    shown = told.partition(f"fuzz.{target}.check(")[2].partition("\n")[0]
    assert evidence in shown
    # What is printed is the case itself, as Python reads it.
    case, check = eval(shown.removesuffix(")")), importlib.import_module(f"fuzz.{target}").check
    with pytest.raises(AssertionError):
        check(case)
    monkeypatch.undo()
    check(case)


def test_a_seed_gives_the_same_cases() -> None:
    def cases(seed: int) -> list[Any]:
        chance = random.Random(seed)
        return [
            each.generate(chance) for each in (parser, encoder, cursor, token) for _ in range(50)
        ]

    assert cases(1) == cases(1) != cases(2)


def test_every_case_is_a_literal() -> None:
    chance = random.Random(7)
    for target in (parser, encoder, cursor, token):
        for _ in range(200):
            case = target.generate(chance)
            assert eval(repr(case)) == case


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["parsers"])
    assert "there is no target parsers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "fails", "expected"),
    [
        (b"abc\0def", lambda case: b"\0" in case, b"\0"),
        ("a\nb\u2028", lambda case: len(case) > 1, "xb"),
        ([3, 50, 7], lambda case: sum(case) >= 50, [50]),
        ((5, [True, "ab"]), lambda case: case[1], (0, [False])),
        ((1.5, None), lambda case: True, (1.5, None)),
    ],
)
def test_a_case_that_fails_is_made_small(case: Any, fails: Any, expected: Any) -> None:
    found = smallest(case, fails, 5)
    assert fails(found)
    assert len(repr(found)) <= len(repr(expected))


def test_making_it_small_takes_no_longer_than_allowed() -> None:
    assert smallest("ab", lambda case: True, -1) == "ab"


def test_random_texts_and_streams_are_of_every_kind() -> None:
    chance = random.Random(7)
    streams = b"".join(map(partial(lambda chance, _: inputs.stream(chance), chance), range(3000)))
    assert all(piece in streams for piece in inputs.PIECES)
    assert "\ud800" in "".join(inputs.text(chance) for _ in range(500))
    "".join(inputs.text(chance, sendable=True) for _ in range(500)).encode()
