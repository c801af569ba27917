"""The connections to Redis: who waits for an answer waits no longer than agreed."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .config import is_well_formed, without_secrets
from .errors import BrokerUnavailableError, ConfigurationError
from .redis_scripts import MINTED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .redis_scripts import Script

    T = TypeVar("T")

KEY_PREFIX = "eventstream:"
"""What the names of all keys in Redis begin with, unless told otherwise."""

DOUBT_SECONDS = 10
"""For how long a call that failed, made again, is taken for the same one, in seconds."""

_LONGEST_PAUSE = 0.2
_MOST_LEFT_OUT = 1000
_ECHO = ", with args beginning with"
"""What follows in an answer of Redis is of the command that it does not know, AUTH for one."""

_NO_CALL = (None, "", 0.0)
_logger = logging.getLogger(__name__)

StrictRedis: Any = redis.StrictRedis
"""redis-py's client, for those who are to have one: users of Flask-SSE."""

LOST = (redis.RedisError, OSError)
"""What a connection raises that is lost, that could not be made, or that is refused something."""


_FORM = (
    "cannot be used: it is not of the form redis://user:key@host:port/0 or unix:///path; write / "
    "as %2F, ? as %3F, # as %23 and @ as %40 in what comes before the host, and in the query"
)


def made_of(url: str, make: Callable[[str], T]) -> T:
    """Return what a function of redis-py makes of a URL.

    :param url: the URL.
    :param make: the function.
    :raises ConfigurationError: if it cannot be used. It does not tell what it must not, and has no
        cause, whose text could.
    """
    reason = _FORM
    if is_well_formed(url):
        try:
            return make(url)
        except (TypeError, ValueError, redis.RedisError) as error:
            kind = type(error).__name__
            reason = f"cannot be used: redis-py refuses its port or an option in its query ({kind})"
    raise ConfigurationError("url", without_secrets(url), reason)


def told(error: BaseException) -> str:
    """Return what may be shown of an error of redis-py's."""
    return str(error).partition(_ECHO)[0]


class MintedIdError(Exception):
    """A publisher's own id has the form of those that events get by their number.

    :param id: the id.
    """

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id


class Repeats:
    """Knows a call that failed when the same thread or greenlet makes it again.

    :param seconds: for how long it is taken for the same one, in seconds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failed = threading.local()

    def begin(self, call: object) -> tuple[str, bool]:
        """Return the nonce of a call, and whether it may have been done already."""
        # The nonce stays with the call until Redis has confirmed it. If the answer was lost,
        # whoever tries again must not publish twice.
        now = time.monotonic()
        failed, nonce, until = getattr(self._failed, "call", _NO_CALL)
        is_doubtful = now < until and failed == call
        if not is_doubtful:
            nonce = secrets.token_hex(8)
        self._failed.call = call, nonce, now + self._seconds
        return nonce, is_doubtful

    def end(self) -> None:
        """Forget the call: it was done."""
        self._failed.call = _NO_CALL


class RedisLink:
    """A small pool of connections, for commands that are answered at once.

    :param url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads it.
    :param timeout: how long a call takes at most, in seconds.
    :param max_connections: how many connections there are at most.
    :ivar address: the URL without user and password.
    :ivar database: the number of the database.
    :ivar patience: how long an attempt waits for its answer, in seconds.
    """

    def __init__(self, url: str, timeout: float, max_connections: int) -> None:
        self._timeout = timeout
        self.patience = timeout / 4
        options: dict[str, Any] = {
            # An attempt that begins in the first half may connect and wait, each for a quarter.
            "socket_timeout": self.patience,
            "socket_connect_timeout": self.patience,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        options.update(max_connections=max_connections, timeout=self.patience)
        self._pool: Any = made_of(url, lambda url: _pool_of(url, options))
        self.address = without_secrets(url)
        self.database = int(self._pool.connection_kwargs.get("db") or 0)
        self._redis: Any = redis.Redis(connection_pool=self._pool)
        self._left_out: set[bytes] = set()

    def call(
        self,
        script: Script,
        keys: Sequence[bytes],
        arguments: Callable[[bool], Sequence[Any]],
        begin: float | None = None,
    ) -> Any:
        """Run a script, more than once if need be.

        :param script: the script.
        :param keys: its keys.
        :param arguments: returns its arguments; is told whether it may have run already.
        :param begin: from when on the time counts, by :func:`time.monotonic`; now by default.
        :raises BrokerUnavailableError: if Redis did not answer in time, or refused.
        :raises MintedIdError: if the script says so.
        """

        def run(is_repeated: bool) -> Any:
            values = (len(keys), *keys, *arguments(is_repeated))
            try:
                return self._redis.evalsha(script.sha, *values)
            except redis.exceptions.NoScriptError:
                return self._redis.eval(script.text, *values)

        return self._attempt(run, begin)

    def call_many(
        self,
        script: Script,
        calls: Sequence[tuple[Sequence[bytes], Sequence[Any]]],
        begin: float | None = None,
    ) -> list[Any]:
        """Run a script more than once in one go, and return what each has replied.

        It must do no harm if it is run once more with the same keys and arguments.

        :param script: the script.
        :param calls: of each, its keys and its arguments.
        :param begin: see :meth:`call`.
        :raises BrokerUnavailableError: as :meth:`call`.
        """
        commands = [
            ("EVALSHA", script.sha, len(keys), *keys, *arguments) for keys, arguments in calls
        ]
        try:
            return self.pipeline(commands, begin)
        except BrokerUnavailableError as error:
            if not isinstance(error.__cause__, redis.exceptions.NoScriptError):
                raise
        # A new server, or one that was restarted. One call with the whole text, and it has it.
        keys, arguments = calls[0]
        self.pipeline([("EVAL", script.text, len(keys), *keys, *arguments)], begin)
        return self.pipeline(commands, begin)

    def pipeline(
        self, commands: Sequence[tuple[Any, ...]], begin: float | None = None
    ) -> list[Any]:
        """Run some commands that do no harm if they are run twice, and return their results.

        :param commands: the commands.
        :param begin: see :meth:`call`.
        :raises BrokerUnavailableError: if Redis did not answer in time, or refused.
        """

        return self._attempt(lambda _: self._run(commands), begin)

    def read(self, commands: Sequence[tuple[Any, ...]], begin: float | None = None) -> list[Any]:
        """Run some commands that read, and return their results: ``None`` of a key that is foreign.

        :param commands: the commands.
        :param begin: see :meth:`call`.
        :raises BrokerUnavailableError: as :meth:`pipeline`.
        """

        def run(_: bool) -> list[Any]:
            results = self._run(commands, raise_on_error=False)
            return [*map(self._readable, commands, results)]

        return self._attempt(run, begin)

    def _run(self, commands: Sequence[tuple[Any, ...]], raise_on_error: bool = True) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            results: list[Any] = pipeline.execute(raise_on_error)
            return results

    def _readable(self, command: tuple[Any, ...], result: Any) -> Any:
        if not isinstance(result, redis.RedisError):
            return result
        if "WRONGTYPE" not in str(result):
            raise result
        self.leave_out(command[1])
        return None

    def leave_out(self, key: bytes) -> None:
        """Log, once for each key, that what somebody has written there is left out.

        :param key: the name of the key, or of the messages.
        """
        if key in self._left_out:
            return
        if len(self._left_out) >= _MOST_LEFT_OUT:
            self._left_out.clear()
        self._left_out.add(key)
        # Without what it is, which may be anything.
        _logger.warning("What Redis has at %r could not be read, and is left out", key)

    def ping(self) -> float:
        """Ask for an answer, once, and return how long it took, in seconds.

        :raises BrokerUnavailableError: as :meth:`pipeline`.
        """
        begin = time.monotonic()
        self.pipeline([("PING",)], begin=-math.inf)
        return time.monotonic() - begin

    def info(self) -> dict[str, Any]:
        """Return what the server says of itself and of its memory.

        :raises BrokerUnavailableError: as :meth:`pipeline`.
        """
        server, memory = self.pipeline([("INFO", "server"), ("INFO", "memory")])
        return {**server, **memory}

    def _attempt(self, act: Callable[[bool], T], begin: float | None) -> T:
        last_start = (time.monotonic() if begin is None else begin) + self._timeout / 2
        pause = 0.0
        while True:
            try:
                return act(pause > 0)
            except (redis.AuthenticationError, redis.ResponseError) as error:
                raise self._refusal(error) from (None if _ECHO in str(error) else error)
            except (redis.ConnectionError, redis.TimeoutError, OSError, ValueError) as error:
                # A ValueError is what a socket raises that close() has closed meanwhile.
                pause = min(_LONGEST_PAUSE, pause * 2 or 0.01)
                if time.monotonic() + pause > last_start:
                    reason = f"no answer within {self._timeout:g} s: {error}"
                    raise BrokerUnavailableError(self.address, reason) from error
            time.sleep(pause)

    def _refusal(self, error: Exception) -> Exception:
        code, _, id = str(error).partition(" ")
        if code == MINTED:
            return MintedIdError(id)
        return BrokerUnavailableError(self.address, f"refused: {told(error)}", is_refusal=True)

    def listen(self) -> Listener:
        """Return a connection of its own for messages, not connected yet."""
        return Listener(self._pool.connection_class(**self._pool.connection_kwargs))

    def close(self) -> None:
        """Close the connections of the pool."""
        self._pool.disconnect()


def _pool_of(url: str, options: dict[str, Any]) -> Any:
    pool: Any = redis.BlockingConnectionPool.from_url(url, **options)
    # What redis-py does not know it refuses only here.
    pool.connection_class(**pool.connection_kwargs)
    return pool


class Listener:
    """A connection to Redis that hears messages. One thread or greenlet uses it.

    All it does raises one of :data:`LOST` once the connection is lost.

    :param connection: redis-py's.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.connect = connection.connect
        self.close = connection.disconnect

    def send(self, command: str, names: Sequence[bytes]) -> None:
        """Send a command that is answered by messages."""
        self._connection.send_command(command, *names, check_health=False)

    def has_message(self, timeout: float) -> bool:
        """Tell whether there is a message within some seconds."""
        return bool(self._connection.can_read(timeout=timeout))

    def read(self) -> list[Any]:
        """Return the next message: its kind, the name that it came by, and what it says."""
        message: list[Any] = self._connection.read_response()
        return message
