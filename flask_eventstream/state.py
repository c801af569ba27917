"""What one app has, and how it comes by it."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app

from . import access, descriptors, endings
from .brokers import new_broker
from .config import Config, without_secrets
from .errors import BrokerUnavailableError, NotRegisteredError
from .event import HEARTBEAT
from .figures import Figures
from .hub import SocketHub
from .members import grace
from .places import Places
from .revocations import Revocations
from .runs import Runs
from .shutdown import Shutdown, farewell
from .signals import subscriber_disconnected
from .threads import Threads

if TYPE_CHECKING:
    from .body import SubscriptionBody
    from .local_broker import LocalBroker
    from .members import Members


_logger = logging.getLogger(__name__)


@dataclass
class State:
    """What one app has: it is ``app.extensions["eventstream"]``.

    :param app: the app.
    :param config: its configuration.
    :param broker: where its events go through.
    :param places: those that its process has for subscribers.
    :param revocations: whose rights were revoked.
    :param hub: what sends to their sockets, if they may be taken.
    :param runs: the runs that its process produces.
    :param members: who is present.
    :param shutdown: what ends all of that.
    :param figures: what is counted of it.
    :param threads: those in which its server may iterate streams, where the hub is to serve them.
    :param has_warned: whether it was said that the broker is for one process only.
    :param blueprints: those that are registered with it.
    """

    app: Any
    config: Config
    broker: LocalBroker
    places: Places
    revocations: Revocations
    hub: SocketHub | None
    runs: Runs
    members: Members
    shutdown: Shutdown
    figures: Figures = field(default_factory=Figures)
    threads: Threads | None = None
    has_warned: bool = False
    blueprints: list[Any] = field(default_factory=list)

    def connected(self, start: bytes) -> int:
        """Count a subscriber, by what its stream starts with, and return its number."""
        return self.figures.connected(start)

    def delivered(self, wire: bytes) -> None:
        """Count events that a server has taken for one subscriber."""
        self.figures.delivered(wire)

    def replayed(self, wire: bytes) -> None:
        """Count what history had for a subscriber besides what its stream starts with."""
        self.figures.replay(wire)

    def closed(self, body: SubscriptionBody) -> None:
        """Count a subscriber that is off the books, and tell of it."""
        self.figures.ended(body.reason)
        if body.stay is not None:
            config = self.config
            body.stay.leave(grace(body.reason, config.presence_seconds, config.heartbeat))
        channels, connection = body.subscription.channels, connection_id(body)
        if body.reason in endings.ABNORMAL:
            evidence = {
                "connection": connection,
                "reason": body.reason,
                "channels": channels,
                "seconds": round(time.monotonic() - body.begun, 3),
            }
            text = "A stream has ended: reason=%(reason)s connection=%(connection)s "
            text += "seconds=%(seconds)s channels=%(channels)s"
            _logger.warning(text, evidence, extra={"eventstream": evidence})
        subscriber_disconnected.send(
            self.app, channels=channels, reason=body.reason, connection=connection
        )

    def health(self) -> tuple[dict[str, Any], int]:
        """Return how the app's streams are, without secrets, and the HTTP status that says so."""
        report: dict[str, Any] = {
            "broker": without_secrets(self.config.broker_url),
            "subscribers": self.broker.subscriptions,
        }
        try:
            return {"status": "ok", "seconds": round(self.broker.ping(), 6), **report}, 200
        except BrokerUnavailableError as error:
            return {"status": "unavailable", "reason": str(error), **report}, 503


def connection_id(body: SubscriptionBody) -> str:
    """Return what tells a subscriber's stream from all others, in logs and signals."""
    return f"{os.getpid()}-{body.number}"


def new_state(app: Any) -> State:
    """Return what an app is to have, by its configuration.

    :param app: the app.
    :raises ConfigurationError: if a value cannot be used; it names the key.
    """
    config = Config.read(app.config)
    broker = new_broker(config)
    limits = config.max_runs, config.max_runs_per_owner
    registry = broker.registry(config.run_seconds, config.run_lease, *limits)
    runs = Runs(registry, config.max_runs)
    hub = None
    if config.hijack:
        goodbye = partial(farewell, config.retry)
        hub = SocketHub(broker.watch, config.heartbeat, HEARTBEAT, config.max_lag, goodbye)
    places = Places(
        config.max_subscribers or access.default_max_subscribers(),
        config.max_subscribers_per_address,
        config.max_subscribers_per_user,
    )
    revocations = Revocations(places, broker.revocation_log)
    # The last one here is the first one that hears of the interpreter's end.
    shutdown = Shutdown(config.retry, runs, *filter(None, [hub]))
    members = broker.members(config.presence_seconds)
    state = State(app, config, broker, places, revocations, hub, runs, members, shutdown)
    if hub is not None and descriptors.IS_AVAILABLE:
        state.threads = Threads()
    return state


def app_in_use() -> Flask:
    """Return the current app itself, not the proxy of it."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def current_state() -> State:
    """Return what the current app has.

    :raises NotRegisteredError: if it has no event stream.
    """
    app = app_in_use()
    state: State | None = app.extensions.get("eventstream")
    if state is None:
        raise NotRegisteredError(app.name)
    return state
