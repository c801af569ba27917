"""A chat room, and who is in it."""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING, Any

from flask import Blueprint, abort, session

from flask_eventstream import eventstream

from .streams import field

if TYPE_CHECKING:
    from flask_eventstream import EventStreamResponse

chat_room = Blueprint("chat_room", __name__, url_prefix="/chat-room")

ROOMS = ("lobby", "garden", "kitchen")
"""Those that the page names; there are as many others as people think of."""

HISTORY = 50
"""How many events a newcomer gets of those that were before him."""


@chat_room.get("/<room>/events")
def events(room: str) -> EventStreamResponse:
    """Let somebody in: others hear that he joins, and after a while that he leaves."""
    return eventstream.subscribe(channel(room), history=HISTORY, presence=True, member=my_name())


@chat_room.post("/<room>/say")
def say(room: str) -> dict[str, str]:
    said = {"member": my_name(), "text": field("text"), "at": time.time()}
    return {"id": eventstream.publish(said, channel=channel(room))}


@chat_room.post("/name")
def change_name() -> dict[str, str]:
    """Take a name from the page into the session; the page then comes in once more."""
    name = " ".join(field("name").split())
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{1,30}", name):
        abort(400, "A name has 1 to 30 characters.")
    session["chat_name"] = name
    return {"name": name}


def my_name() -> str:
    """Return the name in the session: what a request says of itself is no proof."""
    if "chat_name" not in session:
        abort(401, "Open the page of the room first. It needs a cookie.")
    return str(session["chat_name"])


def channel(room: str) -> str:
    """Return the channel of a room, of which there need be no list."""
    if not re.fullmatch(r"[\w-]{1,30}", room):
        abort(404, "A room's name has 1 to 30 letters, digits, hyphens or underscores.")
    return f"chat:{room}"


def for_page(room: str) -> dict[str, Any]:
    """Name who comes for the first time, and tell how many are where."""
    channel(room)
    session.setdefault("chat_name", f"Guest {random.randrange(1000, 10_000)}")
    rooms = {name: len(eventstream.present(channel(name))) for name in ROOMS}
    return {"room": room, "rooms": rooms, "me": session["chat_name"], "history": HISTORY}
