"""Makes a case that fails smaller, as long as it goes on failing. A case is made of literals."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def smallest(case: Any, fails: Callable[[Any], bool], seconds: float) -> Any:
    """Return the smallest case that fails which can be found in some seconds."""
    deadline = time.monotonic() + seconds
    found: Any = case
    while found is not None:
        case = found
        found = next((one for one in _until(deadline, smaller(case)) if fails(one)), None)
    return case


def _until(deadline: float, cases: Iterator[Any]) -> Iterator[Any]:
    for case in cases:
        if time.monotonic() > deadline:
            return
        yield case


def smaller(case: Any) -> Iterator[Any]:
    """Yield cases that are a step simpler, large steps first. A tuple keeps its length."""
    if isinstance(case, bool):
        yield from [False] * case
    elif isinstance(case, int):
        yield from dict.fromkeys(n for n in (0, case // 2, case - 1) if abs(n) < abs(case))
    elif isinstance(case, (str, bytes, list)):
        yield from _shorter(case)
    if isinstance(case, (str, bytes)):
        yield from _plainer(case)
    if isinstance(case, (list, tuple)):
        for place, item in enumerate(case):
            for simpler in smaller(item):
                yield type(case)([*case[:place], simpler, *case[place + 1 :]])


def _shorter(case: Any) -> Iterator[Any]:
    size = len(case)
    while size:
        for start in range(0, len(case), size):
            yield case[:start] + case[start + size :]
        size //= 2


def _plainer(case: Any) -> Iterator[Any]:
    plain: Any = "x" if isinstance(case, str) else b"x"
    for place in range(len(case)):
        if not case[place : place + 1].isalnum():
            yield case[:place] + plain + case[place + 1 :]
