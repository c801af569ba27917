from __future__ import annotations

from typing import Any

import pytest

from flask_eventstream.config import Config, check_seconds, is_well_formed, without_secrets
from flask_eventstream.errors import ConfigurationError


def test_the_defaults_hold_for_what_is_not_said() -> None:
    assert Config.read({"OTHER": 1}) == Config()


def test_every_key_is_read() -> None:
    given = {
        "EVENTSTREAM_BROKER_URL": "memory://",
        "EVENTSTREAM_HISTORY": 0,
        "EVENTSTREAM_HISTORY_SECONDS": 1.5,
        "EVENTSTREAM_HEARTBEAT": 2,
        "EVENTSTREAM_RETRY": 0,
        "EVENTSTREAM_MAX_EVENT_BYTES": 5,
        "EVENTSTREAM_MAX_CHANNELS": 6,
        "EVENTSTREAM_MAX_SUBSCRIBERS": 7,
        "EVENTSTREAM_MAX_LIFETIME": 8.5,
        "EVENTSTREAM_MAX_LAG": 9,
        "EVENTSTREAM_HIJACK": False,
        "EVENTSTREAM_KEY_PREFIX": "mine:",
        "EVENTSTREAM_MAX_RUNS": 10,
        "EVENTSTREAM_MAX_RUNS_PER_OWNER": 11,
        "EVENTSTREAM_MAX_RUN_BYTES": 12,
        "EVENTSTREAM_RUN_SECONDS": 13.5,
        "EVENTSTREAM_RUN_LEASE": 14.5,
        "EVENTSTREAM_MAX_SUBSCRIBERS_PER_ADDRESS": 15,
        "EVENTSTREAM_MAX_SUBSCRIBERS_PER_USER": 16,
        "EVENTSTREAM_PRESENCE_SECONDS": 17.5,
        "EVENTSTREAM_MAX_IDLE_BYTES": 18,
    }
    channels = ("memory://", 0, 1.5, 2, 0, 5, 6, 7, 8.5, 9, False, "mine:")
    expected = Config(*channels, 10, 11, 12, 13.5, 14.5, 15, 16, 17.5, 18)
    assert Config.read(given) == expected


@pytest.mark.parametrize(
    "key",
    [
        "MAX_SUBSCRIBERS",
        "MAX_LIFETIME",
        "MAX_SUBSCRIBERS_PER_ADDRESS",
        "MAX_SUBSCRIBERS_PER_USER",
    ],
)
def test_none_is_a_value_where_it_is_the_default(key: str) -> None:
    assert Config.read({f"EVENTSTREAM_{key}": None}) == Config()


BAD: dict[str, list[Any]] = {
    "BROKER_URL": [None, 7],
    "HISTORY": [None, -1, "3", True, 1.5],
    "HISTORY_SECONDS": [None, 0, "3", True],
    "HEARTBEAT": [None, 0, -1, "15", True, float("nan"), float("inf")],
    "RETRY": [None, -1, "3", True, 1.5],
    "MAX_EVENT_BYTES": [None, 0, "3"],
    "MAX_CHANNELS": [None, 0, "3"],
    "MAX_SUBSCRIBERS": [0, "3"],
    "MAX_LIFETIME": [0, "3"],
    "MAX_LAG": [None, 0, "3"],
    "HIJACK": [None, 1],
    "KEY_PREFIX": [None, "", "a b", "ü", "\n", 7],
    "MAX_RUNS": [None, 0, "3"],
    "MAX_RUNS_PER_OWNER": [None, 0, "3"],
    "MAX_RUN_BYTES": [None, 0, "3"],
    "RUN_SECONDS": [None, 0, "3"],
    "RUN_LEASE": [None, 0, 0.5, "15", True],
    "MAX_SUBSCRIBERS_PER_ADDRESS": [0, "3", True],
    "MAX_SUBSCRIBERS_PER_USER": [0, "3", True],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD.items() for value in values]
)
def test_a_value_that_cannot_be_used_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"EVENTSTREAM_{key}=") as caught:
        Config.read({f"EVENTSTREAM_{key}": value})
    assert caught.value.field == f"EVENTSTREAM_{key}"


def test_seconds_elsewhere_are_checked_alike() -> None:
    check_seconds("pause", 0.5)
    with pytest.raises(ConfigurationError, match="pause=0 must be a number of seconds"):
        check_seconds("pause", 0)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/1?password=other", "redis://host:6379/1"),
        ("redis://:se@cret@host", "redis://host"),
        ("unix://user:secret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("memory://", "memory://"),
        ("memory://?x", "memory://"),
        ("rediss://[2001:db8::1]:6380/?ssl_ca_certs=/x", "rediss://[2001:db8::1]:6380/"),
        ("redis://:secret@", "redis://"),
        ("redis://[secret@host", "redis://host"),
        ("redis://my_redis.example.com/0/", "redis://my_redis.example.com/0/"),
        ("redis://:se cret%zz\\@host:1", "redis://host:1"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert is_well_formed(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nonsense", "nonsense"),
        ("amqp://host:5672/", "amqp://host:5672/"),
        ("", "…"),
        ("localhost:6379", "…"),
        ("amqp://host?x", "…"),
        ("amqp://:secret", "…"),
        ("amqp://user:secret@host", "…"),
        ("secret://word@host", "…"),
        (" redis://:secret@host", "…"),
        ("redis:/user:secret@host", "redis:/…"),
        ("redis//:secret@host", "…"),
        ("REDIS://:secret@host", "REDIS://…"),
        ("redis://:se/cret@host", "redis://…"),
        ("redis://secret/12@host", "redis://…"),
        ("redis://1234/5678@host", "redis://…"),
        ("redis://:se#cret@host", "redis://…"),
        ("redis://secret#secret@host", "redis://…"),
        ("redis://:se?cret@host", "redis://…"),
        ("redis://secret?secret@host", "redis://…"),
        ("redis://host?password=se#cret", "redis://…"),
        ("redis://host?password=se@cret", "redis://…"),
        ("redis://:secret", "redis://…"),
        ("redis://:123456", "redis://…"),
        ("redis://user:secret", "redis://…"),
        ("redis://host:secret/0", "redis://…"),
        ("redis://host/secret", "redis://…"),
        ("redis://[secret/@host", "redis://…"),
        ("redis://:se\udc80cret@host", "redis://…"),
        ("unix://secret/path", "unix://…"),
        ("unix://user:se/cret@/path", "unix://…"),
        ("unix:///path#secret", "unix://…"),
        ("memory://:secret@host", "memory://…"),
    ],
)
def test_of_a_url_that_is_none_in_every_detail_only_the_scheme_is_shown(
    url: str, shown: str
) -> None:
    assert without_secrets(url) == shown
    assert not is_well_formed(url)


def test_the_text_of_a_configuration_has_no_url() -> None:
    assert "secret" not in repr(Config(broker_url="redis://:secret@host"))


def test_a_url_of_another_class_is_named_by_that() -> None:
    with pytest.raises(ConfigurationError, match="class 'bytes'") as caught:
        Config.read({"EVENTSTREAM_BROKER_URL": b"redis://:secret@host"})
    assert "secret" not in f"{caught.value} {caught.value.value}"
