"""The pages: each runs one example, and shows the source of both of its sides."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from flask import Blueprint, render_template, request

from flask_eventstream import eventstream

from . import (
    binary,
    chat_api,
    chat_room,
    game,
    inspector,
    log,
    notifications,
    progress,
    streams,
    ticker,
)
from .catalog import EXAMPLES, GROUPS
from .job import Job, run_alone

if TYPE_CHECKING:
    from collections.abc import Callable

pages = Blueprint("pages", __name__)

_MODULES = Path(__file__).parent / "static" / "js"


@pages.get("/")
def index() -> str:
    return render_template("index.html", groups=GROUPS)


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


@pages.get("/notifications")
def notify() -> str:
    functions: list[Callable[..., Any]] = [
        notifications.log_in,
        notifications.log_out,
        notifications.end_streams,
        notifications.token,
        notifications.send,
        notifications.mark_as_read,
    ]
    return _page("notifications", functions, **notifications.for_page())


@pages.get("/log")
def follow() -> str:
    functions: list[Callable[..., Any]] = [
        log.follow,
        log.burst,
        log.Tail,
        log.written_to,
        log.append,
    ]
    return _page("log", functions, burst=log.BURST)


@pages.get("/progress")
def jobs() -> str:
    functions: list[Callable[..., Any]] = [
        progress.start,
        progress.look_after,
        progress.run_elsewhere,
        progress.all_jobs,
        progress.one_job,
        progress.cancel,
        Job,
        run_alone,
    ]
    return _page("progress", functions, **progress.for_page())


@pages.get("/binary")
def frames() -> str:
    functions: list[Callable[..., Any]] = [
        binary.frames,
        binary.picture,
        binary.plasma,
        binary.palette,
    ]
    return _page("binary", functions, width=binary.WIDTH, height=binary.HEIGHT)


@pages.get("/inspector")
def inspect_stream() -> str:
    functions = [inspector.pulse, inspector.now]
    return _page("inspector", functions, streams=inspector.STREAMS)


@pages.get("/ticker")
def prices() -> str:
    functions: list[Callable[..., Any]] = [
        ticker.prices,
        ticker.heavy,
        ticker.all_prices,
        ticker.publish_trades,
        ticker.publish_trade,
        ticker.Feeder,
        ticker.is_watched,
        ticker.feed,
        ticker.has_turn,
        ticker.latest_trade,
        ticker.price,
    ]
    return _page("ticker", functions, **ticker.for_page())


@pages.get("/game")
def field() -> str:
    functions: list[Callable[..., Any]] = [
        game.events,
        game.move,
        game.leave,
        game.touches,
        game.place_of,
        game.player,
    ]
    return _page("game", functions, **game.for_page())


@pages.get("/chat-room")
def enter_room() -> str:
    functions: list[Callable[..., Any]] = [
        chat_room.events,
        chat_room.say,
        chat_room.change_name,
        chat_room.my_name,
        chat_room.channel,
        chat_room.for_page,
    ]
    room = request.args.get("room", chat_room.ROOMS[0])
    return _page("chat-room", functions, **chat_room.for_page(room))


def _page(name: str, functions: list[Callable[..., Any]], **values: Any) -> str:
    example = next(example for example in EXAMPLES if example.name == name)
    return render_template(
        f"{name}.html",
        example=example,
        groups=GROUPS,
        # From what really runs, so that the page never lies.
        server_source="\n\n".join(inspect.getsource(function) for function in functions),
        client_source=(_MODULES / f"{name}.js").read_text("utf-8"),
        parser_source=(_MODULES / "read-events.js").read_text("utf-8"),
        **values,
    )
