"""The socket hub: bytes to many sockets, from one thread or greenlet.

A subscriber here is a file descriptor, a position, and what it belongs to; it costs no thread and
no greenlet. Who reads the same source from the same position is in one group: what is pending is
read once, framed once, and sent to each. The rules:

* Only the loop changes what the hub has. Others append to a queue and ring.
* No send waits. A socket that takes only a part is *lagging*: it keeps the rest of that frame, and
  once there is room it reads on from its own position, frame by frame, until it has caught up with
  its group. So does one that is new, and has to get what history has. It never has a queue of its
  own.
* Those that lag take turns, a frame each, for a millisecond in each turn of the loop: what is new
  comes first.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from errno import ETIMEDOUT
from functools import partial
from typing import TYPE_CHECKING

from . import concurrency, descriptors, endings
from .figures import Deliveries
from .heartbeats import Heartbeats
from .subscriber import Frames, Members, ending
from .subscription import FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .subscriber import Group, Source, Subscriber

# Each laggard has its own frame. 64 KiB were no faster, and left glibc up to 14 MiB of holes.
_CATCH_UP_SECONDS = 0.001
_SENDS_IN_A_ROW = 100
_STOP_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class SocketHub:
    """Sends what sources have to the sockets of their subscribers.

    :param watch: takes :meth:`ring`, which is called whenever a source may have news, and returns
        a function that returns the sources that have.
    :param heartbeat: the longest silence, in seconds.
    :param beat: what breaks it.
    :param max_lag: after how many seconds without a byte taken a lagging subscriber is cut off. As
        long as that, sent bytes may stay unacknowledged.
    :param farewell: returns what a stream ends with that might go on, given how many end at once.
    :ivar sent: what was sent, but for the first bytes of each stream.

    It runs as long as it has subscribers: on a thread of its own, or on a greenlet where gevent
    runs. A forked child closes what it inherits and starts anew.
    """

    def __init__(
        self,
        watch: Callable[[Callable[[], None]], Callable[[], Iterable[Source]]],
        heartbeat: float,
        beat: bytes,
        max_lag: float,
        farewell: Callable[[int], bytes],
    ) -> None:
        self._news = watch(self.ring)
        self._farewell = farewell
        self._heartbeats = Heartbeats(heartbeat, beat)
        self._max_lag = max_lag
        self._reset()
        concurrency.call_after_fork(self._after_fork)

    def _reset(self) -> None:
        self._mutex = concurrency.new_mutex()
        self._is_running = self._is_stopped = False
        self.sent = Deliveries()
        self._watcher = descriptors.Watcher()
        self._arrived: deque[Subscriber] = deque()
        self._revoked: deque[Subscriber] = deque()
        self._errands = concurrency.Errands()
        self._members = Members()
        self._sends_left = _SENDS_IN_A_ROW
        self._frames = Frames()
        self._now = 0.0

    def add(self, subscriber: Subscriber, patience: float | None = None) -> None:
        """Send a subscriber everything from now on; for ``patience`` see :func:`prepare`.

        :raises OSError: if it cannot be watched, for want of descriptors or memory.
        :raises RuntimeError: if no thread can be started. Whatever this raises, its socket is still
            the caller's unless :meth:`has` says that it is the hub's, as it is once this returns.
        """
        with self._mutex:
            if not self._watcher.is_open:
                self._watcher.open()
        descriptors.prepare(subscriber.descriptor, self._max_lag, patience)
        # Here and not in the loop, since it gives the GIL away. No event is missed: what is sent
        # first finds out what there was.
        self._watcher.add(subscriber.descriptor)
        try:
            with self._mutex:
                self._start()
                self.ring()
                # The last step. The loop looks for it behind the mutex, before it waits.
                self._arrived.append(subscriber)
        except BaseException:
            if not self.has(subscriber):
                self._watcher.forget(subscriber.descriptor)
            raise

    def has(self, subscriber: Subscriber) -> bool:
        """Tell whether a subscriber's socket is, or was, the hub's; from any thread."""
        # In the order in which it goes its way, so that it is found wherever it is meanwhile.
        return (
            subscriber in tuple(self._arrived)
            or self._members.all.get(subscriber.descriptor) is subscriber
            or subscriber.moved > 0
        )

    def _start(self) -> None:
        if not self._is_running:
            concurrency.spawn(self._run)
            self._is_running = True

    def ring(self) -> None:
        """Have the loop look for what is new; from any thread, without waiting for anything."""
        self._watcher.ring()

    def end(self, subscriber: Subscriber) -> None:
        """End a subscriber whose rights were revoked; from any thread, before it is added as well
        as after it has ended."""
        subscriber.is_revoked = True
        self._revoked.append(subscriber)
        self.ring()

    @property
    def is_busy(self) -> bool:
        """Whether it has subscribers."""
        return self._is_running

    @property
    def lagging(self) -> int:
        """How many subscribers have not everything yet."""
        return len(self._members.lagging)

    def stop(self) -> None:
        """End all streams, now and from now on, and wait for that, for 2 seconds at most."""
        self._is_stopped = True
        self.ring()
        concurrency.look_until(
            lambda: not self._is_running, _STOP_SECONDS, in_greenlet=self._watcher.is_greenlet
        )

    def _run(self) -> None:
        while not self._is_over():
            try:
                self._turn()
            except Exception:  # its subscribers must not stay with a hub that sends nothing
                _logger.exception("The socket hub failed; its streams end, and clients reconnect")
                self._finish_all(endings.FAILED)
            self._watcher.close_removed()
            self._errands.start()

    def _is_over(self) -> bool:
        with self._mutex:
            self._is_running = bool(self._arrived or self._members.all)
            return not self._is_running

    def _turn(self) -> None:
        has_work = self._arrived or self._members.ready
        pause = 0 if has_work else self._heartbeats.next_tick - time.monotonic()
        events = self._watcher.wait(max(0, pause))
        self._now = time.monotonic()
        # Before those that have arrived: then each of them has arrived as well.
        revoked = [self._revoked.popleft() for _ in range(len(self._revoked))]
        while self._arrived:
            subscriber = self._arrived[0]
            # One of both has it at any time: what fails, and all streams end, must not forget it.
            self._members.all[subscriber.descriptor] = subscriber
            self._arrived.popleft()
            self._take_in(subscriber)
            if subscriber.is_revoked:
                revoked.append(subscriber)
        for subscriber in revoked:
            if self._members.all.get(subscriber.descriptor) is subscriber:
                self._finish(subscriber, endings.REVOKED)
        for descriptor, event in events:
            self._on_event(descriptor, event)
        self._send_all_news()
        self._catch_up_some()
        if self._now >= self._heartbeats.next_tick:
            self._tick()
        if self._is_stopped:
            self._finish_all(endings.STOPPED)

    def _catch_up_some(self) -> None:
        ready, end = self._members.ready, time.monotonic() + _CATCH_UP_SECONDS
        while ready:
            self._catch_up(next(iter(ready.values())))
            if time.monotonic() >= end:
                return

    def _send_all_news(self) -> None:
        rung_at, groups = self._watcher.rung_at, self._members.groups
        news = [groups[source] for source in self._news() if source in groups]
        for group in news:
            self._send_news(group)
        if news:
            self.sent.observe(time.monotonic() - rung_at)

    def _take_in(self, subscriber: Subscriber) -> None:
        group = self._members.join(subscriber, self._now)
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
                self.sent.add(wire, len(plain) + len(in_chunks))
                if plain:
                    self._send_to_all(plain, wire)
                if in_chunks:
                    self._send_to_all(in_chunks, self._frames.in_chunk(wire))
            if len(wire) < FRAME_BYTES and group.source.end is None:
                return

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
        self._members.fall_behind(subscriber, self._now)
        # It would be told when there is room again, but not if the connection is gone already.
        self._catch_up(subscriber)

    def _catch_up(self, subscriber: Subscriber) -> None:
        self._members.ready.pop(subscriber.descriptor, None)
        if not self._send_pending(subscriber):
            return
        if not subscriber.has_all and not self._send_next(subscriber):
            return
        if subscriber.has_all:
            self._rejoin(subscriber)
        else:
            # It has another turn, behind the others.
            self._members.ready[subscriber.descriptor] = subscriber

    def _send_next(self, subscriber: Subscriber) -> bool:
        frame = self._next_frame(subscriber)
        if frame is None:
            self._cut(subscriber)
            return False
        subscriber.wire = frame
        subscriber.pending = subscriber.next_piece()
        return self._send_pending(subscriber)

    def _next_frame(self, subscriber: Subscriber) -> bytes | None:
        group, replay = subscriber.group, subscriber.replay
        if replay is not None:
            frame = replay.read(FRAME_BYTES)
            if replay.is_over:
                subscriber.replay = None
            return frame
        found = group.source.read(subscriber.position, group.position, FRAME_BYTES)
        if found is None:
            return None
        frame, subscriber.position = found
        self.sent.add(frame, 1)
        return frame

    def _send_pending(self, subscriber: Subscriber) -> bool:
        while pending := subscriber.pending:
            sent = descriptors.send_from(subscriber.descriptor, pending, subscriber.offset)
            if sent <= 0:
                if sent:
                    self._lose(subscriber, -sent)
                return False
            subscriber.offset += sent
            subscriber.moved = self._now
            if subscriber.offset == len(pending):
                subscriber.pending, subscriber.offset = subscriber.next_piece(), 0
        return True

    def _rejoin(self, subscriber: Subscriber) -> None:
        self._members.catch_up(subscriber)
        if subscriber.group.is_over:
            self._finish(subscriber, endings.ENDED)

    def _on_event(self, descriptor: int, event: int) -> None:
        subscriber = self._members.all.get(descriptor)
        if subscriber is None:
            # The bell, or one that went during this turn.
            return
        if event & descriptors.IS_GONE:
            self._lose(subscriber, descriptors.error_of(descriptor))
        elif descriptor in self._members.lagging:
            self._members.ready[descriptor] = subscriber
        elif event & descriptors.SAYS_NO_MORE and not subscriber.is_half_closed:
            # Who has closed the connection answers a beat with a reset, which is an event of its
            # own; one that has closed only its half goes on reading.
            subscriber.is_half_closed = True
            self._beat(subscriber)

    def _beat(self, subscriber: Subscriber) -> None:
        live = subscriber.group.live[subscriber.is_chunked]
        del live[subscriber.descriptor]
        self._fall_behind(subscriber, self._heartbeats.wires[subscriber.is_chunked], 0)

    def _tick(self) -> None:
        for subscriber in tuple(self._members.lagging.values()):
            if subscriber.moved < self._now - self._max_lag:
                self._cut(subscriber)
        for subscriber in [one for one in self._members.all.values() if one.deadline <= self._now]:
            self._finish(subscriber, endings.EXPIRED, self._farewell(1))
        for subscriber in self._heartbeats.due(self._members.all, self._now):
            if subscriber.descriptor not in self._members.lagging:
                self._beat(subscriber)

    def _end(self, group: Group) -> None:
        group.is_over = True
        # Who subscribes from now on starts another one.
        self._members.groups.pop(group.source, None)
        reason = endings.LAGGED if group.source.end is None else endings.ENDED
        for live in group.live:
            for subscriber in tuple(live.values()):
                self._finish(subscriber, reason)

    def _finish_all(self, reason: str) -> None:
        streams = len(self._members.all)
        for subscriber in tuple(self._members.all.values()):
            self._finish(subscriber, reason, self._farewell(streams))

    def _finish(self, subscriber: Subscriber, reason: str, farewell: bytes = b"") -> None:
        if not subscriber.pending:
            wire = ending(farewell, subscriber.is_chunked)
            descriptors.send_from(subscriber.descriptor, wire, 0)
        descriptors.shut_down(subscriber.descriptor)
        self._forget(subscriber, reason)

    def _cut(self, subscriber: Subscriber) -> None:
        descriptors.reset_on_close(subscriber.descriptor)
        self._forget(subscriber, endings.LAGGED)

    def _lose(self, subscriber: Subscriber, error: int) -> None:
        self._forget(subscriber, endings.VANISHED if error == ETIMEDOUT else endings.LEFT)

    def _forget(self, subscriber: Subscriber, reason: str) -> None:
        # What an owner does then is not the hub's business, and must not hold it up.
        self._errands.add(partial(subscriber.owner.end, reason))
        self._members.leave(subscriber)
        self._watcher.remove(subscriber.descriptor)

    def _after_fork(self) -> None:
        # One may be in both.
        for descriptor in {*self._members.all, *(one.descriptor for one in self._arrived)}:
            descriptors.close(descriptor)
        self._reset()
