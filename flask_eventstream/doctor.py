"""What usually breaks event streams, found before it does: settings, limits, the broker."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import without_secrets
from .errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import Config
    from .gunicorn_settings import Settings
    from .local_broker import LocalBroker

OLDEST_REDIS = [6, 2]
"""The oldest version of Redis that has what the scripts need."""

_FEW_THREADS = 8
_FEW_DESCRIPTORS = 4096
_PROXY_SECONDS = 60
_MEMORY = "memory://"


class Finding(NamedTuple):
    """One thing that was looked at.

    :param level: ``"ok"``, ``"warn"`` or ``"fail"``.
    :param what: what is so.
    :param cure: what to change, unless it is ok.
    """

    level: str
    what: str
    cure: str = ""


def check_broker(broker: LocalBroker, config: Config) -> Iterator[Finding]:
    """Look at the broker, and at the settings of its server."""
    url = without_secrets(config.broker_url)
    try:
        seconds = broker.ping()
        info = broker.server_info()
    except BrokerUnavailableError as error:
        cure = "start the server, or set EVENTSTREAM_BROKER_URL to where it is"
        yield Finding("fail", f"the broker does not answer: {error}", cure)
        return
    if config.broker_url == _MEMORY:
        yield Finding("ok", f"the broker is {url}, for one process")
        return
    yield Finding("ok", f"the broker {url} answers within {seconds:.4f} s")
    yield from check_redis(info)


def check_redis(info: dict[str, Any]) -> Iterator[Finding]:
    """Look at what Redis says of itself and of its memory (``INFO``)."""
    version, oldest = str(info["redis_version"]), ".".join(map(str, OLDEST_REDIS))
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < OLDEST_REDIS:
        cure = f"use Redis {oldest} or newer, or Valkey"
        yield Finding("fail", f"Redis is {version}, and {oldest} is the oldest that works", cure)
    else:
        yield Finding("ok", f"Redis is {version}")
    # Not every server that speaks like Redis has these.
    policy, limit = info.get("maxmemory_policy", "noeviction"), int(info.get("maxmemory", 0))
    if limit and policy != "noeviction":
        what = f"Redis throws keys away when it has {limit:,} bytes ({policy}), channels among them"
        yield Finding("warn", what, "set maxmemory-policy noeviction in redis.conf")
    else:
        yield Finding("ok", "Redis does not throw channels away")


def check_server(settings: Settings | None, config: Config) -> Iterator[Finding]:
    """Look at the server's settings: how many processes, and what an open stream takes of them.

    :param settings: those of gunicorn; ``None`` if they are not known.
    :param config: the app's.
    """
    if settings is None:
        cure = "tell how it is started: --gunicorn 'gunicorn -k gevent -w 4 app:app'"
        yield Finding("warn", "how the server runs is not known", cure)
        return
    yield from _check_processes(settings, config)
    yield from _check_workers(settings)
    if settings.max_requests:
        what = f"a worker ends after {settings.max_requests:,} requests, with all its streams"
        yield Finding("warn", what, "leave out --max-requests: all of them would have to return")


def _check_processes(settings: Settings, config: Config) -> Iterator[Finding]:
    workers = _counted(settings.workers, f"{settings.worker_class} worker")
    what = f"gunicorn has {workers}, and the broker is {without_secrets(config.broker_url)}"
    if settings.workers > 1 and config.broker_url == _MEMORY:
        what = f"{what}: what one publishes never reaches the subscribers of another"
        cure = "set EVENTSTREAM_BROKER_URL='redis://…', or run one worker process"
        yield Finding("fail", what, cure)
    else:
        yield Finding("ok", what)


def _check_workers(settings: Settings) -> Iterator[Finding]:
    cure = "with generator streams, use -k gevent, or -k gthread --threads 20"
    if settings.has_greenlets and find_spec("gevent") is None:
        what = "the workers are gevent's, and gevent is not installed here"
        yield Finding("fail", what, "pip install 'flask-eventstream[gevent]'")
    elif settings.is_sync:
        end = f", and is killed after {settings.timeout} s" if settings.timeout else ""
        what = f"a sync worker serves one request at a time: a generator stream holds it{end}"
        yield Finding("warn", what, f"fine for subscribers; {cure}")
    elif settings.has_threads and settings.threads < _FEW_THREADS:
        threads = _counted(settings.threads, "thread")
        what = f"a worker has {threads}, of which each generator stream holds one"
        yield Finding("warn", what, f"fine for subscribers; {cure}")


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def check_greenlets(settings: Settings | None, config: Config) -> Iterator[Finding]:
    """Look whether calls to Redis would hold up all greenlets. The app has been imported."""
    monkey = sys.modules.get("gevent.monkey")
    is_patched = monkey is not None and monkey.is_module_patched("socket")
    is_server_patched = settings is not None and settings.has_greenlets
    is_used = sys.modules.get("gevent") is not None and config.broker_url != _MEMORY
    if is_used and not is_patched and not is_server_patched:
        what = "gevent is imported and not patched in: calls to Redis hold up the whole process"
        cure = "call gevent.monkey.patch_all() first of all, or run gunicorn with -k gevent"
        yield Finding("warn", what, cure)


def check_descriptors(config: Config, limit: int | None, room: int | None) -> Iterator[Finding]:
    """Look at the limit of file descriptors.

    :param config: the app's.
    :param limit: how many a process may have; ``None`` for any number.
    :param room: how many subscribers that leaves room for.
    """
    if limit is None or room is None:
        yield Finding("ok", "file descriptors have no limit")
        return
    what = f"a process may have {limit:,} file descriptors: room for {room:,} subscribers"
    wanted = config.max_subscribers or 0
    if wanted > room:
        # The reserve is a tenth, and at least 100.
        enough = max(wanted + 100, wanted * 10 // 9 + 1)
        what = f"{what}, and EVENTSTREAM_MAX_SUBSCRIBERS is {wanted:,}"
        yield Finding("warn", what, f"LimitNOFILE={enough} in the systemd unit, or ulimit -n")
    elif limit < _FEW_DESCRIPTORS:
        yield Finding("warn", what, "LimitNOFILE=65536 in the systemd unit, or ulimit -n 65536")
    else:
        yield Finding("ok", what)


def check_app(config: Config, has_secret: bool) -> Iterator[Finding]:
    """Look at the app's own settings.

    :param config: the app's.
    :param has_secret: whether it has a ``SECRET_KEY``.
    """
    if config.heartbeat >= _PROXY_SECONDS:
        what = f"heartbeats come every {config.heartbeat:g} s, and nginx waits for {_PROXY_SECONDS}"
        yield Finding("warn", what, "set EVENTSTREAM_HEARTBEAT to less, such as 15")
    else:
        yield Finding("ok", f"heartbeats come every {config.heartbeat:g} s")
    if has_secret:
        yield Finding("ok", "the app has a SECRET_KEY, so tokens can be signed")
    else:
        what = "the app has no SECRET_KEY, so tokens cannot be signed"
        yield Finding("warn", what, "set SECRET_KEY, the same in all processes")


def descriptor_limit() -> int | None:
    """Return how many file descriptors a process may have; ``None`` for any number."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit
