"""What a subscriber's stream begins with, and what it needs to begin at all."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from flask import abort, current_app, request
from werkzeug.exceptions import ServiceUnavailable

from . import access
from .body import ShortBody, SubscriptionBody, jittered
from .errors import BrokerUnavailableError
from .event import ServerSentEvent, encode_comment
from .members import member_name, present_event
from .memory_broker import MemoryBroker
from .response import EventStreamResponse, cursor, json_dumps
from .signals import subscriber_connected
from .state import connection_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Config
    from .members import Stay
    from .places import Place
    from .state import State
    from .subscription import Subscription
    from .tokens import Token

SERVER_STOPS = "The server stops."


def current_token(state: State) -> Token:
    """Return the token of the current request; see :meth:`EventStream.current_token`."""
    try:
        return access.check_token(access.presented_token(), state.revocations)
    except BrokerUnavailableError as error:
        if request.method == "GET":
            abort(come_again(state.config, error))
        advice = "Tokens cannot be checked at the moment."
        raise ServiceUnavailable(advice, retry_after=access.RETRY_AFTER) from error


def take_place(state: State, identify: Callable[[], str | None]) -> Place:
    """Take a place for the current request; everybody who subscribes has one.

    :param state: the app's.
    :param identify: returns the key of its user, unless its token says whose it is.
    :raises ServiceUnavailable: 503, as :class:`TooManyRequests`, see :func:`access.take_place`.
    :raises Unauthorized: 401, if its token was revoked meanwhile.
    :raises BrokerUnavailableError: if it cannot be found out whose rights are revoked.
    """
    token = access.accepted_token()
    user = identify() if token is None or token.user is None else token.user
    # Another one than that of the user who is revoked has nothing to do with it.
    issued = None if token is None or token.user is None else token.issued
    if user is not None:
        # Before, or what was revoked long ago would end the stream.
        state.revocations.refresh()
    place = access.take_place(state.places, user, issued)
    if not state.has_warned:
        _warn_of_processes(state)
    if user is None:
        return place
    try:
        state.revocations.follow()
        # Once more: who revokes its rights from now on finds the place.
        if issued is not None:
            access.check_not_revoked(user, issued, state.revocations)
    except BaseException:
        place.release()
        raise
    return place


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


def subscribed(
    state: State,
    identify: Callable[[], str | None],
    names: tuple[str, ...],
    history: int,
    snapshot: Callable[[], Any] | None,
    is_member: bool = False,
    member: str | None = None,
    follow: Callable[[], None] | None = None,
) -> EventStreamResponse:
    """Subscribe to channels, and return the response; see :meth:`EventStream.subscribe`.

    :param follow: called once the place is taken, before the subscription begins.
    """
    if state.shutdown.has_begun:
        return come_again(state.config, SERVER_STOPS)
    with ExitStack() as unless_kept:
        try:
            place = unless_kept.enter_context(take_place(state, identify))
            if follow is not None:
                follow()
            subscription = state.broker.subscribe(*names, last_event_id=cursor(), history=history)
            unless_kept.callback(subscription.close)
            first_events(state.config, subscription, snapshot)
            stay = None
            if is_member:
                stay = state.members.enter(names[0], member_name(member, place.user))
                unless_kept.callback(stay.leave)
                if not subscription.resumed:
                    # Behind all that history has of joins and leaves.
                    subscription.put_behind(present_event(state.members, names[0]))
        except BrokerUnavailableError as error:
            return come_again(state.config, error)
        response = open_stream(state, subscription, subscription.start, place, stay)
        unless_kept.pop_all()
        return response


def open_stream(
    state: State, subscription: Subscription, start: bytes, place: Place, stay: Stay | None = None
) -> EventStreamResponse:
    """Return the response to a subscriber. It ends no later than the token of the request.

    :param state: the app's.
    :param subscription: what the client has to get.
    :param start: the events that come first.
    :param place: the subscriber's, which is released at the end.
    :param stay: that the subscriber is present, which it is no more at the end.
    """
    config = state.config
    first = opening(config) + start
    # Nobody needs it twice, for as long as the client stays.
    subscription.start = b""
    body = SubscriptionBody(
        subscription, first, config.heartbeat, config.max_lifetime, state, place
    )
    body.stay = stay
    body.threads = state.threads
    time_left = access.time_left()
    if time_left is not None:
        body.deadline = min(body.deadline, time.monotonic() + time_left)
    try:
        subscriber_connected.send(
            state.app,
            channels=subscription.channels,
            last_event_id=cursor(),
            connection=connection_id(body),
        )
        return EventStreamResponse(body)
    except BaseException:
        # The error's traceback has it, and may be garbage only later.
        body.close()
        raise


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
    """Have the snapshot come behind what a subscriber missed, and return what comes first.

    :param config: the app's.
    :param subscription: the subscription, which is in force.
    :param snapshot: see :meth:`EventStream.subscribe`.
    """
    item = None if snapshot is None or subscription.resumed else snapshot()
    if item is not None:
        is_event = isinstance(item, ServerSentEvent)
        event: ServerSentEvent = item if is_event else ServerSentEvent(item, dumps=json_dumps())
        if event.id is None:
            # With the id of the moment it was taken at, a client that then loses the connection
            # gets what came after it, and not everything once more.
            event = event.with_id(subscription.cursor)
        subscription.put_behind(event.encode(config.max_event_bytes))
    return subscription.start
