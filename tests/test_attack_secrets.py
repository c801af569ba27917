"""Every way to read the channel or the run of somebody else, and to forge what opens it."""

from __future__ import annotations

import json
import re
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_eventstream import EventStream
from flask_eventstream.testing import client_stream
from flask_eventstream.tokens import PREFIX, TokenError, new_token, signed, verified

from .attack_requests import Answer, new_environ

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKER = "what-only-alice-may-read"
KEYS = ["key"]


class Site:
    """An app where each user may read a channel of his own, and Alice has a run.

    :ivar known: what Bob may have learned elsewhere: ids, cursors, tokens, by names.
    """

    def __init__(self) -> None:
        self.app, self.eventstream = Flask(__name__), EventStream("eventstream", __name__)
        self.gate = threading.Event()
        self.app.secret_key = KEYS[0]
        self.app.config["EVENTSTREAM_HEARTBEAT"] = 1e-6
        self.eventstream.authorize(lambda name: name in ("sse", f"user:{self.user()}"))
        self.eventstream.identify(self.user)
        self.eventstream.resumable("/chat/<name>", owner=self.user, heartbeat=20)(self.chat)
        self.app.register_blueprint(self.eventstream)
        self.app.add_url_rule("/health", view_func=self.eventstream.health)
        self.app.add_url_rule("/mine", view_func=self.mine)
        self.broker = self.app.extensions["eventstream"].broker

    def user(self) -> str | None:
        return request.headers.get("X-User")

    def mine(self) -> Any:
        return self.eventstream.subscribe(f"user:{self.user()}", history=9)

    def chat(self, name: str) -> Iterator[str]:
        yield f"{MARKER} {name}"
        self.gate.wait()

    def learn(self, run: str) -> None:
        with self.app.app_context():
            first = self.eventstream.last_event_id()
            minted = self.eventstream.publish(MARKER, channel="user:alice")
            own = self.eventstream.publish(MARKER, id="own-id-of-alice", channel="user:alice")
            self.known = {
                "first": first,
                "minted": minted,
                "own": own,
                "run": run,
                "zero": minted.partition("-")[0] + "-0",
                "future": minted.partition("-")[0] + "-99999",
                "other epoch": "00000000-1",
                "bob": self.eventstream.token("user:bob", user="bob"),
                "any": self.eventstream.token("sse"),
                "expired": signed(
                    new_token(("user:alice",), 60, "alice", {})._replace(expires=1), KEYS
                ),
                "forged": signed(new_token(("user:alice",), 60, "alice", {}), ["guessed"]),
            }

    def seen(self, method: str, path: str, query: str, headers: dict[str, str]) -> Answer:
        """Return what Bob sees while something is published for Alice, with his own in between."""
        fields: dict[str, Any] = {
            f"HTTP_{name.upper().replace('-', '_')}": value.format_map(self.known)
            for name, value in {"Host": "localhost", "X-User": "bob", **headers}.items()
        }
        environ = new_environ(method, path, query.format_map(self.known), **fields)
        with closing(Answer(self.app, environ)) as answer, self.app.app_context():
            for channel in ("user:alice", "user:bob", "sse"):
                self.eventstream.publish(
                    f"{MARKER} {channel}" * (channel == "user:alice"), channel=channel
                )
            answer.read(2)
        return answer


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    alice = {"X-User": "alice"}
    with client_stream(
        site.app.test_client(), "/stream/chat/x", method="POST", headers=alice
    ) as stream:
        assert stream.next().data == f"{MARKER} x"
        site.learn(stream.headers["X-Run-Id"])
        yield site
        site.gate.set()


Way = tuple[str, str, str, dict[str, str], set[int]]
OPENED, REFUSED = {200}, {400, 401, 403, 404, 405}
A = "channel=user:alice"
CURSORS = ["first", "minted", "own", "zero", "future", "other epoch"]
LOOKALIKES = [
    "*", "user:*", "user:?lice", "user:[a]lice", "user:\\alice", "%2A", "user:alice%20",
    "User:alice", "user:alice%00", "user:alice%0A", "user:bob%0Auser:alice", "user:bob,user:alice",
    "user:a%CC%81lice", "eventstream:0:channel:user:alice", "eventstream:*", "eventstream:0:state",
    "%EF%BD%95ser:alice", "user%253Aalice", "%1Frun:{run}", "run:{run}", "{run}", "../user:alice",
    "user:alice%E2%80%8B",
]  # fmt: skip
ELSEWHERE = ["/stream/", "//stream", "/stream//", "/./stream", "/stream/.", "/STREAM", "/stream%2F"]
OVERRIDES = ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"]

WAYS: list[Way] = [
    ("GET", "/stream", A, {}, {403}),
    ("HEAD", "/stream", A, {}, {403}),
    ("GET", "/stream", f"channel=user:bob&{A}", {}, {403}),
    ("GET", "/stream", f"{A}&channel=user:bob", {}, {403}),
    ("GET", "/stream", f"channel=user:bob&x={A}", {}, OPENED),
    ("GET", "/stream", f"channel=user:bob;{A}", {}, {403}),
    ("GET", "/stream", "channel=user:bob&Channel=user:alice&channel[]=user:alice", {}, OPENED),
    ("GET", "/stream;channel=user:alice", "", {}, {404}),
    ("GET", "/stream", A, {"X-User": "bob, alice"}, {403}),
    # With tokens of others, for others, and forged ones
    ("GET", "/stream", A + "&token={bob}", {}, {403}),
    ("GET", "/stream", A + "&token={any}", {}, {403}),
    ("GET", "/stream", A, {"Authorization": "Bearer {bob}"}, {403}),
    ("GET", "/stream", "channel=user:bob&" + A + "&token={bob}", {}, {403}),
    ("GET", "/stream", "token={bob}", {"X-User": "alice"}, OPENED),
    ("GET", "/stream", A + "&token={expired}", {}, {401}),
    ("GET", "/stream", A + "&token={forged}", {}, {401}),
    ("GET", "/stream", A, {"Authorization": "Bearer {forged}"}, {401}),
    ("GET", "/stream", "token={bob}&token={forged}&" + A, {}, {403}),
    # Logs, and names that look like others
    *(("GET", "/stream", f"channel={name}", {}, {400, 403}) for name in LOOKALIKES),
    # Runs, by guesses and by what is known of them; see also the tests of resumable views
    *(
        (method, path, query, {}, {404})
        for method in ("GET", "POST", "DELETE")
        for path in ("/stream/chat/x", "/stream/chat/y")
        for query in ("run={run}", "run=AAAAAAAAAAAA", "run=", "run=*", "run={run}&run=y")
    ),
    ("GET", "/stream/chat/x", "", {"Last-Event-ID": "{run}.0"}, {404}),
    ("GET", "/stream/chat/x", "", {"Last-Event-ID": "{minted}"}, {404}),
    ("GET", "/stream/chat/x", "owner=alice&user=alice", {}, {204}),
    ("GET", "/stream/chat/x", "run={run}", {"Authorization": "Bearer {bob}"}, {404}),
    ("HEAD", "/stream/chat/x", "run={run}", {}, OPENED),
    ("GET", "/stream/chat/../chat/x", "run={run}", {}, {404}),
    ("GET", "/stream/chat/x/", "run={run}", {}, {404}),
    # Methods and paths that the routes do not have
    *(
        (method, path, query, {}, {405})
        for method in ("PUT", "PATCH", "TRACE", "PROPFIND")
        for path, query in (("/stream", A), ("/stream/chat/x", "run={run}"), ("/mine", A))
    ),
    ("POST", "/stream", A, {}, {405}),
    ("DELETE", "/stream", A, {}, {405}),
    *(("OPTIONS", path, A, {}, OPENED) for path in ("/stream", "/stream/chat/x", "/mine")),
    *(("POST", "/stream", A, {name: "GET"}, {405}) for name in OVERRIDES),
    *(("GET", "/stream", A, {name: "HEAD"}, {403}) for name in OVERRIDES),
    *(
        ("GET", path, A, {}, {403, 404}) for path in ELSEWHERE
    ),
    ("GET", "/health", A, {}, OPENED),
    ("GET", "/stream", A, {"X-Original-URL": "/mine", "X-Rewrite-URL": "/mine"}, {403}),
]  # fmt: skip


def assert_nothing_of_alice(site: Site, answer: Answer, asked: str) -> None:
    shown = f"{answer.fields} {answer.body.decode()}"
    assert MARKER not in shown
    for name in ("own", "run", "minted"):
        # What one has sent oneself may come back in words.
        is_shown = re.search(rf"{re.escape(site.known[name])}\b", shown)
        assert not is_shown or "{" + name + "}" in asked


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way[:4]))[:90])
def test_there_is_no_way_to_what_belongs_to_somebody_else(site: Site, way: Way) -> None:
    method, path, query, headers, codes = way
    before = site.broker.subscriptions
    answer = site.seen(method, path, query, headers)
    assert answer.code in codes
    assert_nothing_of_alice(site, answer, f"{query} {headers}")
    assert site.broker.subscriptions == before


@pytest.mark.parametrize("where", ["Last-Event-ID", "lastEventId", "last_event_id"])
@pytest.mark.parametrize("cursor", CURSORS)
@pytest.mark.parametrize("channel", ["sse", "user:bob", "user:bob&channel=sse"])
def test_a_cursor_of_another_channel_opens_nothing_of_it(
    site: Site, channel: str, cursor: str, where: str
) -> None:
    known, query = "{" + cursor + "}", f"channel={channel}"
    is_header = where == "Last-Event-ID"
    answer = site.seen(
        "GET",
        "/stream",
        query if is_header else f"{query}&{where}={known}",
        {where: known} if is_header else {},
    )
    assert answer.code == 200
    assert_nothing_of_alice(site, answer, known)
    # And an id that exists is no other answer than one that does not.
    for id in ("own", "guess"):
        site.known["tried"] = site.known.get(id, id)
        answer = site.seen("GET", "/stream", query, {"Last-Event-ID": "{tried}"})
        [found] = re.findall(rb"event: reset\ndata: (.*)", answer.body)
        assert json.loads(found)["requested"] == site.known["tried"]
        assert MARKER.encode() not in answer.body


def test_alice_herself_can_read_all_that(site: Site) -> None:
    for path, query in (("/stream", A), ("/mine", ""), ("/stream/chat/x", "run={run}")):
        answer = site.seen("GET", path, query, {"X-User": "alice"})
        assert answer.code == 200
        assert MARKER.encode() in answer.body


# --- Tokens, character by character

PAYLOAD = new_token(("user:alice", "news"), 3600, "alice", {"room": 7})
WIRE = signed(PAYLOAD, KEYS)
OTHER = signed(new_token(("user:bob",), 3600, "bob", {}), KEYS)
printable = [chr(number) for number in range(0x21, 0x7F)]


def is_token(text: str) -> bool:
    """Tell whether a text verifies; then it says what was signed, and nothing else."""
    try:
        token = verified(text, KEYS)
    except TokenError:
        return False
    assert token in (verified(WIRE, KEYS), verified(OTHER, KEYS))
    return True


def test_no_character_can_be_another_one() -> None:
    """But for other spellings of the same signature.

    The last character of a signature has two bits that nobody reads, and base64 has ``+`` and ``/``
    for ``-`` and ``_``. Such a text says the same to the same end, and is revoked with the user:
    nothing is counted or remembered by the text of a token, so that is harmless.
    """
    signature = len(WIRE) - WIRE[::-1].index(".")
    malleable = {
        n
        for n in range(len(WIRE))
        for character in (*printable, "\0", "\n", " ", "é", "\udc80")
        if character != WIRE[n] and is_token(WIRE[:n] + character + WIRE[n + 1 :])
    }
    assert len(WIRE) - 1 in malleable
    assert all(n >= signature and WIRE[n] in "-_" for n in malleable - {len(WIRE) - 1})


def test_no_part_of_a_token_is_one_nor_are_two() -> None:
    assert not any(is_token(WIRE[:n]) for n in range(len(WIRE)))
    assert not any(is_token(WIRE[n:]) for n in range(1, len(WIRE)))
    assert not any(is_token(WIRE + OTHER[n:]) for n in range(len(OTHER)))
    assert not any(is_token(OTHER[:n] + WIRE) for n in range(1, len(OTHER) + 1))
    assert is_token(WIRE)


def test_the_parts_of_two_tokens_make_no_third_one() -> None:
    [one, two] = [text.removeprefix(PREFIX).rpartition(".") for text in (WIRE, OTHER)]
    assert not is_token(f"{PREFIX}{one[0]}.{two[2]}")
    assert not is_token(f"{PREFIX}{two[0]}.{one[2]}")
    for separator in ("", ".", "..", ".e30.", "\n", " ", ",", "=", "%2E"):
        assert not is_token(f"{PREFIX}{one[0]}{separator}{two[0]}.{one[2]}")


@settings(max_examples=100)
@given(st.data())
def test_what_is_cut_changed_and_joined_at_random_says_only_what_was_signed(data: Any) -> None:
    cut = st.builds(
        lambda text, start, end: text[start:end],
        st.sampled_from([WIRE, OTHER]),
        st.integers(0, 200),
        st.integers(0, 200),
    )
    parts = data.draw(st.lists(st.one_of(cut, st.text(max_size=5)), max_size=4))
    is_token("".join(parts))
    is_token(PREFIX + "".join(parts))


def test_a_token_that_is_changed_is_401_by_every_way(site: Site) -> None:
    last = len(WIRE) - 1
    with ExitStack() as stack:
        for n in (*range(0, last, 9), last - 1):
            changed = WIRE[:n] + ("A" if WIRE[n] != "A" else "B") + WIRE[n + 1 :]
            for environ in (
                new_environ("GET", "/stream", f"token={changed}"),
                new_environ("GET", "/stream", HTTP_AUTHORIZATION=f"Bearer {changed}"),
            ):
                answer = stack.enter_context(closing(Answer(site.app, environ)))
                # What does not begin as ours is the app's own, which does not open the channel.
                assert answer.code == (200 if n < len(PREFIX) else 401)
                assert changed[10:] not in f"{answer.fields} {answer.body!r}"
