"""What can go wrong, with the evidence: which value, which limit, what to do."""

from __future__ import annotations


class EventStreamError(Exception):
    """The parent of every error that this package raises on purpose."""


class InvalidFieldError(EventStreamError, ValueError):
    """A value that no event stream can carry, refused at the call that brought it.

    :param field: what was wrong: ``"data"``, ``"type"``, ``"id"``, ``"retry"``, ``"channel"`` or
        ``"member"``.
    :param value: the refused value.
    :param reason: what is wrong with it and what to do, as the end of a sentence.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field}={_shown(value)} {reason}")
        self.field = field
        self.value = value
        self.reason = reason


class TooLargeError(EventStreamError, ValueError):
    """Something is larger than its limit: an event, unfinished data, a number of channels.

    :param field: what is too large.
    :param value: its size.
    :param limit: the largest size allowed.
    :param advice: what to do about it, as a sentence.
    """

    def __init__(self, field: str, value: int, limit: int, advice: str) -> None:
        super().__init__(f"{field} is {value:,}, and at most {limit:,} is allowed. {advice}")
        self.field = field
        self.value = value
        self.limit = limit
        self.advice = advice


class ConfigurationError(EventStreamError, ValueError):
    """A configuration value that cannot be used.

    :param key: the configuration key.
    :param value: the refused value.
    :param reason: what is allowed, as the end of a sentence.
    """

    def __init__(self, key: str, value: object, reason: str) -> None:
        super().__init__(f"{key}={_shown(value)} {reason}")
        self.field = key
        self.value = value
        self.reason = reason


class RightsError(EventStreamError, TypeError):
    """Something that an app says of rights decides nothing, so nothing is opened.

    :param what: what the app says: what a function returned, or an argument.
    :param value: the refused value. Only its class is shown, since it may be anything.
    :param advice: what to say instead, as the end of a sentence.
    """

    def __init__(self, what: str, value: object, advice: str) -> None:
        is_plain = value is None or value == ""
        kind = repr(value) if is_plain else f"of the class {type(value).__qualname__}"
        super().__init__(f"{what} is {kind}; {advice}")
        self.field = what
        self.value = value


class NotRegisteredError(EventStreamError, RuntimeError):
    """The current app has no event stream blueprint."""

    def __init__(self, app_name: str) -> None:
        super().__init__(
            f"app {app_name!r} has no event stream; call app.register_blueprint(eventstream) first"
        )
        self.value = app_name


class BrokerClosedError(EventStreamError, RuntimeError):
    """The broker was closed, so nothing can be published or subscribed to any more."""

    def __init__(self) -> None:
        super().__init__("the broker is closed; create a new one")


class BrokerUnavailableError(EventStreamError, ConnectionError):
    """The broker's server did not answer in time, or refused.

    What was to be published counts as not published. If it was all the same, because only the
    answer was lost, then the same call again, made next by the same thread or greenlet within ten
    seconds, finds it and does not publish it twice.

    :param address: where the server is.
    :param reason: what happened, as a sentence without its full stop.
    :param is_refusal: whether the server did answer, and refused: it is full, or only to be read.
    :ivar published: the ids of those events of a batch that were published before.
    """

    def __init__(self, address: str, reason: str, is_refusal: bool = False) -> None:
        advice = "See to the server" if is_refusal else "Is it running, and is this its URL?"
        super().__init__(f"{address}: {reason.rstrip('.')}. {advice}")
        self.value = address
        self.is_refusal = is_refusal
        self.published: list[str] = []


def _shown(value: object) -> str:
    # A refused value may be a megabyte long; an error message must not be.
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text):,} characters)"
