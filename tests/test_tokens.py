from __future__ import annotations

import base64
import hashlib
import math
import time
from typing import Any

import pytest
from itsdangerous import URLSafeSerializer

from flask_eventstream.errors import ConfigurationError, InvalidFieldError
from flask_eventstream.tokens import MAX_AGE, PREFIX, TokenError, new_token, signed, verified

KEYS = ["old", "secret"]


def text(*channels: str, max_age: float = 60, user: str | None = None, **claims: Any) -> str:
    return signed(new_token(channels or ("news",), max_age, user, claims), KEYS)


def test_a_token_says_what_was_signed() -> None:
    before = time.time()
    token = verified(text("news", "数", user="me", room=7, role={"a": [1]}), KEYS)
    assert token.channels == ("news", "数")
    assert (token.user, token.claims) == ("me", {"room": 7, "role": {"a": [1]}})
    assert before <= token.issued <= time.time()
    assert token.expires == token.issued + 60


def test_the_text_is_safe_in_a_url_and_has_its_prefix() -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    for wire in (text(), text(*(f"room:{n}/ü" for n in range(64)))):
        assert set(wire) <= allowed
        assert wire.startswith("es1.")


def changed(wire: str, n: int) -> str:
    return wire[:n] + ("A" if wire[n] != "A" else "B") + wire[n + 1 :]


def test_a_text_with_any_character_changed_is_no_token() -> None:
    wire = text(user="me")
    # The last one carries two bits that nobody reads.
    for n in range(len(wire) - 1):
        with pytest.raises(TokenError, match="not valid"):
            verified(changed(wire, n), KEYS)


@pytest.mark.parametrize(
    "wire",
    [
        "",
        "es1.",
        "es1..",
        "es1.x.y",
        "es1.é",
        "es1.\udc80",
        "es1." + "A" * 10_000,
        "ES1." + text().removeprefix(PREFIX),
        text().removeprefix(PREFIX),
        text() + "é",
        text().rpartition(".")[0],
        text().rpartition(".")[0] + ".",
        PREFIX + text(),
    ],
)
def test_what_is_not_the_whole_text_is_no_token(wire: str) -> None:
    with pytest.raises(TokenError, match="not valid"):
        verified(wire, KEYS)


PAYLOAD = {"channels": ["a"], "issued": 0, "expires": 9e9, "user": None, "claims": {}}


def serialized(
    key: Any,
    salt: str = "flask-eventstream.token",
    digest: Any = hashlib.sha256,
    kind: str = "hmac",
    payload: Any = PAYLOAD,
) -> str:
    options = {"key_derivation": kind, "digest_method": digest}
    wire = URLSafeSerializer(key, salt=salt, signer_kwargs=options).dumps(payload)
    assert isinstance(wire, str)
    return PREFIX + wire


def test_only_the_apps_own_keys_salt_and_digest_count() -> None:
    salt = "flask-eventstream.token"
    assert verified(serialized("secret"), KEYS).channels == ("a",)
    others = [
        serialized("other", salt),
        serialized("", salt),
        serialized("secret", "cookie-session"),
        serialized("secret", salt, hashlib.sha1),
        serialized("secret", salt, kind="django-concat"),
    ]
    for wire in others:
        with pytest.raises(TokenError, match="not valid"):
            verified(wire, KEYS)
    with pytest.raises(TokenError):
        verified(text(), [])


TIMES: list[Any] = ["9e9", None, [], math.nan, math.inf, -math.inf, 10**400, 1e300]
CLAIMS: list[Any] = [None, [], "x"]
OTHER_PAYLOADS: list[Any] = [
    None, 7, "x", [], {}, ["channels"], {**PAYLOAD, "more": 1},
    *({name: PAYLOAD[name] for name in PAYLOAD if name != left_out} for left_out in PAYLOAD),
    *({**PAYLOAD, "channels": names} for names in ("ab", {"a": 1}, [7], ["a", None], None)),
    *({**PAYLOAD, "user": user} for user in (7, True, ["me"])),
    *({**PAYLOAD, "claims": claims} for claims in CLAIMS),
    *(
        {**PAYLOAD, name: time}
        for name in ("issued", "expires")
        for time in TIMES
    ),
]  # fmt: skip


@pytest.mark.parametrize("payload", OTHER_PAYLOADS, ids=lambda one: str(one)[:80])
def test_a_payload_that_is_none_is_no_token_even_if_the_apps_key_has_signed_it(
    payload: Any,
) -> None:
    with pytest.raises(TokenError, match="not valid"):
        verified(serialized("secret", payload=payload), KEYS)


def test_a_token_that_expires_before_all_time_has_expired() -> None:
    for expires in (-1, -9e9, 0, time.time()):
        with pytest.raises(TokenError, match="has expired"):
            verified(serialized("secret", payload={**PAYLOAD, "expires": expires}), KEYS)


def test_a_payload_put_before_another_ones_signature_is_no_token() -> None:
    head, _, signature = text("news").rpartition(".")
    payload = base64.urlsafe_b64encode(b'{"channels":["secret"]}').rstrip(b"=").decode()
    with pytest.raises(TokenError, match="not valid"):
        verified(f"{PREFIX}{payload}.{signature}", KEYS)
    with pytest.raises(TokenError, match="not valid"):
        verified(f"{head}.{text('other').rpartition('.')[2]}", KEYS)


def test_the_newest_key_signs_and_older_ones_still_verify() -> None:
    wire = text()
    assert verified(wire, ["secret", "newer"]).channels == ("news",)
    assert verified(wire, ["secret"]).channels == ("news",)
    with pytest.raises(TokenError):
        verified(wire, ["newer"])
    with pytest.raises(TokenError):
        verified(wire, ["old"])


def test_an_expired_token_says_so_and_a_changed_one_does_not() -> None:
    expired = signed(new_token(("a",), 1, None, {})._replace(expires=time.time()), KEYS)
    with pytest.raises(TokenError, match=r"^This token has expired\.$"):
        verified(expired, KEYS)
    with pytest.raises(TokenError, match="not valid"):
        verified(changed(expired, 10), KEYS)


@pytest.mark.parametrize("max_age", [0, -1, "60", True, None, float("nan"), MAX_AGE + 1])
def test_an_age_that_no_token_can_have_is_an_error(max_age: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_age="):
        new_token(("a",), max_age, None, {})


def test_a_token_may_be_valid_for_thirty_days() -> None:
    token = verified(text(max_age=MAX_AGE), KEYS)
    assert token.expires - token.issued == pytest.approx(30 * 24 * 3600)


@pytest.mark.parametrize("claim", [object(), b"x", "\ud800"])
def test_a_claim_that_json_cannot_express_is_an_error(claim: Any) -> None:
    with pytest.raises(InvalidFieldError, match="claims="):
        text(claim=claim)


def test_no_error_has_the_token_or_the_secret_in_it() -> None:
    wire = changed(text(), 20)
    with pytest.raises(TokenError) as caught:
        verified(wire, ["the-secret"])
    error: BaseException | None = caught.value
    while error is not None:
        shown = f"{error!r} {vars(error)}"
        assert "the-secret" not in shown
        assert wire[:20] not in shown
        assert wire[-20:] not in shown
        error = error.__context__
