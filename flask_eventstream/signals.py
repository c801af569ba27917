"""Signals, sent with the app as sender (see Flask's documentation, "Signals").

``subscriber_connected``
    A subscription is in force. Arguments: ``channels``, a tuple of names, ``last_event_id``, the
    cursor that the client came with, or ``None``, and ``connection``, which tells this stream from
    all others.

``subscriber_disconnected``
    A subscription has ended, whoever ended it, and is off the books. Arguments: ``channels``,
    ``connection``, and ``reason``, see :data:`flask_eventstream.endings.REASONS`. It is sent by the
    server's clean-up, outside of any request or app context.

``event_published``
    :meth:`EventStream.publish` has published. Arguments: ``channels`` and ``id``.

What a receiver raises reaches the caller that the signal came from, as with Flask's own signals.
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

subscriber_connected = _signals.signal("eventstream-subscriber-connected")
subscriber_disconnected = _signals.signal("eventstream-subscriber-disconnected")
event_published = _signals.signal("eventstream-event-published")
