"""Why subscribers' streams end: the words that logs, signals and metrics have for it."""

from __future__ import annotations

LEFT = "left"
"""The client has closed the connection, or it broke."""

VANISHED = "vanished"
"""The client's machine has not answered for ``EVENTSTREAM_MAX_LAG`` seconds, that of a member for
half of ``EVENTSTREAM_HEARTBEAT``."""

LAGGED = "lagged"
"""The client has taken less than what came, for too long."""

EXPIRED = "expired"
"""It was opened for this long: the right to read has ended, or ``EVENTSTREAM_MAX_LIFETIME``."""

REVOKED = "revoked"
"""The rights of its user were revoked."""

ENDED = "ended"
"""There is nothing more to come: ``disconnect``, or the end of a run."""

REFUSED = "refused"
"""Subscribers have as many threads of the server as they may, and the hub could not take it."""

STOPPED = "stopped"
"""The server stops."""

FAILED = "failed"
"""The hub had an error, which is in the log."""

ABNORMAL = (VANISHED, LAGGED, FAILED)
"""What operators want to hear of, each time."""

REASONS = (LEFT, VANISHED, LAGGED, EXPIRED, REVOKED, ENDED, REFUSED, STOPPED, FAILED)
"""Why a subscriber's stream has ended."""
