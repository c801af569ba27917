"""The pages: each runs one example, and shows the source of both of its sides."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from flask import Blueprint, render_template, request

from flask_eventstream import eventstream

from . import chat_api, streams

if TYPE_CHECKING:
    from collections.abc import Callable

pages = Blueprint("pages", __name__)

_MODULES = Path(__file__).parent / "static" / "js"


@dataclass(frozen=True)
class Example:
    """What the index and every page's navigation say of one page."""

    name: str
    title: str
    summary: str


EXAMPLES = (
    Example(
        "typewriter",
        "Typewriter",
        "An answer appears token by token. Stop closes the server's generator at once.",
    ),
    Example(
        "clock",
        "Clock",
        "A custom event each second, with an id and a reconnection time. Connect and disconnect.",
    ),
    Example(
        "interval",
        "Interval and heartbeat",
        "Two generators, each with a pace of its own, merged into one stream.",
    ),
    Example(
        "broadcast",
        "Broadcast",
        "A message reaches every open tab. A tab that was offline gets what it missed.",
    ),
    Example(
        "numbers",
        "Numbers",
        "A plain generator of numbers, read with fetch while it counts.",
    ),
    Example(
        "resume",
        "Resume",
        "An answer outlives its connection. Kill it, reload, open a second tab: nothing is lost, "
        "and nothing comes twice.",
    ),
    Example(
        "chat-api",
        "Chat API",
        "A local model behind the wire of OpenAI. Its official clients, curl and this page read "
        "the same stream.",
    ),
)


@pages.get("/")
def index() -> str:
    return render_template("index.html", examples=EXAMPLES)


@pages.get("/typewriter")
def typewriter() -> str:
    functions = [streams.typewriter, streams.typewriter_report]
    return _page("typewriter", functions, conversation=uuid4())


@pages.get("/clock")
def clock() -> str:
    return _page("clock", [streams.clock])


@pages.get("/interval")
def ticks() -> str:
    return _page("interval", [streams.ticks])


@pages.get("/broadcast")
def broadcast() -> str:
    """Let the page connect from now on, however long it takes to load."""
    functions: list[Callable[..., Any]] = [
        streams.send_message,
        streams.message_stream,
        streams.now,
        broadcast,
    ]
    cursor = eventstream.last_event_id()
    return _page("broadcast", functions, cursor=cursor, tab=uuid4())


@pages.get("/numbers")
def numbers() -> str:
    return _page("numbers", [streams.numbers])


@pages.get("/resume")
def resume() -> str:
    """Find a conversation by its address, or begin one."""
    conversation = request.args.get("conversation", type=UUID) or uuid4()
    functions: list[Callable[..., Any]] = [streams.resume, streams.name_process]
    return _page("resume", functions, conversation=conversation)


@pages.get("/chat-api")
def chat() -> str:
    functions: list[Callable[..., Any]] = [
        chat_api.complete,
        chat_api.in_one_piece,
        chat_api.chunks,
        chat_api.produce,
        chat_api.report,
    ]
    return _page("chat-api", functions, models=chat_api.MODELS)


def _page(name: str, functions: list[Callable[..., Any]], **values: Any) -> str:
    example = next(example for example in EXAMPLES if example.name == name)
    return render_template(
        f"{name}.html",
        example=example,
        examples=EXAMPLES,
        # From what really runs, so that the page never lies.
        server_source="\n\n".join(inspect.getsource(function) for function in functions),
        client_source=(_MODULES / f"{name}.js").read_text("utf-8"),
        parser_source=(_MODULES / "read-events.js").read_text("utf-8"),
        **values,
    )
