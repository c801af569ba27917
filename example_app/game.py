"""A game for all who have the page open: many cursors, and a dot that one of them gets.

The server remembers nothing. Where a dot is follows from the time, who is where is in the newest
event of each player, and who has how many points in the channel's history.
"""

from __future__ import annotations

import time
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flask import Blueprint, abort, current_app, request

from flask_eventstream import eventstream

from .streams import field

if TYPE_CHECKING:
    from flask_eventstream import EventStreamResponse

game = Blueprint("game", __name__, url_prefix="/game")

WIDTH = 1.5
"""How wide the field is; it is 1 high."""

NEAR = 0.08
"""How near a cursor has to come to a dot."""

POINT_SECONDS = 240
"""For how long a point counts; the history goes back for 300 seconds."""

ADJECTIVES = ("Brave", "Calm", "Dizzy", "Eager", "Fuzzy", "Happy", "Jolly", "Lucky", "Quick", "Shy")
ANIMALS = ("Badger", "Crab", "Dingo", "Egret", "Ferret", "Gecko", "Heron", "Koala", "Otter", "Yak")


@game.get("/events")
def events() -> EventStreamResponse:
    """Begin with the newest position of each player, and the dots that were caught."""
    return eventstream.subscribe("game", history=256)


@game.post("/move")
def move() -> dict[str, float]:
    """Publish where a player is, and whether he has caught the dot.

    It takes the place of where he was: who reads slowly sees fewer steps, and no old ones.
    """
    who, now = player(), time.time()
    x, y = number("x", WIDTH), number("y", 1)
    where = {**who, "x": x, "y": y, "at": now, "sent": number("sent")}
    eventstream.publish(where, type="move", channel="game", key=who["player"])
    if touches(int(number("dot")), x, y, now):
        # Another one may publish the same meanwhile, in whichever process. The first event
        # decides, and the order is the same for all.
        caught = {**who, "dot": int(number("dot")), "at": now}
        eventstream.publish(caught, type="caught", channel="game")
    return {"now": now}


@game.post("/leave")
def leave() -> dict[str, str]:
    """Let a player vanish at once, for those as well who come later."""
    gone = player()
    return {"id": eventstream.publish(gone, type="leave", channel="game", key=gone["player"])}


def touches(dot: int, x: float, y: float, now: float) -> bool:
    """Tell whether a player is where a dot is, or was a moment ago."""
    dot_x, dot_y = place_of(dot)
    age = now / current_app.config["DOT_SECONDS"] - dot
    return 0 <= age < 1.2 and (x - dot_x) ** 2 + (y - dot_y) ** 2 < NEAR**2


def place_of(dot: int) -> tuple[float, float]:
    """Return where a dot is; the page knows the same formula."""
    return 0.1 + 1.3 * (dot * 0.6180339887 % 1), 0.1 + 0.8 * (dot * 0.7548776662 % 1)


def player(secret: str = "") -> dict[str, Any]:
    """Return what others see of a player, which is made of the secret of his page."""
    digest = sha256((secret or field("secret")).encode()).digest()
    return {
        "player": digest.hex()[:16],
        "name": f"{ADJECTIVES[digest[0] % 10]} {ANIMALS[digest[1] % 10]}",
        "hue": digest[2] * 360 // 256,
    }


def number(name: str, most: float = 1e12) -> float:
    """Return a number that the page has sent."""
    value = request.get_json().get(name)
    if not isinstance(value, (int, float)) or not 0 <= value <= most:
        abort(400, f"The {name} is no number from 0 to {most}.")
    return value


def for_page() -> dict[str, Any]:
    secret = str(uuid4())
    return {
        "about": {
            "secret": secret,
            "me": player(secret)["player"],
            "now": time.time(),
            "width": WIDTH,
            "near": NEAR,
            "dot-seconds": current_app.config["DOT_SECONDS"],
            "point-seconds": POINT_SECONDS,
        }
    }
