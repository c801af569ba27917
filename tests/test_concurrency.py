from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING
from unittest.mock import Mock

import gevent
import gevent.event
import gevent.monkey
import pytest

from flask_eventstream import MemoryBroker, concurrency

from .servers import DEADLINE, ROOT, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable


def in_greenlet(function: Callable[[], object]) -> object:
    return gevent.spawn(function).get(timeout=20)


def test_a_thread_gets_what_the_standard_library_has() -> None:
    assert isinstance(concurrency.new_event(), threading.Event)
    ran_on: list[threading.Thread] = []
    concurrency.spawn(lambda: ran_on.append(threading.current_thread()))
    wait_for(lambda: ran_on)
    assert ran_on[0] is not threading.current_thread()
    assert ran_on[0].daemon


def test_a_greenlet_gets_what_gevent_has_without_monkey_patching() -> None:
    assert isinstance(in_greenlet(concurrency.new_event), gevent.event.Event)
    ran_on: list[object] = []
    in_greenlet(lambda: concurrency.spawn(lambda: ran_on.append(gevent.getcurrent())))
    wait_for(lambda: gevent.sleep(0) or ran_on)
    assert isinstance(ran_on[0], gevent.Greenlet)


def test_what_is_spawned_keeps_nothing_of_the_callers_context() -> None:
    # The hub would hold the request of its first subscriber for ever.
    variable = contextvars.ContextVar("variable", default="nothing")
    seen: list[str] = []

    def start() -> None:
        variable.set("the request")
        concurrency.spawn(lambda: seen.append(variable.get()))

    start()
    in_greenlet(start)
    wait_for(lambda: gevent.sleep(0) or len(seen) == 2)
    assert seen == ["nothing", "nothing"]


def test_a_greenlet_waits_for_a_descriptor_while_others_run() -> None:
    reading, writing = os.pipe()
    waiting = gevent.spawn(concurrency.wait_readable, reading, 20)
    gevent.sleep(0)
    os.write(writing, b"x")
    waiting.get(timeout=20)
    os.read(reading, 1)
    in_greenlet(lambda: concurrency.wait_readable(reading, 0.01))
    for end in (reading, writing):
        os.close(end)


# What greenlets run is traced in other processes only; see conftest.py.
OTHERS_TIMEOUT = """
import gevent, os
from flask_eventstream import concurrency
reading, writing = os.pipe()
def wait():
    concurrency.wait_readable(reading, 0.01)
    concurrency.switch(0.01)
    try:
        with gevent.Timeout(0.01, TimeoutError("of somebody else")):
            concurrency.wait_readable(reading, 3600)
    except TimeoutError as error:
        print(error)
gevent.spawn(wait).join()
"""


def test_another_timeout_than_its_own_is_passed_on() -> None:
    assert printed_by(OTHERS_TIMEOUT) == "of somebody else\n"


THROWN = """
import gevent, gevent.event
from flask_eventstream import concurrency
from flask_eventstream.shutdown import StreamStopped, Turn
turns, never = [], gevent.event.Event()
def wait(is_producing):
    turns.append(Turn())
    turns[-1].is_producing = is_producing
    try:
        never.wait(0.1 if not is_producing else None)
        print("waited")
    except StreamStopped:
        print("thrown out")
waiting = [gevent.spawn(wait, is_producing) for is_producing in (True, False)]
while len(turns) < 2:
    gevent.sleep(0)
for turn in turns:
    turn.stop()
gevent.joinall(waiting)
"""


def test_a_greenlet_is_thrown_out_of_its_wait_if_that_is_still_wanted() -> None:
    assert printed_by(THROWN) == "thrown out\nwaited\n"


def printed_by(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE * 2)
    assert done.stderr == ""
    return done.stdout


AT_EXIT = """
from flask_eventstream import concurrency
class Ended:
    def __init__(self, name): self.name = name
    def end(self): print(self.name)
alive, dead = Ended("alive"), Ended("dead")
concurrency.call_at_exit(alive.end)
concurrency.call_at_exit(dead.end)
del dead
"""

BEFORE_THREADS = """
import threading
from flask_eventstream import concurrency
class Waited:
    def __init__(self): self.may_end = threading.Event()
    def wait(self): self.may_end.wait(); print("ended"); self.register()
    def end(self): self.may_end.set()
    def register(self): concurrency.call_before_threads_are_joined(self.end); print("too late")
waited = Waited()
concurrency.call_before_threads_are_joined(waited.end)
threading.Thread(target=waited.wait).start()
"""


@pytest.mark.parametrize(
    ("program", "printed"), [(AT_EXIT, "alive\n"), (BEFORE_THREADS, "ended\ntoo late\n")]
)
def test_what_is_alive_at_the_end_of_the_interpreter_is_called(program: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    assert done.stdout == printed


def test_a_waiting_greenlet_lets_others_run_without_monkey_patching() -> None:
    broker = MemoryBroker()
    waiting = [gevent.spawn(lambda: broker.subscribe().take(20)) for _ in range(3)]
    gevent.sleep(0)
    wait_for(lambda: gevent.sleep(0) or broker.subscriber_count() == 3)
    broker.publish("x")
    assert all(b"data: x" in greenlet.get(timeout=20) for greenlet in waiting)


def test_the_mutex_is_the_operating_systems_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(concurrency.new_mutex(), type(threading.Lock()))
    monkeypatch.delitem(sys.modules, "gevent.monkey")
    assert isinstance(concurrency.new_mutex(), type(threading.Lock()))


def test_errands_are_done_by_the_caller_while_no_thread_is_to_be_had() -> None:
    errands, done_by = concurrency.Errands(), list[threading.Thread]()

    def errand() -> None:
        done_by.append(threading.current_thread())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("no thread")))
        errands.add(errand)
        errands.start()
    assert done_by == [threading.current_thread()]
    errands.add(errand)
    errands.start()
    wait_for(lambda: len(done_by) == 2)
    assert done_by[1] is not threading.current_thread()


def test_who_rings_while_the_waker_works_gets_another_round() -> None:
    rounds: list[int] = []

    def work() -> bool:
        rounds.append(1)
        if len(rounds) == 1:
            waker.ring()
        return False

    waker = concurrency.Waker(work)
    waker.ring()
    waker.start()
    wait_for(lambda: waker._bell is None, what="the waker to end")
    assert len(rounds) == 2


class Forked:
    def __init__(self) -> None:
        self.calls = 0

    def call(self) -> None:
        self.calls += 1


def test_a_waker_that_has_a_pause_works_without_a_ring() -> None:
    rounds: list[float] = []

    def work() -> bool:
        rounds.append(time.monotonic())
        return len(rounds) < 5

    waker = concurrency.Waker(work)
    waker.pause = 0.01
    waker.start()
    wait_for(lambda: waker._bell is None)
    assert len(rounds) == 5
    assert rounds[-1] - rounds[1] > 0.02


def test_a_forked_child_calls_what_is_still_alive() -> None:
    alive, dead = Forked(), Forked()
    concurrency.call_after_fork(alive.call)
    concurrency.call_after_fork(dead.call)
    del dead
    child = os.fork()
    if child == 0:
        os._exit(alive.calls)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert alive.calls == 0


HELD = """
import os, threading
from flask_eventstream import concurrency
mutex = concurrency.new_mutex()
concurrency.hold_through_forks(mutex)
is_held, is_done = threading.Event(), []
def hold():
    with mutex:
        is_held.set()
        concurrency.original("time", "sleep")(0.1)
        is_done.append(True)
threading.Thread(target=hold).start()
is_held.wait()
child = os.fork()
is_free = bool(is_done) and mutex.acquire(blocking=False)
if child == 0:
    os._exit(is_free)
assert is_free and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
"""


def test_nobody_forks_while_a_mutex_is_held() -> None:
    subprocess.run([sys.executable, "-c", HELD], check=True, cwd=ROOT, timeout=DEADLINE)


PATCHED = """
from gevent import monkey; monkey.patch_all()
import gevent, threading
from flask_eventstream import MemoryBroker
broker = MemoryBroker()
def read():
    subscription = broker.subscribe()
    taken = subscription.take(20)
    subscription.close()
    return taken
greenlets = [gevent.spawn(read) for _ in range(100)]
while broker.subscriptions < 100:
    gevent.sleep(0.001)
def publish():
    for _ in range(50):
        broker.publish("x", channel="elsewhere")
    broker.publish("x")
{start}
done = gevent.joinall(greenlets, timeout=20)
assert len(done) == 100, len(done)
assert all(b"data: x" in greenlet.value for greenlet in greenlets)
while broker._waker._bell is not None:
    gevent.sleep(0.001)
"""


@pytest.mark.parametrize(
    "start",
    [
        "threading.Thread(target=publish).start()",
        "gevent.get_hub().threadpool.spawn(publish)",
        "monkey.get_original('_thread', 'start_new_thread')(publish, ())",
    ],
    ids=["greenlet", "gevent's thread pool", "native thread"],
)
def test_any_thread_of_a_patched_process_reaches_its_greenlets(start: str) -> None:
    command = [sys.executable, "-c", PATCHED.format(start=start)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_who_waits_for_progress_looks_whenever_there_is_some() -> None:
    progress = concurrency.Progress()
    numbers = iter([False, False, True])
    ringing = threading.Event()

    def notify() -> None:
        while not ringing.wait(0.001):
            progress.notify()

    thread = threading.Thread(target=notify)
    thread.start()
    assert progress.wait_until(lambda: next(numbers), DEADLINE)
    assert not progress.wait_until(lambda: False, 0.01)
    ringing.set()
    thread.join()
