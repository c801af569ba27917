from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import MemoryBroker, doctor
from flask_eventstream.config import Config
from flask_eventstream.gunicorn_settings import Settings
from flask_eventstream.redis_broker import RedisBroker

from .servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask_eventstream.doctor import Finding

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

LOCAL = Config()
REDIS = Config(broker_url="redis://user:secret@host/0")
GEVENT = Settings("gevent", workers=1, threads=1, max_requests=0, timeout=30)


def levels(findings: Iterable[Finding]) -> list[str]:
    found = list(findings)
    assert all(bool(finding.cure) == (finding.level != "ok") for finding in found)
    return [finding.level for finding in found]


def test_a_redis_that_answers_and_keeps_everything_is_fine(own_redis: RedisServer) -> None:
    config = Config(broker_url=own_redis.url)
    with closing(RedisBroker(own_redis.url)) as broker:
        findings = list(doctor.check_broker(broker, config))
        assert levels(findings) == ["ok", "ok", "ok"]
        assert findings[0].what.startswith(f"the broker {own_redis.url} answers within 0.")
        own_redis.redis.config_set("maxmemory", "100mb")
        assert levels(doctor.check_broker(broker, config)) == ["ok", "ok", "ok"]
        own_redis.redis.config_set("maxmemory-policy", "volatile-lru")
        *_, found = doctor.check_broker(broker, config)
    assert found.level == "warn"
    assert "throws keys away when it has 104,857,600 bytes (volatile-lru)" in found.what
    assert "noeviction" in found.cure


def test_a_broker_that_does_not_answer_is_found_without_its_secrets() -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    with closing(RedisBroker(url)) as broker:
        [found] = doctor.check_broker(broker, Config(broker_url=url))
    assert (found.level, "redis://127.0.0.1:1/0" in found.what) == ("fail", True)
    assert "secret" not in found.what
    assert "EVENTSTREAM_BROKER_URL" in found.cure


def test_the_broker_of_one_process_is_there() -> None:
    [found] = doctor.check_broker(MemoryBroker(), LOCAL)
    assert (found.level, found.what) == ("ok", "the broker is memory://, for one process")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"redis_version": "6.0.16"}, ["fail", "ok"]),
        ({"redis_version": "5.9"}, ["fail", "ok"]),
        ({"redis_version": "6.2.0"}, ["ok", "ok"]),
        ({"redis_version": "10.0.0"}, ["ok", "ok"]),
        ({"redis_version": "7.2.4", "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, ["ok"] * 2),
        (
            {"redis_version": "7.2.4", "maxmemory": 1, "maxmemory_policy": "allkeys-lru"},
            ["ok", "warn"],
        ),
    ],
)
def test_an_old_redis_and_one_that_forgets_are_found(
    info: dict[str, Any], expected: list[str]
) -> None:
    assert levels(doctor.check_redis(info)) == expected


@pytest.mark.parametrize(
    ("changes", "config", "expected", "text"),
    [
        ({}, LOCAL, ["ok"], "1 gevent worker, and the broker is memory://"),
        ({"workers": 4}, REDIS, ["ok"], "4 gevent workers, and the broker is redis://host/0"),
        ({"workers": 4}, LOCAL, ["fail"], "never reaches the subscribers of another"),
        ({"worker_class": "sync"}, LOCAL, ["ok", "warn"], "holds it, and is killed after 30 s"),
        ({"worker_class": "sync", "timeout": 0}, LOCAL, ["ok", "warn"], "stream holds it"),
        ({"worker_class": "gthread"}, LOCAL, ["ok", "warn"], "has 1 thread, of which"),
        ({"worker_class": "gthread", "threads": 4}, LOCAL, ["ok", "warn"], "has 4 threads"),
        ({"worker_class": "gthread", "threads": 20}, LOCAL, ["ok"], "1 gthread worker"),
        ({"worker_class": "tornado"}, LOCAL, ["ok"], "1 tornado worker"),
        ({"max_requests": 1000}, LOCAL, ["ok", "warn"], "ends after 1,000 requests"),
    ],
)
def test_the_servers_settings_are_judged(
    changes: dict[str, Any], config: Config, expected: list[str], text: str
) -> None:
    findings = list(doctor.check_server(replace(GEVENT, **changes), config))
    assert levels(findings) == expected
    assert text in findings[-1].what
    assert "secret" not in findings[0].what


def test_settings_that_are_not_known_are_asked_for() -> None:
    [found] = doctor.check_server(None, LOCAL)
    assert (found.level, "--gunicorn" in found.cure) == ("warn", True)


def test_gevents_workers_without_gevent_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gevent", None)
    _, found = doctor.check_server(GEVENT, LOCAL)
    assert (found.level, found.cure) == ("fail", "pip install 'flask-eventstream[gevent]'")


# In a process of its own, which imports gevent.
GREENLETS = """
from flask_eventstream import doctor
from flask_eventstream.config import Config
from flask_eventstream.gunicorn_settings import Settings

redis, local = Config(broker_url="redis://host/0"), Config()
gevent_workers, threads = (Settings(kind, 1, 1, 0, 30) for kind in ("gevent", "gthread"))

def count(settings, config):
    return len(list(doctor.check_greenlets(settings, config)))

import gevent
found = [count(settings, redis) for settings in (None, threads, gevent_workers)]
found.append(count(None, local))
from gevent import monkey
unpatched = count(None, redis)
monkey.patch_all()
print(found, unpatched, count(None, redis))
"""


def test_without_gevent_nothing_has_to_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gevent", raising=False)
    assert list(doctor.check_greenlets(None, REDIS)) == []


def test_gevent_without_monkey_patching_is_found_where_redis_would_hold_it_up() -> None:
    command = [sys.executable, "-c", dedent(GREENLETS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[1, 1, 0, 0] 1 0\n", done.stderr


@pytest.mark.parametrize(
    ("limit", "room", "wanted", "level", "cure"),
    [
        (None, None, None, "ok", ""),
        (65_536, 58_983, None, "ok", ""),
        (65_536, 58_983, 50_000, "ok", ""),
        (1024, 922, None, "warn", "LimitNOFILE=65536"),
        (65_536, 58_983, 90_000, "warn", "LimitNOFILE=100001"),
        (65_536, 58_983, 58_984, "warn", "LimitNOFILE=65538"),
    ],
)
def test_the_limit_of_descriptors_is_judged_by_what_is_wanted(
    limit: int | None, room: int | None, wanted: int | None, level: str, cure: str
) -> None:
    [found] = doctor.check_descriptors(Config(max_subscribers=wanted), limit, room)
    assert found.level == level
    assert bool(cure) == bool(found.cure)
    assert cure in found.cure


def test_the_limit_of_descriptors_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (endless, endless))
    assert doctor.descriptor_limit() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert doctor.descriptor_limit() is None


@pytest.mark.parametrize(
    ("heartbeat", "has_secret", "expected"),
    [(15, True, ["ok", "ok"]), (60, True, ["warn", "ok"]), (59, False, ["ok", "warn"])],
)
def test_heartbeats_that_are_too_rare_and_a_missing_key_are_found(
    heartbeat: float, has_secret: bool, expected: list[str]
) -> None:
    assert levels(doctor.check_app(Config(heartbeat=heartbeat), has_secret)) == expected
