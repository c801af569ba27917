"""Notifications: each user has a channel, and reads it with a signed token."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flask import Blueprint, abort, current_app, redirect, session, url_for

from flask_eventstream import eventstream

from .streams import field

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

notifications = Blueprint("notifications", __name__, url_prefix="/notifications")


@notifications.post("/log_in")
def log_in() -> Response:
    """Believe any name: this is about streams, and not about passwords."""
    user = name_in("name")
    end_streams()
    session["user"] = user
    session["login"] = str(uuid4())
    # The page reads from here on, also once it was reloaded.
    session["cursor"] = eventstream.last_event_id(f"user:{user}")
    return redirect(url_for("pages.notify"), 303)


@notifications.post("/log_out")
def log_out() -> Response:
    end_streams()
    return redirect(url_for("pages.notify"), 303)


def end_streams() -> None:
    """End those of this login, in every process, and refuse its tokens."""
    if "login" in session:
        eventstream.revoke(session["login"])
    for name in ("user", "login", "cursor"):
        session.pop(name, None)


@notifications.post("/token")
def token() -> dict[str, Any]:
    """Sign the right to read one's own channel, for a while."""
    user = current_user()
    # A tab may still show somebody who has logged out in another one.
    if field("user") != user:
        abort(401, f"This browser is {user} by now.")
    seconds = current_app.config["RIGHT_SECONDS"]
    signed = eventstream.token(f"user:{user}", max_age=seconds, user=session["login"])
    return {"token": signed, "now": time.time()}


@notifications.post("/send")
def send() -> dict[str, int]:
    """Notify a user, and tell in how many tabs."""
    channel = f"user:{name_in('to')}"
    about = {"from": current_user(), "text": field("text"), "at": time.time()}
    eventstream.publish(about, type="notification", channel=channel)
    return {"tabs": eventstream.subscriber_count(channel)}


@notifications.post("/read")
def mark_as_read() -> dict[str, str]:
    """Publish that, too: all tabs of the user count the same."""
    until = {"until": field("until")}
    channel = f"user:{current_user()}"
    return {"id": eventstream.publish(until, type="read", channel=channel)}


def current_user() -> str:
    if "user" not in session:
        abort(401, "Nobody is logged in here.")
    return str(session["user"])


def name_in(name: str) -> str:
    user = field(name).strip().lower()
    if not re.fullmatch(r"\w{1,20}", user):
        abort(400, "A name has 1 to 20 letters, digits or underscores.")
    return user


def for_page() -> dict[str, Any]:
    """Return who is logged in, and where his page begins to read."""
    return {"user": session.get("user"), "cursor": session.get("cursor")}
