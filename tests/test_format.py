from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from markupsafe import Markup

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import ConfigurationError, InvalidFieldError, TooLargeError
from flask_eventstream.format import StreamFormat, stream_format

dumps = partial(json.dumps, allow_nan=False)


@pytest.fixture(params=["sse", "openai", "ai-sdk"])
def encoder(request: pytest.FixtureRequest) -> StreamFormat:
    return stream_format(request.param, dumps, max_bytes=40)


@pytest.mark.parametrize(
    ("item", "wire"),
    [
        ("x", b"data: x\n\n"),
        ("a\nb", b"data: a\ndata: b\n\n"),
        (Markup("<b>\n"), b"data: <b>\ndata: \n\n"),
        ("", b"data: \n\n"),
        (None, b":\n"),
        ({"a": 1}, b'data: {"a": 1}\n\n'),
        ([], b"data: []\n\n"),
        (0, b"data: 0\n\n"),
        (ServerSentEvent("x", "t", "1", 2), b"retry: 2\nevent: t\ndata: x\nid: 1\n\n"),
    ],
)
def test_the_wire_of_an_item(encoder: StreamFormat, item: Any, wire: bytes) -> None:
    assert encoder.encode(item) == wire


@pytest.mark.parametrize("item", [b"x", object(), float("nan"), "\ud800"])
def test_an_item_that_cannot_be_sent_is_refused(encoder: StreamFormat, item: Any) -> None:
    with pytest.raises(InvalidFieldError):
        encoder.encode(item)


@pytest.mark.parametrize("item", ["x" * 40, ["x" * 40], ServerSentEvent("x" * 40)])
def test_an_item_over_the_limit_is_refused(encoder: StreamFormat, item: Any) -> None:
    with pytest.raises(TooLargeError):
        encoder.encode(item)


def test_a_stream_ends_with_an_event_that_a_reconnect_tells_of() -> None:
    encoder = stream_format("sse", dumps, 1000)
    parser = EventStreamParser()
    [end] = parser.feed(encoder.end())
    assert (end.type, json.loads(end.data), parser.last_event_id) == ("end", {}, "end")
    [error] = parser.feed(encoder.error("why"))
    assert (error.type, json.loads(error.data)) == ("stream-error", {"message": "why"})
    assert parser.last_event_id == "end"


def test_openais_end_and_error_are_openais() -> None:
    encoder = stream_format("openai", dumps, 1000)
    assert encoder.end() == b"data: [DONE]\n\n"
    [error] = EventStreamParser().feed(encoder.error("why"))
    assert json.loads(error.data)["error"]["message"] == "why"
    assert (error.type, error.id) == ("message", None)


def test_the_end_and_the_errors_of_the_ai_sdk_are_parts_of_its_protocol() -> None:
    encoder = stream_format("ai-sdk", dumps, 1000)
    assert encoder.end() == b"data: [DONE]\n\n"
    for wire in (encoder.error("why"), encoder.last("cancelled", "why").encode()):
        [error] = EventStreamParser().feed(wire)
        assert json.loads(error.data) == {"type": "error", "errorText": "why"}
        assert (error.type, error.id) == ("message", None)
    assert b'"errorText": "The server stops.' in encoder.stopped(b"retry: 1\n")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'sse', 'openai' or 'ai-sdk'"):
        stream_format("xml", dumps, 1)


def test_an_item_gets_an_id_in_place_of_its_own(encoder: StreamFormat) -> None:
    assert encoder.encode_with_id("a\nb", "x.1") == b"data: a\ndata: b\nid: x.1\n\n"
    event = ServerSentEvent("a", "tick", id="own", retry=5)
    assert encoder.encode_with_id(event, "x.2") == b"retry: 5\nevent: tick\ndata: a\nid: x.2\n\n"
    with pytest.raises(InvalidFieldError):
        encoder.encode_with_id(b"binary", "x.3")


def test_what_ends_a_run_has_no_id_yet() -> None:
    encoder = stream_format("sse", json.dumps, 100)
    assert encoder.last("end") == ServerSentEvent({}, "end")
    assert encoder.last("lost", "gone") == ServerSentEvent({"message": "gone"}, "lost")
    openai = stream_format("openai", json.dumps, 100)
    assert openai.last("end") == ServerSentEvent("[DONE]")
    codes = [
        json.loads(openai.last(type, "gone").data)["error"]["code"]
        for type in ("stream-error", "cancelled", "lost")
    ]
    assert codes == [None, "cancelled", "lost"]
