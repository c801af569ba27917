"""What an app says of who may read what: its functions, its tokens, and what it revokes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Blueprint, current_app

from . import access
from .broker import DEFAULT_CHANNEL, channel_names
from .errors import RightsError, TooLargeError
from .opening import current_token
from .refusals import refuses_what_is_sent
from .state import app_in_use, current_state
from .tokens import new_token, signed

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from flask.sansio.app import App

    from .access import Authority
    from .state import State
    from .tokens import Token

    MayRead = TypeVar("MayRead", bound=Callable[[str], bool] | Authority)
    Identify = TypeVar("Identify", bound=Callable[[], Any])


_TOLD = "eventstream.told"


class PerApp:
    """What a blueprint is told by a decorator, for each app that it is registered with.

    * What is told before an app registers is that app's, and that of those which come later, until
      something else is told.
    * What is told behind the registration of an app that has nothing yet is for this one alone; if
      having nothing opens everything, for each app that has nothing.
    * What is told while the newest app has something already is for the next one that registers.
      Until there is one, the newest app goes by it.

    An app keeps what it was told itself, so that nothing here keeps an app.
    """

    def __init__(self) -> None:
        self._next: Any = None
        self._registered: list[weakref.ref[App]] = []

    def tell(self, value: Any, *, is_open: bool = False) -> None:
        """Take what a decorator was given.

        :param value: what it was given.
        :param is_open: whether an app that has nothing opens everything.
        """
        newest = self._newest
        if newest is None or newest.extensions[_TOLD][self] is not None:
            self._next = value
            return
        for app in [one() for one in self._registered] if is_open else [newest]:
            if app is not None and app.extensions[_TOLD][self] is None:
                app.extensions[_TOLD][self] = value

    @property
    def _newest(self) -> App | None:
        return self._registered[-1]() if self._registered else None

    def register(self, app: App) -> None:
        """Take note of an app that registers."""
        told = app.extensions.setdefault(_TOLD, {})
        if self not in told:
            told[self] = self._next
            alive = [one for one in self._registered if one() is not None]
            self._registered = [*alive, weakref.ref(app)]

    def of(self, app: App) -> Any:
        """Return what holds for an app; ``None`` if it was told nothing."""
        own = app.extensions.get(_TOLD, {}).get(self, self._next)
        return self._next if app is self._newest and self._next is not None else own


class Rights(Blueprint):
    """A blueprint that knows who may read what; :class:`EventStream` is one.

    :param name: the blueprint's name.
    :param import_name: the name of the module that it belongs to.
    :param options: what else a :class:`flask.Blueprint` takes.
    :cvar is_open: whether all channels are open to everybody as long as nobody judges.
    """

    is_open = False

    def __init__(self, name: str, import_name: str, **options: Any) -> None:
        super().__init__(name, import_name, **options)
        self._authority = PerApp()
        self._identify = PerApp()

    def register(self, app: App, options: dict[str, Any]) -> None:
        """Register with an app; see :meth:`flask.Flask.register_blueprint`.

        :raises ConfigurationError: if a value of the configuration cannot be used.
        """
        super().register(app, options)
        self._set_up(app)
        self._authority.register(app)
        self._identify.register(app)

    def _set_up(self, app: App) -> None:
        """Do what else it takes; an app where that fails is not registered."""

    def authorize(self, may_read: MayRead) -> MayRead:
        """Decorate the function that tells whether the current request may read a channel.

        :param may_read: the function, or an object with a method ``may_read(channel)`` and, if it
            has one, a method ``user()`` that does what :meth:`identify` says.

        It is asked for each channel at every connect and reconnect, before anything is replayed.
        It returns a ``bool``, or raises an HTTP error of its own; ``False`` is 403. Anything else,
        ``None`` too, is a :class:`RightsError`, which is a 500, and opens nothing. The app's other
        blueprints ask it too, unless they have one of their own. It is not asked about the channels
        of a :meth:`token`.

        One blueprint may serve several apps, as the ready-made one does. Each app has a function of
        its own: the one that was given last when it registered, else the first one that was
        given between its registration and that of the next app. What is given while the newest app
        has one replaces it until another app registers, whose function it then is. An app that
        has none opens the default channel alone.

        :raises TypeError: if it is neither a function nor such an object.
        """
        if not (callable(may_read) or hasattr(may_read, "may_read")):
            raise TypeError(f"{may_read!r} is no function, and has no method may_read()")
        self._authority.tell(may_read, is_open=self.is_open)
        return may_read

    def identify(self, function: Identify) -> Identify:
        """Decorate the function that tells whose the current request is.

        It returns a key, such as the user's id: a ``str``, an ``int`` or a :class:`uuid.UUID`, of
        which the text counts, or ``None`` for nobody. Anything else is a :class:`RightsError`,
        which is a 500. By that key streams are limited and revoked, whichever view opens them. The
        user of a :meth:`token` goes before it. The app's other blueprints ask it too, unless they
        have one of their own. Where a blueprint serves several apps, each has its own, by the rules
        of :meth:`authorize`.

        :raises TypeError: if it is no function.
        """
        if not callable(function):
            raise TypeError(f"{function!r} is no function")
        self._identify.tell(function)
        return function

    @refuses_what_is_sent
    def token(
        self,
        *channels: str,
        max_age: float = 3600,
        user: str | int | UUID | None = None,
        **claims: Any,
    ) -> str:
        """Sign the right to read some channels, and return the token: text that is safe in a URL.

        The ready-made view takes it as ``Authorization: Bearer …`` or ``?token=…``, your own views
        by :meth:`current_token`. Everybody can read what it says, nobody can change it.

        :param channels: their names; the default channel if there are none.
        :param max_age: how long it is valid, in seconds; at most 30 days. Streams end with it.
        :param user: the key of its user, of which the text counts; see :meth:`revoke`. ``None`` for
            nobody.
        :param claims: what else it is to say, as JSON can express it.
        :raises RightsError: if the user is anything else, a user object for one.
        :raises InvalidFieldError: if a channel's name is not valid, or JSON cannot express a claim.
        :raises TooLargeError: if there are more channels than ``EVENTSTREAM_MAX_CHANNELS``.
        :raises ConfigurationError: if the app has no ``SECRET_KEY``, or ``max_age`` cannot be used.
        """
        key = access.key_of("the user of the token", user)
        token = new_token(allowed_names(channels), max_age, key, claims)
        return signed(token, access.signing_keys())

    def current_token(self) -> Token:
        """Return what the token of the current request says, for views of your own.

        A stream of a channel or a run that this request opens ends when the token expires, and
        belongs to its user.

        :raises Unauthorized: 401, if there is none, or it is changed, expired or revoked.
        """
        return current_token(current_state())

    def revoke(self, user: str | int | UUID) -> None:
        """End a user's streams of channels and runs, everywhere, and refuse its tokens so far.

        Other processes follow within two seconds. Browsers reconnect, and are asked for their
        rights anew. Tokens that are issued from now on are valid. Generator streams go on, as do
        the producers of runs: nothing but their view knows whose they are. A view that streams for
        long looks itself, or yields less in one response.

        :param user: the user's key, as :meth:`identify` or :meth:`token` have it.
        :raises RightsError: if it is no key, or ``None``.
        :raises BrokerUnavailableError: if the broker is Redis and does not answer, or refuses.
            Then it is in force in this process only, or also in others; call it again.
        """
        key = access.key_of("the user to be revoked", user)
        if key is None:
            raise RightsError(
                "the user to be revoked", None, "name the one whose streams have to end"
            )
        current_state().revocations.revoke(key)

    def _judges(self) -> list[Callable[[str], bool]]:
        return [*map(access.judge_of, self._those_of_all(Rights._authority_of))]

    def _user(self) -> str | None:
        for identify in self._those_of_all(Rights._identify_of):
            answer = current_app.ensure_sync(identify)()
            key = access.key_of("what tells whose a request is (identify)", answer)
            if key is not None:
                return key
        return None

    def _authority_of(self, app: App) -> Any:
        return self._authority.of(app)

    def _identify_of(self, app: App) -> Any:
        identify = self._identify.of(app)
        return getattr(self._authority.of(app), "user", None) if identify is None else identify

    def _those_of_all(self, of: Callable[[Rights, App], Any]) -> list[Any]:
        # All blueprints of an app serve the same channels. One that is there for its generator
        # views must not open what another one guards.
        app = app_in_use()
        own = of(self, app)
        found = [own] if own is not None else [of(one, app) for one in self._all_rights(app)]
        return [one for one in found if one is not None]

    def _all_rights(self, app: App) -> list[Rights]:
        # Flask-SSE's may be in use before the app has a configuration for it.
        state: State | None = app.extensions.get("eventstream")
        return [self] if state is None else state.blueprints


def allowed_names(channels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of some channels, or of the default channel, if they are not too many.

    :raises InvalidFieldError: if one is not valid.
    :raises TooLargeError: if there are more of them than ``EVENTSTREAM_MAX_CHANNELS``.
    """
    names = channel_names(channels or DEFAULT_CHANNEL)
    limit = current_state().config.max_channels
    if len(names) > limit:
        advice = "Publish to fewer channels, or raise EVENTSTREAM_MAX_CHANNELS."
        raise TooLargeError("the number of channels", len(names), limit, advice)
    return names
