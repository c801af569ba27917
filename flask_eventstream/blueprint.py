"""The blueprint: routes, publishing, subscribing, and the state of each app."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flask import current_app, request

from . import access
from .broker import DEFAULT_CHANNEL, channel_names
from .errors import BrokerUnavailableError, InvalidFieldError, TooLargeError
from .event import ServerSentEvent, to_json
from .opening import come_again, subscribed
from .refusals import as_answer, refuses_what_is_sent
from .response import EventStreamResponse, json_dumps
from .resumable import METHODS, Resumable
from .rights import Rights, allowed_names
from .signals import event_published
from .state import app_in_use, current_state, new_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flask import Response
    from flask.blueprints import BlueprintSetupState

    View = TypeVar("View", bound=Callable[..., Any])

SCRIPTS = ("eventstream.js", "eventsource-parser.js")
"""The modules that every blueprint serves, for ``import`` in a page."""

_STATIC = Path(__file__).parent / "static"


class EventStream(Rights):
    """A blueprint that publishes events, and serves them.

    :param name: the blueprint's name.
    :param import_name: the name of the module that it belongs to, ``__name__`` as a rule.
    :param url_prefix: where its routes are, ``"/stream"`` unless it is registered elsewhere. It
        must not be empty: the route of the channels is the prefix itself.
    :param options: what else a :class:`flask.Blueprint` takes.

    Its own route, ``GET /stream?channel=news&channel=sport``, streams channels that
    :meth:`authorize` opens; without it, only the default channel, ``"sse"``. Beside it is
    ``/stream/eventstream.js``, a module for pages.

    All blueprints of an app share the app's broker and configuration. The configuration is read
    when the first of them is registered; a value that cannot be used is a
    :class:`ConfigurationError`.
    """

    def __init__(
        self, name: str, import_name: str, *, url_prefix: str = "/stream", **options: Any
    ) -> None:
        super().__init__(name, import_name, url_prefix=url_prefix, **options)
        self.record(self._install)
        self.add_url_rule("", "channels", self._channels)
        for name in SCRIPTS:
            self.add_url_rule(f"/{name}", "script", self._script, defaults={"name": name})

    def publish(
        self,
        data: Any,
        type: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        channel: str | Iterable[str] = DEFAULT_CHANNEL,
        *,
        key: str | None = None,
    ) -> str:
        """Send an event to the subscribers of one channel or of several, and return at once.

        It needs an app context, which every view has; elsewhere, ``with app.app_context():``.

        :param data: a ``str`` is sent as it is, a :class:`ServerSentEvent` is itself, all else is
            sent as JSON by the app's provider.
        :param type: the event type; ``"message"`` by default.
        :param id: an id of your own instead of the broker's.
        :param retry: the reconnection time in **milliseconds**.
        :param channel: a name or several; a subscriber of two of them gets the event once.
        :param key: what the event is the newest value of. It takes the place of the one before with
            that key in the same channel: who has not got that yet gets only this one.
        :returns: the event's id.
        :raises InvalidFieldError: if a field or a channel's name is not valid, or there is both an
            ``id`` and a key.
        :raises TooLargeError: if the event is larger than ``EVENTSTREAM_MAX_EVENT_BYTES``.
        :raises BrokerUnavailableError: if the broker is Redis and does not answer, or refuses.
        :raises NotRegisteredError: if the app has no event stream.
        """
        # Written out, since this is called most often.
        try:
            names = channel if isinstance(channel, str) else channel_names(channel)
            item = data if isinstance(data, str) else _sendable(data)
            event_id = current_state().broker.publish(item, type, id, retry, names, key=key)
        except (InvalidFieldError, TooLargeError) as error:
            raise as_answer(error)  # noqa: B904  # it has this context, or is this error
        if event_published.receivers:
            _tell_of(names, [event_id])
        return event_id

    @refuses_what_is_sent
    def publish_many(
        self, events: Iterable[Any], channel: str | Iterable[str] = DEFAULT_CHANNEL
    ) -> list[str]:
        """Send some events, one after another, at less cost than one by one.

        :param events: of each, what :meth:`publish` takes as ``data``. All are looked at before the
            first one is sent.
        :param channel: a name or several; all events go to all of them.
        :returns: the events' ids.
        :raises EventStreamError: as :meth:`publish`.
        """
        names = channel if isinstance(channel, str) else channel_names(channel)
        event_ids = current_state().broker.publish_many(map(_sendable, events), names)
        if event_published.receivers:
            _tell_of(names, event_ids)
        return event_ids

    @refuses_what_is_sent
    def subscribe(
        self,
        *channels: str,
        history: int = 0,
        snapshot: Callable[[], Any] | None = None,
        presence: bool = False,
        member: str | None = None,
    ) -> EventStreamResponse:
        """Return a response that streams channels; to be returned by a view.

        The view is the authorization: who gets its response may read the channels.

        :param channels: their names; the default channel if there are none.
        :param history: for a client on its first connect, how many of the latest events of the
            channels come first.
        :param snapshot: called once the subscription is in force, on a first connect and after a
            ``reset``; what it returns is sent after history and before everything newer. It may
            return what a stream's view may yield, or ``None`` for nothing.
        :param presence: whether the client is present on the first one of the channels; see the
            page about presence for what its subscribers get.
        :param member: the name that others see of it then; by default the key of its user, else a
            random one, which begins with ``anonymous-``, for this one connection.
        :raises InvalidFieldError: if a channel's name is not valid, or the snapshot cannot be sent,
            or a member's name is not as a channel's may be.
        :raises TypeError: if there is a ``member`` without ``presence``.
        :raises TooLargeError: if there are more channels than ``EVENTSTREAM_MAX_CHANNELS``, or the
            snapshot is larger than ``EVENTSTREAM_MAX_EVENT_BYTES``.
        :raises ServiceUnavailable: 503, if the process has ``EVENTSTREAM_MAX_SUBSCRIBERS``.
        :raises TooManyRequests: 429, if the client's address or user has too many streams.
        :raises NotRegisteredError: if the app has no event stream.

        A client that returns gets exactly what it missed, or a ``reset`` event and what history
        still has. While the broker cannot be reached, the stream ends at once and clients retry.
        """
        # It is kept for longer than the request has a context.
        member = access.resolved(member)
        if member is not None and not presence:
            raise TypeError("subscribe() got a member, which needs presence=True")
        names = allowed_names(channels)
        if request.method == "HEAD":
            return EventStreamResponse(())
        state = current_state()
        return subscribed(state, self._user, names, history, snapshot, presence, member)

    def stream(
        self,
        rule: str,
        *,
        heartbeat: float | None = None,
        format: str = "sse",
        methods: Iterable[str] = ("GET", "POST"),
        **options: Any,
    ) -> Callable[[View], View]:
        """Decorate a generator view: what it yields is streamed to the client that asked.

        :param rule: the URL rule below the blueprint's prefix.
        :param heartbeat: see :class:`EventStreamResponse`; seconds.
        :param format: see :class:`EventStreamResponse`.
        :param methods: the methods; GET and POST by default.
        :param options: what else :meth:`flask.Flask.add_url_rule` takes.

        A view that returns anything but an iterator (a redirect, an error) is answered as any.
        """

        def decorate(view: View) -> View:
            @wraps(view)
            @refuses_what_is_sent
            def respond(**arguments: Any) -> Any:
                result = current_app.ensure_sync(view)(**arguments)
                if not hasattr(result, "__next__"):
                    return result
                return EventStreamResponse(result, heartbeat=heartbeat, format=format)

            self.add_url_rule(rule, view_func=respond, methods=list(methods), **options)
            return view

        return decorate

    def resumable(
        self,
        rule: str,
        *,
        owner: Callable[[], Any] | None = None,
        on_busy: str = "attach",
        heartbeat: float | None = None,
        format: str = "sse",
        **options: Any,
    ) -> Callable[[View], View]:
        """Decorate a generator view whose stream survives a lost connection: a run.

        ``POST`` starts the view on a thread or greenlet of its own and streams what it yields,
        ``GET`` resumes, also from other pages, and ``DELETE`` cancels.

        :param rule: the URL rule below the blueprint's prefix. Each URL has a run of its own, and
            the next one only once that has ended.
        :param owner: called in every request; returns whose the run is, such as the user's id: a
            ``str``, an ``int`` or a :class:`uuid.UUID`. A URL then has a run for each owner. It may
            raise an HTTP error; ``None`` is 404, and anything else a :class:`RightsError`, which is
            a 500. Without it, whoever may call the view's URL may read its run.
        :param on_busy: what a ``POST`` does while a run is active: ``"attach"`` to it, ``"reject"``
            with 409, or ``"replace"`` it, which cancels it.
        :param heartbeat: how long a ``POST`` waits for the first item before the head of its
            response leaves, in seconds; ``EVENTSTREAM_HEARTBEAT`` by default. The silences after
            that are broken as those of all subscribers.
        :param format: see :class:`EventStreamResponse`.
        :param options: what else :meth:`flask.Flask.add_url_rule` takes.
        :raises ConfigurationError: if ``on_busy``, ``heartbeat`` or ``format`` cannot be used.
        :raises TypeError: if the view is no generator function, whose code would run for those who
            only return, too.

        The view's decorators (``@login_required``) are asked in every request. See the page about
        runs for what clients get.
        """

        def decorate(view: View) -> View:
            respond = Resumable(view, owner, on_busy, heartbeat, format, self._user)
            options.setdefault("endpoint", view.__name__)
            self.add_url_rule(rule, view_func=respond, methods=METHODS, **options)
            return view

        return decorate

    @refuses_what_is_sent
    def last_event_id(self, channel: str = DEFAULT_CHANNEL) -> str:
        """Return the cursor of this moment, for a page to connect from.

        A page that is rendered with it and connects to ``/stream?lastEventId=…`` misses nothing
        that is published in between.
        """
        return current_state().broker.last_event_id(channel)

    @refuses_what_is_sent
    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscribers a channel has, or the whole broker without a channel.

        :raises InvalidFieldError: if the channel's name is not valid.
        """
        return current_state().broker.subscriber_count(channel)

    @refuses_what_is_sent
    def present(self, channel: str = DEFAULT_CHANNEL) -> list[str]:
        """Return the names of those who are present on a channel, sorted; of all processes.

        :raises InvalidFieldError: if the channel's name is not valid.
        :raises BrokerUnavailableError: if the broker is Redis and does not answer, or refuses.
        """
        channel_names(channel)
        return current_state().members.present(channel)[1]

    @refuses_what_is_sent
    def disconnect(self, channel: str) -> int:
        """End every stream that reads a channel, and return how many there were.

        Browsers reconnect after their ``retry``, and are asked for their rights anew.

        :raises InvalidFieldError: if the channel's name is not valid.
        """
        return current_state().broker.disconnect(channel)

    def health(self) -> tuple[dict[str, Any], int, dict[str, str]]:
        """Tell whether the broker answers: a view for ``app.add_url_rule("/health", …)``.

        :returns: 200 with ``{"status": "ok"}`` and the ``seconds`` that the broker took to answer,
            or within 5 seconds 503 with ``{"status": "unavailable"}`` and the ``reason``. Both with
            the ``broker``, without its secrets, and the number of ``subscribers`` of this process.
        """
        return *current_state().health(), {"Cache-Control": "no-store"}

    def _channels(self) -> EventStreamResponse:
        state, judges = current_state(), self._judges()
        try:
            token = access.token_of_view(bool(judges), state.revocations)
        except BrokerUnavailableError as error:
            return come_again(state.config, error)
        signed_for = token.channels if token is not None else ()
        names = access.requested_channels(state.config.max_channels, signed_for)
        access.check_may_read([name for name in names if name not in signed_for], judges)
        return self.subscribe(*names)

    def _script(self, name: str) -> Response:
        source = (_STATIC / name).read_bytes()
        response = current_app.response_class(source, mimetype="text/javascript")
        # Asked for anew each time: the two modules need each other, and this version of the server.
        # Their tag is of what they are, and so the same on all machines.
        response.cache_control.no_cache = True
        response.add_etag()
        response.make_conditional(request)
        return response

    def _install(self, setup: BlueprintSetupState) -> None:
        extensions = setup.app.extensions
        if "eventstream" not in extensions:
            extensions["eventstream"] = new_state(setup.app)
        extensions["eventstream"].blueprints.append(self)


def _sendable(data: Any) -> Any:
    return data if isinstance(data, (str, ServerSentEvent)) else to_json(data, json_dumps())


def _tell_of(names: str | tuple[str, ...], event_ids: list[str]) -> None:
    for event_id in event_ids:
        event_published.send(app_in_use(), channels=channel_names(names), id=event_id)


eventstream = EventStream("eventstream", __name__)
"""A blueprint that is ready to be registered."""
