from __future__ import annotations

import base64
import enum
import gzip
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import EventStreamError, InvalidFieldError, TooLargeError
from flask_eventstream.event import HEARTBEAT, encode_comment, encode_data, to_json, with_id

text = st.text(st.characters(exclude_categories=["Cs"]))
lf_text = text.map(lambda value: value.replace("\r", "\n"))
one_line = text.map(lambda value: value.replace("\r", "").replace("\n", ""))
ids = one_line.map(lambda value: value.replace("\0", ""))
events = st.builds(
    ServerSentEvent,
    lf_text,
    st.none() | one_line,
    st.none() | ids,
    st.none() | st.integers(min_value=0),
)


@given(events)
def test_an_event_reads_back_as_itself(event: ServerSentEvent) -> None:
    assert EventStreamParser().feed(event.encode()) == [event]


@given(events, st.integers(min_value=1))
def test_an_event_reads_back_as_itself_after_an_id_was_put_in(
    event: ServerSentEvent, seq: int
) -> None:
    without_id = ServerSentEvent(event.data, event.type, None, event.retry)
    wire = with_id(without_id.encode(), b"e-%d" % seq)
    assert EventStreamParser().feed(wire) == [event.with_id(f"e-{seq}")]
    assert wire == event.with_id(f"e-{seq}").encode()


@given(text)
@example("a\r\nb\rc\nd")
def test_text_alone_is_encoded_like_an_event_of_it(data: str) -> None:
    assert encode_data(data) == ServerSentEvent(data).encode()


@given(text)
def test_every_kind_of_line_end_arrives_as_one_lf(data: str) -> None:
    [event] = EventStreamParser().feed(ServerSentEvent(data).encode())
    assert event.data == data.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (ServerSentEvent("x"), b"data: x\n\n"),
        (ServerSentEvent(""), b"data: \n\n"),
        (ServerSentEvent("a\n"), b"data: a\ndata: \n\n"),
        (ServerSentEvent("a\r\nb\rc\nd"), b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        (ServerSentEvent("a\u2028b\x85c\x0bd"), "data: a\u2028b\x85c\x0bd\n\n".encode()),
        (ServerSentEvent(None), b"data: null\n\n"),
        (ServerSentEvent({"a": [1, None]}), b'data: {"a": [1, null]}\n\n'),
        (ServerSentEvent(False), b"data: false\n\n"),
        (ServerSentEvent("x", id="0"), b"data: x\nid: 0\n\n"),
        (ServerSentEvent("x", id=0), b"data: x\nid: 0\n\n"),
        (ServerSentEvent("x", id=""), b"data: x\nid: \n\n"),
        (ServerSentEvent("x", type="message"), b"data: x\n\n"),
        (ServerSentEvent("x", type=""), b"data: x\n\n"),
        (
            ServerSentEvent("数据 🎉", "tick", "7", 0),
            "retry: 0\nevent: tick\ndata: 数据 🎉\nid: 7\n\n".encode(),
        ),
    ],
)
def test_the_wire_of_an_event(event: ServerSentEvent, wire: bytes) -> None:
    assert event.encode() == wire


def test_the_type_is_the_standards_default_unless_given() -> None:
    assert ServerSentEvent("x").type == ServerSentEvent("x", type=None).type == "message"


def test_every_line_has_a_space_after_its_colon_and_ends_in_lf() -> None:
    lines = ServerSentEvent(" a\n\nb", "t", "1", 5).encode().removesuffix(b"\n").split(b"\n")[:-1]
    assert all(b": " in line and b"\r" not in line for line in lines)


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize("data", [Markup("<b>"), Colour.RED])
def test_a_subclass_of_str_is_sent_as_the_text_that_it_is(data: str) -> None:
    event = ServerSentEvent(data, type=data, id=data)
    assert event.data.__class__ is str
    plain = str.__str__(data)
    assert event.encode() == f"event: {plain}\ndata: {plain}\nid: {plain}\n\n".encode()


class Number(int):
    def __str__(self) -> str:
        return "\n\ndata: forged"


def test_a_subclass_of_int_is_written_as_the_number_that_it_is() -> None:
    event = ServerSentEvent("x", id=Number(3), retry=Number(4))
    assert event.encode() == b"retry: 4\ndata: x\nid: 3\n\n"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": b"x"}, "data"),
    ({"data": bytearray(b"x")}, "data"),
    ({"data": object()}, "data"),
    ({"data": float("nan")}, "data"),
    ({"data": {"a": float("inf")}}, "data"),
    ({"data": {1, 2}}, "data"),
    ({"data": "\ud800"}, "data"),
    ({"data": ["\ud800"], "dumps": lambda value: str(value[0])}, "data"),
    ({"data": "x", "type": "a\nb"}, "type"),
    ({"data": "x", "type": "a\rb"}, "type"),
    ({"data": "x", "type": "\udfff"}, "type"),
    ({"data": "x", "type": 7}, "type"),
    ({"data": "x", "id": "a\nb"}, "id"),
    ({"data": "x", "id": "a\rb"}, "id"),
    ({"data": "x", "id": "a\0b"}, "id"),
    ({"data": "x", "id": "\ud800"}, "id"),
    ({"data": "x", "id": True}, "id"),
    ({"data": "x", "id": 1.5}, "id"),
    ({"data": "x", "id": 10**5000}, "id"),
    ({"data": "x", "retry": "3"}, "retry"),
    ({"data": "x", "retry": -1}, "retry"),
    ({"data": "x", "retry": True}, "retry"),
    ({"data": "x", "retry": 3.0}, "retry"),
    ({"data": "x", "retry": 10**5000}, "retry"),
]


@pytest.mark.parametrize(("fields", "field"), BAD)
def test_an_impossible_event_cannot_be_built(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        ServerSentEvent(**fields)
    assert caught.value.field == field
    assert isinstance(caught.value, (EventStreamError, ValueError))
    assert str(caught.value).startswith(f"{field}=")


def test_data_that_is_endless_cannot_be_built() -> None:
    data: list[Any] = []
    data.append(data)
    with pytest.raises(InvalidFieldError):
        ServerSentEvent(data)


def test_bytes_are_refused_with_a_hint_at_binary() -> None:
    with pytest.raises(InvalidFieldError, match=r"ServerSentEvent\.binary"):
        ServerSentEvent(b"x")


def test_text_with_a_surrogate_is_refused_without_an_event_too() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        encode_data("a\ud800")
    assert caught.value.value == "a\ud800"


def test_the_error_shows_a_huge_value_in_short() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        ServerSentEvent("x", type="\n" + "y" * 1_000_000)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["data", "type", "id", "retry", "other"])
def test_an_event_cannot_be_changed(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(ServerSentEvent("x"), name, "a\nb")


def test_another_id_is_checked_too() -> None:
    assert ServerSentEvent("x", "t", "1", 2).with_id("3") == ServerSentEvent("x", "t", "3", 2)
    with pytest.raises(InvalidFieldError):
        ServerSentEvent("x").with_id("a\nb")


def test_events_are_equal_by_their_fields() -> None:
    event = ServerSentEvent("x", "t", "1", 2)
    assert len({event, ServerSentEvent("x", "t", "1", 2)}) == 1
    for other in (
        ServerSentEvent("y", "t", "1", 2),
        ServerSentEvent("x", "u", "1", 2),
        ServerSentEvent("x", "t", "2", 2),
        ServerSentEvent("x", "t", "1", 3),
        ("x", "t", "1", 2),
    ):
        assert event != other
    assert repr(event) == "ServerSentEvent(data='x', type='t', id='1', retry=2)"


def test_an_event_survives_pickling() -> None:
    event = ServerSentEvent("x", "tick", 7, 9)
    assert pickle.loads(pickle.dumps(event)) == event


@pytest.mark.parametrize("encode", [lambda: ServerSentEvent("x" * 11).encode(18)])
def test_an_event_over_the_limit_is_refused(encode: Any) -> None:
    with pytest.raises(TooLargeError) as caught:
        encode()
    assert (caught.value.value, caught.value.limit) == (19, 18)
    with pytest.raises(TooLargeError):
        encode_data("x" * 11, 18)
    assert ServerSentEvent("x" * 11).encode(19) == encode_data("x" * 11, 19)


@pytest.mark.parametrize("compressed", [False, True])
@given(data=st.binary())
def test_binary_data_survives_as_base64(compressed: bool, data: bytes) -> None:
    event = ServerSentEvent.binary(data, compressed, type="image", id=3, retry=4)
    packed = base64.b64decode(event.data, validate=True)
    assert (gzip.decompress(packed) if compressed else packed) == data
    assert (event.type, event.id, event.retry) == ("image", "3", 4)


def test_the_same_binary_data_gives_the_same_event() -> None:
    first = ServerSentEvent.binary(b"x", gzip=True)
    assert base64.b64decode(first.data)[4:8] == b"\0\0\0\0"


def test_a_heartbeat_is_one_comment_line_and_no_blank_line() -> None:
    assert HEARTBEAT == encode_comment() == b":\n"


@given(text)
def test_a_comment_reads_back_and_dispatches_nothing(comment: str) -> None:
    comments: list[str] = []
    parser = EventStreamParser(on_comment=comments.append)
    assert parser.feed(encode_comment(comment)) == []
    lines = [line.removeprefix(" ") for line in comments]
    assert "\n".join(lines) == comment.replace("\r\n", "\n").replace("\r", "\n")


def test_json_goes_through_the_encoder_that_was_given() -> None:
    assert ServerSentEvent({"a": 1}, dumps=lambda value: f"<{value}>").data == "<{'a': 1}>"
    assert to_json([1]) == "[1]"


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"data: x\n\n", b"data: x\nid: a-1\n\n"),
        (b"retry: 5\ndata: x\n\n", b"retry: 5\ndata: x\nid: a-1\n\n"),
        (b"event: retry: \ndata: x\n\n", b"event: retry: \ndata: x\nid: a-1\n\n"),
    ],
)
def test_the_id_is_the_first_line_but_for_retry(wire: bytes, expected: bytes) -> None:
    assert with_id(wire, b"a-1") == expected
    assert EventStreamParser().feed(expected)[0].id == "a-1"
