"""A text verifies only if it was signed, by this app, unchanged, and has not expired.

A case is a payload of any bytes, the key and the salt that sign it, and what is changed in the
text. The invariant:

* Whoever has one of the app's keys and its salt gets back what he signed: if it has the form of a
  token, has not expired, and its text is as it was.
* A text that is changed verifies only where another spelling of the same signature was put: it says
  what was signed.
* All else is a ``TokenError``. Nothing else is raised.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import TYPE_CHECKING, Any

from itsdangerous import Signer
from itsdangerous.encoding import base64_decode, base64_encode

from flask_eventstream.tokens import PREFIX, Token, TokenError, verified

from . import inputs

if TYPE_CHECKING:
    from random import Random

    Case = tuple[str, str, bytes, bool, list[tuple[int, int, str]]]
    """Key, salt, payload, whether it is zipped, and changes: where, how much goes, what comes."""

KEYS = ("old", "secret")
SALT = "flask-eventstream.token"
TIMES = ("0", "-1", "1.5", "9e9", "9999999999", "2e10", "1e12", "1e400", "NaN", "Infinity", "null")
VALUES = ("null", "true", "7", '"x"', "[]", "{}", '["a"]', '[["a"]]', '{"a": 1}', "[" * 9, "NaN")
PUT = ("", "A", "_", "-", ".", "..", "=", "/", "+", "\n", " ", "\0", "é", "\ud800", "es1.", "%2E")


def generate(chance: Random) -> Case:
    """Return a case."""
    key = chance.choice((*KEYS * 4, "other", ""))
    salt = SALT if chance.random() < 0.9 else chance.choice(("", "cookie-session", SALT + "2"))
    changes = [_change(chance) for _ in range(chance.choice((0, 0, 1, 1, 2)))]
    return key, salt, _payload(chance), chance.random() < 0.3, changes


def _payload(chance: Random) -> bytes:
    names = [inputs.text(chance, 4) for _ in range(chance.randrange(4))]
    fields = {
        "channels": json.dumps(names),
        "issued": "0",
        "expires": "9e9",
        "user": json.dumps(inputs.text(chance, 4)) if chance.random() < 0.5 else "null",
        "claims": json.dumps({inputs.text(chance, 3): names}),
    }
    while chance.random() < 0.3:
        name = chance.choice((*fields, "more"))
        fields[name] = chance.choice((*TIMES, *VALUES))
    if chance.random() < 0.05:
        del fields[chance.choice(list(fields))]
    text = ",".join(f'"{name}":{value}' for name, value in fields.items())
    payload = f"{{{text}}}".encode()
    return inputs.mutated(chance, payload) if chance.random() < 0.1 else payload


def _change(chance: Random) -> tuple[int, int, str]:
    # From either end, since the signature is the last part.
    where = chance.choice((0, chance.randrange(200), -chance.randrange(1, 50)))
    return where, chance.choice((0, 1, 1, 2, 50)), chance.choice(PUT)


def check(case: Case) -> None:
    """Raise if the invariant does not hold."""
    key, salt, payload, is_zipped, changes = case
    text = original = _signed(key, salt, payload, is_zipped)
    for where, length, put in changes:
        start = where % (len(text) + 1)
        text = text[:start] + put + text[start + length :]
    expected = _said(payload) if key in KEYS and salt == SALT else None
    found = _verified(text)
    if found is None:
        assert text != original or expected is None, "what was signed is refused"
        return
    assert found == expected
    assert _spelled_once(text) == _spelled_once(original)


def _signed(key: str, salt: str, payload: bytes, is_zipped: bool) -> str:
    body = base64_encode(payload)
    if is_zipped:
        body = b"." + base64_encode(zlib.compress(payload))
    signer = Signer(key, salt=salt, key_derivation="hmac", digest_method=hashlib.sha256)
    return PREFIX + signer.sign(body).decode()


def _verified(text: str) -> Token | None:
    try:
        return verified(text, KEYS)
    except TokenError:
        return None
    except Exception as error:
        raise AssertionError("an error of another kind") from error


def _spelled_once(text: str) -> tuple[str, bytes]:
    body, _, signature = text.rpartition(".")
    return body, base64_decode(signature)


def _said(payload: bytes) -> Token | None:
    """Return what a payload says, if it is that of a token that has not expired."""
    try:
        found: Any = json.loads(payload.decode())
        token = Token(**found)
    except (ValueError, TypeError):
        return None
    kinds: tuple[Any, ...] = (list, (int, float), (int, float), (str, type(None)), dict)
    if not all(isinstance(value, kind) for value, kind in zip(token, kinds, strict=True)):
        return None
    is_fine = all(isinstance(name, str) for name in token.channels)
    # No time of a case is between now and the year 2033.
    is_valid = 2e9 < token.expires < 1e11 and -1e11 < token.issued < 1e11
    return token._replace(channels=tuple(token.channels)) if is_fine and is_valid else None
