"""The broker that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import without_secrets
from .errors import ConfigurationError
from .memory_broker import MemoryBroker

if TYPE_CHECKING:
    from .config import Config
    from .local_broker import LocalBroker

_REDIS = ("redis://", "rediss://", "unix://")
_URL = "EVENTSTREAM_BROKER_URL"


def new_broker(config: Config) -> LocalBroker:
    """Return a broker as a configuration wants it.

    :raises ConfigurationError: if there is none for its URL, or if redis-py is not installed.
    """
    options: dict[str, Any] = {
        "history": config.history,
        "history_seconds": config.history_seconds,
        "max_event_bytes": config.max_event_bytes,
        "max_lag": config.max_lag,
        "max_run_bytes": config.max_run_bytes,
        "max_idle_bytes": config.max_idle_bytes,
    }
    if config.broker_url == "memory://":
        return MemoryBroker(**options)
    if config.broker_url.startswith(_REDIS):
        return _new_redis_broker(config, options)
    reason = f"names no broker that there is; use 'memory://' or {', '.join(_REDIS)}"
    raise ConfigurationError(_URL, without_secrets(config.broker_url), reason)


def _new_redis_broker(config: Config, options: dict[str, Any]) -> LocalBroker:
    try:
        # Only who uses Redis has to have its client.
        from .redis_broker import RedisBroker
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        reason = "needs redis-py; pip install 'flask-eventstream[redis]'"
        raise ConfigurationError(_URL, without_secrets(config.broker_url), reason) from error
    try:
        return RedisBroker(config.broker_url, key_prefix=config.key_prefix, **options)
    except ConfigurationError as error:
        raise ConfigurationError(_URL, error.value, error.reason) from error
