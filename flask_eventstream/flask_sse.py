"""Flask-SSE's names, settings and messages, with this package's streams behind them.

An app that uses Flask-SSE changes one import::

    from flask_eventstream.flask_sse import sse

Subscribers then have replay, heartbeats and the hub. Processes that still run Flask-SSE go on as
before: what they publish comes to our subscribers, and they get copies of what we publish.

Like Flask-SSE's, **the route is open to everybody, for every channel**, unless a
``before_request`` function of the blueprint or of the app refuses, or a function says who may read
what (``@sse.authorize``). Beside an :class:`EventStream` it opens no more than that does: without
such a function, the default channel alone.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import abort, current_app, json, request, stream_with_context

from . import access, concurrency, redis_link
from .broker import DEFAULT_CHANNEL, channel_names
from .config import without_secrets
from .errors import ConfigurationError, InvalidFieldError
from .event import ServerSentEvent
from .flask_sse_bridge import Bridge
from .opening import subscribed
from .redis_link import LOST, StrictRedis, made_of
from .refusals import refuses_what_is_sent
from .response import EventStreamResponse
from .rights import Rights
from .signals import event_published
from .state import app_in_use, new_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask, Response
    from flask.json.provider import JSONProvider
    from flask.sansio.app import App

    from .state import State

__all__ = ["Message", "ServerSentEventsBlueprint", "StrictRedis", "sse"]

_BROKER_URL = "EVENTSTREAM_BROKER_URL"
_BRIDGE = "eventstream.flask_sse"
_MEMORY = "memory://"


class Message:
    """An event as Flask-SSE has it.

    :param data: a ``str``, or what the app's JSON can express.
    :param type: the event type; ``"message"`` by default.
    :param id: an id.
    :param retry: the reconnection time in **milliseconds**.
    """

    def __init__(self, data: Any, type: Any = None, id: Any = None, retry: Any = None) -> None:
        self.data = data
        self.type = type
        self.id = id
        self.retry = retry

    def to_dict(self) -> dict[str, Any]:
        """Return the data, and what else is set and not empty: what goes over Redis as JSON."""
        return {"data": self.data, **self._options()}

    def _options(self) -> dict[str, Any]:
        options = {"type": self.type, "id": self.id, "retry": self.retry}
        return {name: value for name, value in options.items() if value}

    def __str__(self) -> str:
        data = self.data if isinstance(self.data, str) else json.dumps(self.data)
        options = self._options()
        head = [f"event:{options.pop('type')}"] if "type" in options else []
        body = [f"data:{line}" for line in data.splitlines()]
        tail = [f"{name}:{value}" for name, value in options.items()]
        return "\n".join([*head, *body, *tail]) + "\n\n"

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options().items())
        return f"{self.__class__.__name__}({self.data!r}{options})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self.__class__) and vars(self) == vars(other)


class ServerSentEventsBlueprint(Rights):
    """A blueprint with the methods of Flask-SSE's.

    :param name: the blueprint's name.
    :param import_name: the name of the module that it belongs to.
    :param options: what else a :class:`flask.Blueprint` takes.

    ``SSE_REDIS_URL``, else ``REDIS_URL``, names the Redis server, and is the app's
    ``EVENTSTREAM_BROKER_URL`` too unless that is set. All ``EVENTSTREAM_`` keys work. They are read
    when the blueprint is registered, or, if there is no URL yet, when it is first used.

    Where ``StrictRedis`` of this module is replaced, as tests of an app do, all goes through the
    replacement, as it does in Flask-SSE: our broker could not be reached by it.
    """

    is_open = True

    def __init__(self, name: str, import_name: str, **options: Any) -> None:
        super().__init__(name, import_name, **options)
        self._mutex = concurrency.new_mutex()

    @property
    def redis(self) -> Any:
        """A new :class:`redis.StrictRedis` for the Redis server of the current app.

        :raises KeyError: if the configuration names none.
        :raises ConfigurationError: if its URL cannot be used.
        """
        return made_of(_needed_url(app_in_use()), StrictRedis.from_url)

    @refuses_what_is_sent
    def publish(
        self,
        data: Any,
        type: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        channel: str = DEFAULT_CHANNEL,
    ) -> Any:
        """Send an event to the subscribers of a channel, and a copy to those of Flask-SSE's.

        :param data: a ``str``, or what the app's JSON can express.
        :param type: the event type; ``"message"`` by default.
        :param id: an id of your own instead of the broker's. 0 and ``""`` count as none.
        :param retry: the reconnection time in **milliseconds**.
        :param channel: the channel's name.
        :returns: the event's id.
        :raises KeyError: if the configuration names no Redis server.
        :raises EventStreamError: as :meth:`EventStream.publish`.

        There are no copies with ``SSE_REDIS_COPY = False``.
        """
        text = json.dumps(Message(data, type, id, retry).to_dict())
        if _is_replaced():
            return self.redis.publish(channel=channel, message=text)
        app = app_in_use()
        state, bridge = self._of(app)
        names = _checked(channel, bridge)
        event_id = state.broker.publish(event_of(text, app.json), channel=channel)
        event_published.send(app, channels=names, id=event_id)
        if bridge is not None and app.config.get("SSE_REDIS_COPY", True):
            bridge.copy(channel, text)
        return event_id

    def messages(self, channel: str = DEFAULT_CHANNEL) -> Iterator[Message]:
        """Yield what Flask-SSE gets of a channel: what it publishes itself, and copies.

        :param channel: the channel's name.
        :raises KeyError: if the configuration names no Redis server.
        """
        pubsub = self.redis.pubsub()
        pubsub.subscribe(channel)
        try:
            messages = (one["data"] for one in pubsub.listen() if one["type"] == "message")
            yield from (Message(**json.loads(data)) for data in messages)
        finally:
            # A connection that is lost hears nothing any more, which is what is wanted.
            with suppress(*LOST):
                pubsub.unsubscribe(channel)
            pubsub.close()

    def stream(self) -> Response:
        """Stream the channel that the current request names: ``?channel=news``; a view.

        :returns: the response. Everybody may read every channel, unless one of the app's
            blueprints has an ``authorize`` function, or is an :class:`EventStream`.
        :raises BadRequest: 400, for a name that no channel can have.
        :raises Forbidden: 403, for a channel that may not be read.
        :raises KeyError: if the configuration names no Redis server.
        """
        channel = request.args.get("channel") or DEFAULT_CHANNEL
        if _is_replaced():
            self._check_may_read((channel,))
            return self._plain_stream(channel)
        state, bridge = self._of(app_in_use())
        try:
            names = _checked(channel, bridge)
        except InvalidFieldError as error:
            abort(400, str(error))
        self._check_may_read(names)
        if request.method == "HEAD":
            return EventStreamResponse(())
        follow = None if bridge is None else partial(bridge.follow, channel)
        return subscribed(state, self._user, names, 0, None, follow=follow)

    def _check_may_read(self, names: tuple[str, ...]) -> None:
        judges = self._judges()
        if judges or not all(one.is_open for one in self._all_rights(app_in_use())):
            access.check_may_read(names, judges)

    def _plain_stream(self, channel: str) -> Response:
        items = stream_with_context(map(str, self.messages(channel)))
        return current_app.response_class(items, mimetype="text/event-stream")

    def _of(self, app: Flask) -> tuple[State, Bridge | None]:
        extensions = app.extensions
        if _BRIDGE not in extensions or self not in extensions["eventstream"].blueprints:
            self._install(app)
            with self._mutex:
                if _BRIDGE not in extensions:
                    extensions[_BRIDGE] = _new_bridge(app, extensions["eventstream"])
        return extensions["eventstream"], extensions[_BRIDGE]

    def _set_up(self, app: App) -> None:
        if _url_of(app):
            self._install(app)

    def _install(self, app: Any) -> None:
        with self._mutex:
            if not app.config.get(_BROKER_URL):
                app.config[_BROKER_URL] = _needed_url(app)
            state = app.extensions.get("eventstream")
            if state is None:
                state = app.extensions["eventstream"] = new_state(app)
            if state.config.broker_url != app.config[_BROKER_URL]:
                read = without_secrets(state.config.broker_url)
                reason = "was read before; set it to the URL that SSE_REDIS_URL has"
                raise ConfigurationError(_BROKER_URL, read, reason)
            if self not in state.blueprints:
                state.blueprints.append(self)


def event_of(text: str | bytes, provider: JSONProvider) -> ServerSentEvent:
    """Return the event that Flask-SSE's subscribers get of what it publishes.

    Lines are split as it splits them, by :meth:`str.splitlines`, and a last empty one is dropped.

    :param text: what goes over Redis.
    :param provider: the app's JSON.
    :raises ValueError: if it is nothing that Flask-SSE publishes, or no event can carry it.
    """
    fields = provider.loads(text)
    if not isinstance(fields, dict) or "data" not in fields:
        raise InvalidFieldError("data", text, "is nothing that Flask-SSE publishes")
    data = fields["data"]
    lines = (data if isinstance(data, str) else provider.dumps(data)).splitlines()
    type, id, retry = (fields.get(name) or None for name in ("type", "id", "retry"))
    return ServerSentEvent("\n".join(lines), type and str(type), id and str(id), retry)


def _url_of(app: Any) -> str:
    for key in ("SSE_REDIS_URL", "REDIS_URL", _BROKER_URL):
        url: str = app.config.get(key) or ""
        if url:
            return url
    return ""


def _needed_url(app: Any) -> str:
    url = _url_of(app)
    if url in ("", _MEMORY):
        # In Flask-SSE's words, for who looks for them.
        raise KeyError("Must set a redis connection URL in app config.")
    return url


def _checked(channel: str, bridge: Bridge | None) -> tuple[str, ...]:
    if bridge is not None:
        bridge.check(channel)
    return channel_names(channel)


def _new_bridge(app: Flask, state: State) -> Bridge | None:
    # With a broker of this process only, the processes would have to share each event.
    if state.config.broker_url == _MEMORY:
        return None
    as_event = partial(event_of, provider=app.json)
    return Bridge(state.broker, state.config, _url_of(app), as_event)


def _is_replaced() -> bool:
    return StrictRedis is not redis_link.StrictRedis


sse = ServerSentEventsBlueprint("sse", __name__)
"""A blueprint that is ready to be registered, with its stream at its prefix: ``sse.stream``."""

sse.add_url_rule(rule="", endpoint="stream", view_func=sse.stream)
