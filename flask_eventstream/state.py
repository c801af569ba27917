"""What one app has, and how it comes by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app

from . import access
from .brokers import new_broker
from .config import Config
from .errors import NotRegisteredError
from .event import HEARTBEAT
from .hub import SocketHub
from .places import Places
from .revocations import Revocations
from .run import Runs
from .signals import subscriber_disconnected

if TYPE_CHECKING:
    from collections.abc import Callable

    from .body import SubscriptionBody
    from .local_broker import LocalBroker


@dataclass
class State:
    """What one app has: it is ``app.extensions["eventstream"]``.

    :param config: its configuration.
    :param broker: where its events go through.
    :param places: those that its process has for subscribers.
    :param revocations: whose rights were revoked.
    :param hub: what sends to their sockets, if they may be taken.
    :param on_close: called with the body of a subscriber who has left.
    :param runs: the runs that its process produces.
    :param has_warned: whether it was said that the broker is for one process only.
    :param blueprints: those that are registered with it.
    """

    config: Config
    broker: LocalBroker
    places: Places
    revocations: Revocations
    hub: SocketHub | None
    on_close: Callable[[SubscriptionBody], None]
    runs: Runs
    has_warned: bool = False
    blueprints: list[Any] = field(default_factory=list)


def new_state(app: Any) -> State:
    """Return what an app is to have, by its configuration.

    :param app: the app.
    :raises ConfigurationError: if a value cannot be used; it names the key.
    """
    config = Config.read(app.config)
    broker = new_broker(config)
    hub = None
    if config.hijack:
        hub = SocketHub(broker.watch, config.heartbeat, HEARTBEAT, config.max_lag)
    places = Places(
        config.max_subscribers or access.default_max_subscribers(),
        config.max_subscribers_per_address,
        config.max_subscribers_per_user,
    )
    revocations = Revocations(places, broker.revocation_log)

    def on_close(body: SubscriptionBody) -> None:
        subscriber_disconnected.send(app, channels=body.subscription.channels)

    registry = broker.registry(config.run_seconds, config.run_lease, config.max_runs)
    runs = Runs(registry, config.max_runs, config.max_runs_per_owner)
    return State(config, broker, places, revocations, hub, on_close, runs)


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
