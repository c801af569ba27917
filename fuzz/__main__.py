"""Runs fuzz targets: ``python -m fuzz [TARGET...] [--seconds 60] [--cases N] [--seed N]``.

A seed gives each target the same cases in the same order. A case that fails is made as small as
possible, and printed as a literal.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import secrets
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .shrinking import smallest

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGETS = ("parser", "encoder", "cursor", "token")
SHRINK_SECONDS = 20.0
CASES_AT_ONCE = 20


class Failure(NamedTuple):
    """A case that breaks the invariant of a target, as small as it could be made."""

    case: Any
    error: Exception
    original: Any


def error_of(target: Any, case: Any) -> Exception | None:
    """Return what the check of a case raises, if anything."""
    try:
        target.check(case)
    except Exception as error:  # noqa: BLE001  # any at all is a failure
        return error
    return None


def fuzz(
    target: Any, seconds: float, chance: random.Random, most: float = math.inf
) -> tuple[int, Failure | None]:
    """Check cases for some seconds, and so many at most; return how many, and the first failure."""
    cases, deadline = 0, time.monotonic() + seconds
    while cases < most and time.monotonic() < deadline:
        for _ in range(CASES_AT_ONCE):
            case = target.generate(chance)
            cases += 1
            if (error := error_of(target, case)) is not None:
                return cases, shrunk(target, case, error)
    return cases, None


def shrunk(target: Any, case: Any, error: Exception) -> Failure:
    """Return a failure of the same kind with as small a case as can be found."""

    def fails(smaller: Any) -> bool:
        other = error_of(target, smaller)
        return other is not None and _kind(other) == _kind(error)

    small = smallest(case, fails, SHRINK_SECONDS)
    return Failure(small, error_of(target, small) or error, case)


def _kind(error: Exception) -> tuple[type, int]:
    """Return what an error is, and the line of a target that met it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [one.lineno for one in frames if Path(one.filename).parent == Path(__file__).parent]
    return type(error), lines[-1] or 0


def run(name: str, seconds: float, seed: int, most: float) -> bool:
    """Fuzz a target, tell what was found, and return whether all is well."""
    target = importlib.import_module(f"{__package__}.{name}")
    # Of its own, so that a target finds the same alone and among others.
    chance = random.Random(f"{seed} {name}")
    begin = time.monotonic()
    cases, failure = fuzz(target, seconds, chance, most)
    per_second = cases / max(time.monotonic() - begin, 1e-9)
    if failure is None:
        print(f"fuzz {name}: {cases:,} cases, {per_second:,.0f} a second, no failure", flush=True)
        return True
    shown = "".join(traceback.format_exception(failure.error))
    print(
        f"fuzz {name}: case {cases:,} of the seed {seed} fails:\n\n{shown}\n"
        f"The smallest case that fails so, for which this is to be called:\n\n"
        f"    fuzz.{name}.check({failure.case!r})\n\n"
        f"It was found as:\n\n    {failure.original!r}\n",
        flush=True,
    )
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, help="in all; 60 by default, or without end")
    parser.add_argument("--cases", type=int, help="of each target, and no more; any by default")
    parser.add_argument("--seed", type=int, help="random by default")
    options = parser.parse_args(arguments)
    targets = options.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    seed = secrets.randbelow(10**9) if options.seed is None else options.seed
    print(f"fuzz: seed {seed}", flush=True)
    # With a number of cases, and a seed, it is the same on every machine.
    seconds = options.seconds or (math.inf if options.cases else 60)
    most = options.cases or math.inf
    # All of them, also after one that has failed.
    found = [run(name, seconds / len(targets), seed, most) for name in targets]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
