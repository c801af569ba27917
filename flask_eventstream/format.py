"""How the items of a generator stream, its end and its failure become bytes.

Three formats: the event stream with this package's own ``end`` and ``stream-error`` events, and two
for clients that know neither: OpenAI's API's, and that of Vercel's AI SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .event import HEARTBEAT, ServerSentEvent, encode_data, to_json, with_id

if TYPE_CHECKING:
    from collections.abc import Callable

FINISHED_ID = "end"
"""The id of a stream's last event. A browser reconnects when a stream ends, and sends it back."""

FAILED = "stream-error"
"""The type of the last event of a stream that failed."""


class StreamFormat:
    """The event stream: items as ``message`` events, then ``end`` or ``stream-error``.

    :param dumps: turns items that are not text into JSON.
    :param max_bytes: the largest event allowed, in bytes.
    """

    def __init__(self, dumps: Callable[[Any], str], max_bytes: int) -> None:
        self._dumps = dumps
        self._max_bytes = max_bytes

    def encode(self, item: Any) -> bytes:
        """Return the wire of one item of a view.

        :param item: a ``str`` is sent as it is, ``None`` is a heartbeat, a ``ServerSentEvent`` is
            itself, and everything else is sent as JSON.
        :raises InvalidFieldError: if it is ``bytes``, or nothing that JSON can express.
        :raises TooLargeError: if the event is larger than allowed.
        """
        if item.__class__ is str:
            return encode_data(item, self._max_bytes)
        if item is None:
            return HEARTBEAT
        if isinstance(item, ServerSentEvent):
            return item.encode(self._max_bytes)
        text = ServerSentEvent(item).data if isinstance(item, str) else to_json(item, self._dumps)
        return encode_data(text, self._max_bytes)

    def encode_with_id(self, item: Any, id: str) -> bytes:
        """Return the wire of one item, not ``None``, with an id, also in place of its own.

        :raises EventStreamError: as :meth:`encode`.
        """
        if isinstance(item, ServerSentEvent):
            return item.with_id(id).encode(self._max_bytes)
        return with_id(self.encode(item), id.encode())

    def last(self, type: str, message: str = "") -> ServerSentEvent:
        """Return the event that ends a stream, without its id.

        :param type: ``"end"``, or what has ended it before: ``"stream-error"``, and of a run
            ``"cancelled"`` or ``"lost"``.
        :param message: what clients may know of it, as a sentence.
        """
        return ServerSentEvent({"message": message} if message else {}, type)

    def end(self) -> bytes:
        """Return the last event of a stream that is complete."""
        return self.last("end").with_id(FINISHED_ID).encode()

    def error(self, message: str) -> bytes:
        """Return the last event of a stream that failed.

        It has the id of the end too: running the view again without being asked is as wrong after
        a failure as it is after success.
        """
        return self.last(FAILED, message).with_id(FINISHED_ID).encode()

    def stopped(self, farewell: bytes) -> bytes:
        """Return what a stream ends with whose server stops.

        :param farewell: a line that says when the client returns, and no event: without an end,
            browsers return by themselves.
        """
        return farewell


class OpenAIFormat(StreamFormat):
    """What OpenAI's API sends: ``data: {...}``, then ``data: [DONE]`` or an ``error`` object."""

    def last(self, type: str, message: str = "") -> ServerSentEvent:
        """Return the line that OpenAI's clients stop at, or an error as the API has it."""
        if type == "end":
            return ServerSentEvent("[DONE]")
        code = None if type == FAILED else type
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        return ServerSentEvent({"error": error})

    def end(self) -> bytes:
        """Return the last event of a stream that is complete, which has no id there."""
        return self.last("end").encode()

    def error(self, message: str) -> bytes:
        """Return the last event of a stream that failed."""
        return self.last(FAILED, message).encode()

    def stopped(self, farewell: bytes) -> bytes:
        """Return an error: these clients take a stream that only stops for complete."""
        return self.last("server_stopped", "The server stops. Please try again.").encode()


class AISDKFormat(OpenAIFormat):
    """What ``useChat`` of Vercel's AI SDK reads: it ends as OpenAI's, and has errors as parts."""

    def last(self, type: str, message: str = "") -> ServerSentEvent:
        """Return the line that ends a message, or the part that fails it."""
        if type == "end":
            return super().last(type)
        return ServerSentEvent({"type": "error", "errorText": message})


def stream_format(name: str, dumps: Callable[[Any], str], max_bytes: int) -> StreamFormat:
    """Return the format with a name: ``"sse"``, ``"openai"`` or ``"ai-sdk"``.

    :raises ConfigurationError: if there is no such format.
    """
    formats = {"sse": StreamFormat, "openai": OpenAIFormat, "ai-sdk": AISDKFormat}
    if name not in formats:
        raise ConfigurationError("format", name, "is unknown; use 'sse', 'openai' or 'ai-sdk'")
    return formats[name](dumps, max_bytes)
