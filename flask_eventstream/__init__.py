"""Server-Sent Events for Flask, on any WSGI server."""

from .blueprint import EventStream, eventstream
from .broker import Broker
from .errors import EventStreamError
from .event import ServerSentEvent
from .generator_stream import interval, merge
from .memory_broker import MemoryBroker
from .parser import EventStreamParser
from .response import EventStreamResponse
from .subscription import Subscription

__all__ = [
    "Broker",
    "EventStream",
    "EventStreamError",
    "EventStreamParser",
    "EventStreamResponse",
    "MemoryBroker",
    "ServerSentEvent",
    "Subscription",
    "eventstream",
    "interval",
    "merge",
]
