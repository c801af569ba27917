"""What an app says of who may read what: its functions, its tokens, and what it revokes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from flask import Blueprint, current_app

from . import access
from .broker import DEFAULT_CHANNEL, channel_names
from .errors import TooLargeError
from .opening import current_token
from .refusals import refuses_what_is_sent
from .state import current_state
from .tokens import new_token, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .access import Authority
    from .tokens import Token

    MayRead = TypeVar("MayRead", bound=Callable[[str], bool] | Authority)
    Identify = TypeVar("Identify", bound=Callable[[], Any])


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
        self._authority: Any = None
        self._identify: Callable[[], Any] | None = None

    def authorize(self, may_read: MayRead) -> MayRead:
        """Decorate the function that tells whether the current request may read a channel.

        :param may_read: the function, or an object with a method ``may_read(channel)`` and, if it
            has one, a method ``user()`` that does what :meth:`identify` says.

        It is asked for each channel at every connect and reconnect, before anything is replayed.
        It returns a ``bool``, or raises an HTTP error of its own; ``False`` is 403. The app's other
        blueprints ask it too, unless they have one of their own. It is not asked about the channels
        of a :meth:`token`.
        """
        self._authority = may_read
        return may_read

    def identify(self, function: Identify) -> Identify:
        """Decorate the function that tells whose the current request is.

        It returns a key, such as the user's id, of which the text counts, or ``None``. By that key
        streams are limited and revoked, whichever view opens them. The user of a :meth:`token`
        goes before it. The app's other blueprints ask it too, unless they have one of their own.
        """
        self._identify = function
        return function

    @refuses_what_is_sent
    def token(self, *channels: str, max_age: float = 3600, user: Any = None, **claims: Any) -> str:
        """Sign the right to read some channels, and return the token: text that is safe in a URL.

        The ready-made view takes it as ``Authorization: Bearer …`` or ``?token=…``, your own views
        by :meth:`current_token`. Everybody can read what it says, nobody can change it.

        :param channels: their names; the default channel if there are none.
        :param max_age: how long it is valid, in seconds; at most 30 days. Streams end with it.
        :param user: the key of its user, of which the text counts; see :meth:`revoke`.
        :param claims: what else it is to say, as JSON can express it.
        :raises InvalidFieldError: if a channel's name is not valid, or JSON cannot express a claim.
        :raises TooLargeError: if there are more channels than ``EVENTSTREAM_MAX_CHANNELS``.
        :raises ConfigurationError: if the app has no ``SECRET_KEY``, or ``max_age`` cannot be used.
        """
        key = None if user is None else str(user)
        token = new_token(allowed_names(channels), max_age, key, claims)
        return signed(token, access.signing_keys())

    def current_token(self) -> Token:
        """Return what the token of the current request says, for views of your own.

        A stream of a channel or a run that this request opens ends when the token expires, and
        belongs to its user.

        :raises Unauthorized: 401, if there is none, or it is changed, expired or revoked.
        """
        return current_token(current_state())

    def revoke(self, user: Any) -> None:
        """End every stream of a user, in all processes, and refuse all tokens issued to it so far.

        Other processes follow within two seconds. Browsers reconnect, and are asked for their
        rights anew. Tokens that are issued from now on are valid.

        :param user: the user's key, as :meth:`identify` or :meth:`token` have it.
        :raises BrokerUnavailableError: if the broker is Redis and does not answer, or refuses.
            Then it is in force in this process only, or also in others; call it again.
        """
        current_state().revocations.revoke(str(user))

    def _judges(self) -> list[Callable[[str], bool]]:
        return [*map(access.judge_of, self._those_of_all(lambda one: one._authority))]

    def _user(self) -> str | None:
        for identify in self._those_of_all(lambda one: one._identify or one._user_of_authority):
            key = current_app.ensure_sync(identify)()
            if key is not None:
                return str(key)
        return None

    @property
    def _user_of_authority(self) -> Any:
        return getattr(self._authority, "user", None)

    def _those_of_all(self, of: Callable[[Rights], Any]) -> list[Any]:
        # All blueprints of an app serve the same channels. One that is there for its generator
        # views must not open what another one guards.
        own = of(self)
        found = [own] if own is not None else map(of, current_state().blueprints)
        return [one for one in found if one is not None]


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
