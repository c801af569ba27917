"""What there is to see: the index and the menu of every page are made of this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """What the index and the menu say of one page."""

    name: str
    title: str
    summary: str


@dataclass(frozen=True)
class Group:
    """Some pages that belong together."""

    title: str
    examples: tuple[Example, ...]


GROUPS = (
    Group(
        "Generator streams",
        (
            Example(
                "typewriter",
                "Typewriter",
                "An answer appears token by token. Stop closes the server's generator at once.",
            ),
            Example(
                "clock",
                "Clock",
                "A custom event each second, with an id and a reconnection time. Connect and "
                "disconnect.",
            ),
            Example(
                "interval",
                "Interval and heartbeat",
                "Two generators, each with a pace of its own, merged into one stream.",
            ),
            Example(
                "numbers",
                "Numbers",
                "A plain generator of numbers, read with fetch while it counts.",
            ),
            Example(
                "chat-api",
                "Chat API",
                "A local model behind the wire of OpenAI. Its official clients, curl and this page "
                "read the same stream.",
            ),
        ),
    ),
    Group(
        "Channels",
        (
            Example(
                "broadcast",
                "Broadcast",
                "A message reaches every open tab. A tab that was offline gets what it missed.",
            ),
        ),
    ),
    Group(
        "Runs",
        (
            Example(
                "resume",
                "Resume",
                "An answer outlives its connection. Kill it, reload, open a second tab: nothing is "
                "lost, and nothing comes twice.",
            ),
        ),
    ),
    Group(
        "What people build",
        (
            Example(
                "notifications",
                "Notifications",
                "Each user has a channel of his own, read with a signed token. To log out ends the "
                "stream.",
            ),
            Example(
                "log",
                "Log",
                "A file is followed as it grows. Its byte offset is the event's id, so that a "
                "reconnect goes on at the right line.",
            ),
            Example(
                "progress",
                "Progress",
                "Jobs run somewhere else, and tell how far they are. A reload finds them again.",
            ),
            Example(
                "binary",
                "Binary",
                "Pictures as gzipped base64, some each second, drawn on a canvas.",
            ),
            Example(
                "inspector",
                "Inspector",
                "Everything that comes over the wire: events, comments, bytes, latency. Cut the "
                "connection and see what happens.",
            ),
            Example(
                "ticker",
                "Ticker",
                "All prices first, then each that changes. Who reads slowly gets only the newest.",
            ),
            Example(
                "game",
                "Game",
                "Everybody's cursor on one field, and a dot to catch. The server remembers "
                "nothing.",
            ),
            Example(
                "chat-room",
                "Chat room",
                "Who is here, who comes and who goes, and what was said before. A reload is no "
                "farewell.",
            ),
        ),
    ),
)

EXAMPLES = tuple(example for group in GROUPS for example in group.examples)
"""All of them."""
