"""Pictures over an event stream, whose wire is text."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from flask import current_app, request

from flask_eventstream import EventStream, ServerSentEvent, interval

if TYPE_CHECKING:
    from collections.abc import Iterator

binary = EventStream("binary", __name__, url_prefix="/binary")

WIDTH, HEIGHT = 160, 120


@binary.stream("/frames", methods=["GET"])
def frames() -> Iterator[ServerSentEvent]:
    """Send a picture at a time: RGBA, gzipped if asked, as base64."""
    is_gzipped = request.args.get("gzip") == "true"
    for number in interval(current_app.config["FRAME_SECONDS"]):
        pixels = picture(number)
        yield ServerSentEvent.binary(pixels, is_gzipped, "frame", number)


def picture(number: int) -> bytes:
    """Return WIDTH * HEIGHT pixels of 4 bytes, as a canvas has them."""
    pixels = bytearray(b"\xff") * (4 * WIDTH * HEIGHT)
    for channel, waves in enumerate((2, 3, 4)):
        # Only the palette moves, which C does for all pixels at once.
        pixels[channel::4] = plasma().translate(palette(waves, number))
    return bytes(pixels)


@cache
def plasma() -> bytes:
    """Return the height of a hilly land for each pixel, 0 to 255."""
    return bytes(
        int(128 + 42 * (math.sin(x / 13) + math.sin(y / 9) + math.sin(math.hypot(x, y) / 11)))
        for y in range(HEIGHT)
        for x in range(WIDTH)
    )


def palette(waves: int, number: int) -> bytes:
    """Return the brightness of one colour for each height."""
    return bytes(
        int(128 + 127 * math.sin(height * waves / 128 + number / (waves + 5)))
        for height in range(256)
    )
