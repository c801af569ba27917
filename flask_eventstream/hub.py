"""The socket hub: bytes to many sockets, from one thread or greenlet.

A subscriber here is a file descriptor, a position, and what it belongs to; it costs no thread and
no greenlet. Who reads the same source from the same position is in one group: what is pending is
read once, framed once, and sent to each. The rules:

* Only the loop changes what the hub has. Others append to a queue and ring.
* No send waits. A socket that takes only a part is *lagging*: it keeps the rest of that frame, and
  once there is room it reads on from its own position, frame by frame, until it has caught up with
  its group. It never has a queue of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from . import concurrency, descriptors
from .subscriber import Group, Subscriber, framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .subscriber import Source

FRAME_BYTES = 32 * 1024
"""How many bytes are joined into one frame, unless a single event is larger."""
# Who lags has one of its own. 64 KiB were no faster, and left glibc with up to 14 MiB of holes.
_SENDS_IN_A_ROW = 100
_TICK_SECONDS = 1.0
_STOP_SECONDS = 2.0
_LAST_CHUNK = b"0\r\n\r\n"

_logger = logging.getLogger(__name__)


class SocketHub:
    """Sends what sources have to the sockets of their subscribers.

    :param watch: takes :meth:`ring`, which is called whenever a source may have news, and returns
        a function that returns the sources that have.
    :param heartbeat: the longest silence, in seconds.
    :param beat: what breaks it.
    :param max_lag: after how many seconds without a byte taken a lagging subscriber is cut off. As
        long as that, sent bytes may stay unacknowledged.

    It runs as long as it has subscribers: on a thread of its own, or on a greenlet where gevent
    runs. A forked child closes what it inherits and starts anew.
    """

    def __init__(
        self,
        watch: Callable[[Callable[[], None]], Callable[[], Iterable[Source]]],
        heartbeat: float,
        beat: bytes,
        max_lag: float,
    ) -> None:
        self._news = watch(self.ring)
        # Everybody is visited once in three quarters of the interval, a part of them at each tick,
        # and gets a beat after a quarter of silence. So the visits are spread, nobody who is busy
        # gets one, and no silence is longer than the interval.
        self._quiet = heartbeat / 4
        self._slots = max(1, round(heartbeat * 0.75 / min(_TICK_SECONDS, heartbeat / 8)))
        self._tick_seconds = heartbeat * 0.75 / self._slots
        self._beats = (beat, framed(beat, True))
        self._max_lag = max_lag
        self._reset()
        concurrency.call_after_fork(self._after_fork)

    def _reset(self) -> None:
        self._mutex = concurrency.new_mutex()
        self._is_running = False
        self._is_stopping = False
        self._watcher = descriptors.Watcher()
        self._arrived: deque[Subscriber] = deque()
        self._ending: deque[Subscriber] = deque()
        self._errands = concurrency.Errands()
        self._subscribers: dict[int, Subscriber] = {}
        self._lagging: dict[int, Subscriber] = {}
        self._groups: dict[Source, Group] = {}
        self._sends_left = _SENDS_IN_A_ROW
        self._slot = 0
        self._wire = self._chunk = b""
        self._now = self._next_tick = 0.0

    def add(self, subscriber: Subscriber) -> None:
        """Send a subscriber everything from now on.

        :raises OSError: if it cannot be watched, for want of descriptors or memory.
        :raises RuntimeError: if no thread can be started. In both cases it is still the caller's;
            once this returns, its socket belongs to the hub.
        """
        with self._mutex:
            if not self._watcher.is_open:
                self._watcher.open()
                concurrency.call_at_exit(self.stop)
        descriptors.prepare(subscriber.descriptor, self._max_lag)
        # Here and not in the loop, since it gives the GIL away. No event is missed: what is sent
        # first finds out what there was.
        self._watcher.add(subscriber.descriptor)
        with self._mutex:
            self._arrived.append(subscriber)
            if not self._is_running:
                self._start(subscriber)
        self.ring()

    def _start(self, first: Subscriber) -> None:
        try:
            concurrency.spawn(self._run)
        except RuntimeError:
            self._arrived.remove(first)
            raise
        self._is_running = True

    def ring(self) -> None:
        """Have the loop look for what is new; from any thread, without waiting for anything."""
        self._watcher.ring()

    def end(self, subscriber: Subscriber) -> None:
        """End the stream of a subscriber that was added; from any thread, also if it has ended."""
        self._ending.append(subscriber)
        self.ring()

    def stop(self) -> None:
        """End all streams there are, and wait for that, for 2 seconds at most."""
        self._is_stopping = self._is_running
        self.ring()
        pause = concurrency.switch if self._watcher.is_greenlet else time.sleep
        deadline = time.monotonic() + _STOP_SECONDS
        while self._is_stopping and time.monotonic() < deadline:
            pause(0.001)

    def _run(self) -> None:
        while not self._is_over():
            try:
                self._turn()
            except Exception:  # its subscribers must not stay with a hub that sends nothing
                _logger.exception("The socket hub failed; its streams end, and clients reconnect")
                self._finish_all()
            self._watcher.close_removed()

    def _is_over(self) -> bool:
        with self._mutex:
            self._is_running = bool(self._arrived or self._subscribers)
            return not self._is_running

    def _turn(self) -> None:
        events = self._watcher.wait(max(0, self._next_tick - time.monotonic()))
        self._now = time.monotonic()
        # Before those that have arrived: then each of them has arrived as well.
        ending = [self._ending.popleft() for _ in range(len(self._ending))]
        while self._arrived:
            self._take_in(self._arrived.popleft())
        for subscriber in ending:
            if self._subscribers.get(subscriber.descriptor) is subscriber:
                self._finish(subscriber)
        for descriptor, event in events:
            self._on_event(descriptor, event)
        for source in self._news():
            group = self._groups.get(source)
            if group is not None:
                self._send_news(group)
        if self._now >= self._next_tick:
            self._tick()
        if self._is_stopping:
            self._finish_all()

    def _take_in(self, subscriber: Subscriber) -> None:
        source = subscriber.group.source
        group = self._groups.setdefault(source, subscriber.group)
        if not group.size:
            group.sent = self._now
        group.size += 1
        subscriber.group = group
        subscriber.moved = self._now
        self._subscribers[subscriber.descriptor] = subscriber
        self._lagging[subscriber.descriptor] = subscriber
        # Of a new group, what came before may have been news already, when nobody was in it.
        if group.size == 1 or group.position < subscriber.position:
            self._send_news(group)
        self._catch_up(subscriber)

    def _send_news(self, group: Group) -> None:
        while True:
            found = group.source.read(group.position, None, FRAME_BYTES)
            if found is None:
                self._end(group)
                return
            wire, group.position = found
            if wire:
                group.sent = self._now
                plain, in_chunks = group.live
                if plain:
                    self._send_to_all(plain, wire)
                if in_chunks:
                    self._send_to_all(in_chunks, self._in_chunk(wire))
            if len(wire) < FRAME_BYTES and group.source.end is None:
                return

    def _in_chunk(self, wire: bytes) -> bytes:
        # One event that goes to many groups is the same object each time.
        if wire is not self._wire:
            self._wire, self._chunk = wire, framed(wire, True)
        return self._chunk

    def _send_to_all(self, live: dict[int, Subscriber], frame: bytes) -> None:
        # The hottest loop of all. benchmarks/fanout.py compares it with the same loop in C.
        send, flags = descriptors.send, descriptors.FLAGS
        whole, size = len(frame), descriptors.size_of(frame)
        left = self._sends_left
        # A tuple, since those that lag are taken out on the way.
        for descriptor in tuple(live):
            if (sent := send(descriptor, frame, size, flags)) != whole:
                self._fall_behind(live.pop(descriptor), frame, max(0, sent))
            left -= 1
            if not left:
                left = _SENDS_IN_A_ROW
                self._watcher.let_others_run()
        self._sends_left = left

    def _fall_behind(self, subscriber: Subscriber, frame: bytes, sent: int) -> None:
        subscriber.pending = frame
        subscriber.offset = sent
        subscriber.position = subscriber.group.position
        subscriber.moved = self._now
        self._lagging[subscriber.descriptor] = subscriber
        # It would be told when there is room again, but not if the connection is gone already.
        self._catch_up(subscriber)

    def _catch_up(self, subscriber: Subscriber) -> None:
        group = subscriber.group
        while self._send_pending(subscriber):
            if subscriber.position >= group.position:
                self._rejoin(subscriber)
                return
            found = group.source.read(subscriber.position, group.position, FRAME_BYTES)
            if found is None:
                self._cut(subscriber)
                return
            wire, subscriber.position = found
            if wire:
                subscriber.pending = framed(wire, subscriber.is_chunked)

    def _send_pending(self, subscriber: Subscriber) -> bool:
        while subscriber.offset < len(subscriber.pending):
            sent = descriptors.send_from(
                subscriber.descriptor, subscriber.pending, subscriber.offset
            )
            if sent is None:
                self._forget(subscriber)
            if not sent:
                return False
            subscriber.offset += sent
            subscriber.moved = self._now
        subscriber.pending, subscriber.offset = b"", 0
        return True

    def _rejoin(self, subscriber: Subscriber) -> None:
        del self._lagging[subscriber.descriptor]
        subscriber.group.live[subscriber.is_chunked][subscriber.descriptor] = subscriber
        if subscriber.group.is_over:
            self._finish(subscriber)

    def _on_event(self, descriptor: int, event: int) -> None:
        subscriber = self._subscribers.get(descriptor)
        if subscriber is None:
            # The bell, or one that went during this turn.
            return
        if event & descriptors.IS_GONE:
            self._forget(subscriber)
        elif descriptor in self._lagging:
            self._catch_up(subscriber)
        elif event & descriptors.SAYS_NO_MORE and not subscriber.is_half_closed:
            # Who has closed the connection answers a beat with a reset, which is an event of its
            # own; who has closed only his half of it goes on reading.
            subscriber.is_half_closed = True
            self._beat(subscriber)

    def _beat(self, subscriber: Subscriber) -> None:
        live = subscriber.group.live[subscriber.is_chunked]
        del live[subscriber.descriptor]
        self._fall_behind(subscriber, self._beats[subscriber.is_chunked], 0)

    def _tick(self) -> None:
        self._next_tick = self._now + self._tick_seconds
        self._slot = (self._slot + 1) % self._slots
        for subscriber in tuple(self._lagging.values()):
            if subscriber.moved < self._now - self._max_lag:
                self._cut(subscriber)
        for subscriber in [one for one in self._subscribers.values() if one.deadline <= self._now]:
            self._finish(subscriber)
        silent = [
            one
            for descriptor, one in self._subscribers.items()
            if descriptor % self._slots == self._slot and one.group.sent <= self._now - self._quiet
        ]
        for subscriber in silent:
            if subscriber.descriptor not in self._lagging:
                self._beat(subscriber)

    def _end(self, group: Group) -> None:
        group.is_over = True
        # Who subscribes from now on starts another one.
        self._groups.pop(group.source, None)
        for live in group.live:
            for subscriber in tuple(live.values()):
                self._finish(subscriber)

    def _finish_all(self) -> None:
        for subscriber in tuple(self._subscribers.values()):
            self._finish(subscriber)
        self._is_stopping = False

    def _finish(self, subscriber: Subscriber) -> None:
        if subscriber.is_chunked and not subscriber.pending:
            descriptors.send_from(subscriber.descriptor, _LAST_CHUNK, 0)
        descriptors.shut_down(subscriber.descriptor)
        self._forget(subscriber)

    def _cut(self, subscriber: Subscriber) -> None:
        descriptors.reset_on_close(subscriber.descriptor)
        self._forget(subscriber)

    def _forget(self, subscriber: Subscriber) -> None:
        descriptor, group = subscriber.descriptor, subscriber.group
        del self._subscribers[descriptor]
        self._lagging.pop(descriptor, None)
        group.live[subscriber.is_chunked].pop(descriptor, None)
        group.size -= 1
        if not group.size and not group.is_over:
            del self._groups[group.source]
        self._watcher.remove(descriptor)
        # What an owner does then is not the hub's business, and must not hold it up.
        self._errands.add(subscriber.owner.close)

    def _after_fork(self) -> None:
        for subscriber in (*self._subscribers.values(), *self._arrived):
            descriptors.close(subscriber.descriptor)
        self._reset()
