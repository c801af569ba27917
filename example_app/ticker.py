"""Prices: a snapshot first, then what changes, and only the newest for who is slow."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from math import sin
from pathlib import Path
from random import Random
from threading import Lock, Thread
from typing import IO, TYPE_CHECKING, Any, cast

from flask import Blueprint, current_app

from flask_eventstream import ServerSentEvent, eventstream
from flask_eventstream.errors import BrokerClosedError, BrokerUnavailableError

if TYPE_CHECKING:
    from flask import Flask
    from flask.blueprints import BlueprintSetupState

    from flask_eventstream import EventStreamResponse

ticker = Blueprint("ticker", __name__, url_prefix="/ticker")

SYMBOLS = (
    *("ACORN", "BIRCH", "CEDAR", "DAISY", "ELDER", "FERN", "GORSE", "HAZEL", "IVY", "JASMIN"),
    *("KELP", "LILAC", "MAPLE", "NETTLE", "OLIVE", "POPLAR", "QUINCE", "ROWAN", "SEDGE", "THYME"),
)
POINTS = 40
"""How many past prices the snapshot has of each symbol."""

FILLING = "." * 250_000
"""The system and the browser take in 5 to 12 MB for a page that does not read."""


@ticker.get("/prices")
def prices() -> EventStreamResponse:
    """Send all prices first, and then each that changes."""
    response = eventstream.subscribe("prices", snapshot=all_prices)
    begin_to_feed()
    return response


@ticker.get("/heavy")
def heavy() -> EventStreamResponse:
    """Send the same, but large enough that a slow reader is slow."""
    response = eventstream.subscribe("prices:heavy")
    # Without this Chromium takes in whatever comes, at once, for a page that does not read it.
    response.cache_control.no_store = True
    begin_to_feed()
    return response


def all_prices() -> ServerSentEvent:
    """Return what is true now, for who comes or was away for too long."""
    now = time.time()
    latest = [latest_trade(symbol, now) for symbol in SYMBOLS]
    quotes = [
        {
            "symbol": symbol,
            "trade": trade,
            "past": [price(symbol, trade - ago) for ago in reversed(range(POINTS))],
        }
        for symbol, trade in zip(SYMBOLS, latest, strict=True)
    ]
    return ServerSentEvent(quotes, "snapshot")


def publish_trades(told: dict[str, int]) -> None:
    """Publish what was traded since it was told."""
    now = time.time()
    is_heavy = bool(eventstream.subscriber_count("prices:heavy"))
    for symbol in SYMBOLS:
        latest = latest_trade(symbol, now)
        # A process that was asleep does not make up for all it has missed.
        first = max(told.get(symbol, latest - 1), latest - POINTS) + 1
        for trade in range(first, latest + 1):
            publish_trade(symbol, trade, is_heavy)
        told[symbol] = latest


def publish_trade(symbol: str, trade: int, is_heavy: bool) -> None:
    """Publish a price, which takes the place of the one before for who has not got that yet."""
    quote = {"symbol": symbol, "trade": trade, "price": price(symbol, trade)}
    eventstream.publish(quote, channel="prices", key=symbol)
    if is_heavy:
        full = {**quote, "filling": FILLING}
        eventstream.publish(full, channel="prices:heavy", key=symbol)


class Feeder:
    """Publishes prices, as long as somebody watches.

    Each process has one that runs while it has readers, and one of them has the turn.
    """

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._mutex = Lock()
        self._is_running = False

    def start(self) -> None:
        """Run, unless it does already; called once a reader is there."""
        with self._mutex:
            if not self._is_running:
                self._is_running = True
                Thread(target=self._run, name="ticker", daemon=True).start()

    def _run(self) -> None:
        told: dict[str, int] = {}
        with self._app.app_context(), open_turn() as turn:
            # A broker that is closed has no readers any more.
            with suppress(BrokerClosedError):
                while self._is_wanted():
                    if has_turn(turn):
                        feed(told)
                    time.sleep(current_app.config["TICK_SECONDS"])

    def _is_wanted(self) -> bool:
        # Not between the two: a reader who comes then would count on this one, which ends.
        with self._mutex:
            self._is_running = is_watched()
            return self._is_running


def is_watched() -> bool:
    """Tell whether anybody reads prices, in whichever process."""
    try:
        return any(map(eventstream.subscriber_count, ("prices", "prices:heavy")))
    except BrokerUnavailableError:
        return True  # for all that is known


def feed(told: dict[str, int]) -> None:
    # What could not be told is not told later: by then there is a newer price.
    with suppress(BrokerUnavailableError):
        publish_trades(told)


def has_turn(turn: IO[Any]) -> bool:
    """Take the turn if it is free; the system frees it when a process ends or dies.

    On several machines one process of each has it. They say the same then, see :func:`price`.
    """
    try:
        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_turn() -> IO[Any]:
    """Open the file that those processes lock whose readers are the same."""
    config = current_app.config
    url, prefix = config["EVENTSTREAM_BROKER_URL"], config.get("EVENTSTREAM_KEY_PREFIX")
    if url == "memory://":
        # Each process has readers of its own, and always its turn.
        return tempfile.TemporaryFile()
    name = sha256(repr((os.getuid(), url, prefix)).encode()).hexdigest()
    return (Path(tempfile.gettempdir()) / f"ticker-{name}.lock").open("a")


def latest_trade(symbol: str, now: float) -> int:
    """Return the number of the latest trade: some symbols are traded more often than others."""
    ticks = now / float(current_app.config["TICK_SECONDS"])
    place = SYMBOLS.index(symbol)
    return int((ticks + place) // (1 + place * 7 % 11))


def price(symbol: str, trade: int) -> float:
    """Return what was paid in a trade.

    No process has to remember a price, or to ask another one: it is a function of the trade's
    number, and that is a function of the time.
    """
    chance = Random(symbol)
    usual = chance.uniform(10, 400)
    waves = [sin(trade / length + chance.uniform(0, 6)) for length in (3, 11, 37, 131)]
    swing = sum(
        wave * weight for wave, weight in zip(waves, (0.003, 0.008, 0.02, 0.05), strict=True)
    )
    noise = Random(f"{symbol}{trade}").gauss(0, 0.002)
    return round(usual * (1 + swing + noise), 2)


def begin_to_feed() -> None:
    feeder: Feeder = current_app.extensions["ticker"]
    feeder.start()


@ticker.record
def add_feeder(setup: BlueprintSetupState) -> None:
    setup.app.extensions["ticker"] = Feeder(cast("Flask", setup.app))


def for_page() -> dict[str, Any]:
    config = current_app.config
    return {"symbols": SYMBOLS, "points": POINTS, "rest": config["REST_SECONDS"]}
