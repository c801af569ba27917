"""A language model that needs no network: it answers each prompt with tokens, always the same."""

from __future__ import annotations

import random
import re
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST_TOKENS = 80
"""An answer ends with the first sentence that reaches this many; no sentence has over 30."""

TOKENS_BEFORE_FAILURE = 20
"""So many of them come from :func:`broken_answer`."""

_OPENINGS = (
    "Good question! 🤔 Let me think about it, step by step.",
    "Happy to help. ✨ In short: it depends, and here is on what.",
    "That is a lovely thing to ask. 🌱 The long answer follows.",
)
_SENTENCES = (
    "A stream is a river of small things, and each of them arrives when it is ready. 🌊",
    "Tokens leave the server one by one, so the first word is here long before the last.",
    "流式传输让文字一个接一个地出现。",
    "你好，世界！这是一条事件流。🐉",
    "The browser keeps a single connection open and simply listens. 👂",
    "慢慢来，比较快。🍵",
    "When you press Stop, the generator is closed, and nobody computes for an empty room. 🛑",
    "数据就像茶叶：先有水，后有香。",
    "No polling, no sockets to juggle: plain HTTP, which every proxy understands. 👩‍💻",
    "If the connection breaks, the client comes back and says what it has seen. 🔁",
    "每个字都按顺序到达，一个也不会丢。✅",
    "Patience is a virtue 🧘, but nobody likes to look at a spinner.",
    "Line ends are data, too:\n— like this one.",
)

# A word with the space before it, one or two Chinese characters, or anything else at once, so
# that an emoji of several code points stays whole.
_TOKEN = re.compile(r"[ \n]*(?:[A-Za-z]+|[\u4e00-\u9fff]{1,2}|[^ \nA-Za-z\u4e00-\u9fff]+)")


def answer(prompt: str) -> Iterator[str]:
    """Yield the tokens of the answer to a prompt, 80 to 120 of them.

    The prompt is the seed, so that tests can compare a page with what it should show.
    """
    chance = random.Random(prompt.encode())
    sentences = chance.sample(_SENTENCES, len(_SENTENCES))
    text = chance.choice(_OPENINGS)
    while len(tokens(text)) < LEAST_TOKENS:
        text += " " + sentences.pop()
    yield from tokens(text)


def broken_answer(prompt: str) -> Iterator[str]:
    """Yield the first tokens of the answer to a prompt, and fail."""
    yield from islice(answer(prompt), TOKENS_BEFORE_FAILURE)
    raise RuntimeError("This model is broken, to show what its clients get then.")


def tokens(text: str) -> list[str]:
    """Return the tokens of a text, as the model sees them."""
    return _TOKEN.findall(text)
