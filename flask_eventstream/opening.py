"""What a subscriber's stream begins with, and what it needs to begin at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import current_app, request

from . import access
from .body import ShortBody, SubscriptionBody, jittered
from .event import ServerSentEvent, encode_comment
from .memory_broker import MemoryBroker
from .response import EventStreamResponse, cursor, json_dumps
from .signals import subscriber_connected
from .state import connection_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from .broker import Subscription
    from .config import Config
    from .state import State

SERVER_STOPS = "The server stops."


def check_room(state: State) -> None:
    """Refuse the current request if there is no room for one more subscriber.

    :raises ServiceUnavailable: 503, see :func:`access.check_room`.
    """
    access.check_room(state.broker.subscriptions, state.max_subscribers)
    if not state.has_warned:
        _warn_of_processes(state)


def _warn_of_processes(state: State) -> None:
    is_shared = not isinstance(state.broker, MemoryBroker)
    if is_shared or not request.environ.get("wsgi.multiprocess"):
        return
    state.has_warned = True
    current_app.logger.warning(
        "The server runs several worker processes, and EVENTSTREAM_BROKER_URL='memory://' is a "
        "broker for one: what one process publishes never reaches the subscribers of another. Set "
        "EVENTSTREAM_BROKER_URL='redis://…', or run one worker process, with threads or gevent."
    )


def open_stream(state: State, subscription: Subscription, start: bytes) -> EventStreamResponse:
    """Return the response to a subscriber.

    :param state: the app's.
    :param subscription: what the client has to get.
    :param start: the events that come first.
    """
    config = state.config
    first = opening(config) + start
    body = SubscriptionBody(subscription, first, config.heartbeat, config.max_lifetime, state)
    subscriber_connected.send(
        state.app,
        channels=subscription.channels,
        last_event_id=cursor(),
        connection=connection_id(body),
    )
    return EventStreamResponse(body)


def opening(config: Config) -> bytes:
    """Return the first bytes of every subscriber's stream."""
    # It leaves at once, so that onopen fires. There is no blank line: the first event completes
    # the block, since clients would take one without data for an event (see HEARTBEAT).
    return encode_comment() + b"retry: %d\n" % jittered(config.retry)


def come_again(config: Config, reason: object) -> EventStreamResponse:
    """Return a response that ends at once, since there can be no stream for now.

    :param config: the app's.
    :param reason: why: the broker cannot be reached, or the server stops.
    """
    # An EventSource that gets an error instead, 503 included, gives up for good (WHATWG HTML,
    # section 9.2.2). One whose stream ends returns. There may be thousands of them, and the broker
    # has given its warning.
    current_app.logger.info("A subscriber is sent away for a while: %s", reason)
    return EventStreamResponse(ShortBody(opening(config)))


def first_events(
    config: Config, subscription: Subscription, snapshot: Callable[[], Any] | None
) -> bytes:
    """Return what a subscriber gets first: what it missed, and the snapshot.

    :param config: the app's.
    :param subscription: the subscription, which is in force.
    :param snapshot: see :meth:`EventStream.subscribe`.
    """
    start = subscription.start
    if snapshot is None or subscription.resumed:
        return start
    item = snapshot()
    if item is None:
        return start
    is_event = isinstance(item, ServerSentEvent)
    event: ServerSentEvent = item if is_event else ServerSentEvent(item, dumps=json_dumps())
    if event.id is None:
        # With the id of the moment it was taken at, a client that then loses the connection gets
        # what came after it, and not everything once more.
        event = event.with_id(subscription.cursor)
    return start + event.encode(config.max_event_bytes)
