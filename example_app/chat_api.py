"""The wire of OpenAI's API, with the local model behind it.

``POST /v1/chat/completions`` and ``GET /v1/models`` answer as that API does, so that its official
clients can be pointed here. Parameters that this model has no use for are ignored.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID, uuid4

from flask import Blueprint, abort, current_app, json, make_response, request

from flask_eventstream import EventStreamResponse, eventstream

from .model import answer, broken_answer, tokens

if TYPE_CHECKING:
    from collections.abc import Generator

    from werkzeug.exceptions import HTTPException
    from werkzeug.wrappers import Response as AnyResponse

api = Blueprint("chat_api", __name__, url_prefix="/v1")

MODELS = {"local": answer, "local-broken": broken_answer}
"""The models by their ids. The second one fails in the middle of every answer."""


@dataclass(frozen=True)
class Question:
    """What a request asks for."""

    model: str
    messages: list[str]
    prompt: str
    is_stream: bool
    wants_usage: bool


@api.get("/models")
def models() -> dict[str, Any]:
    about = {"object": "model", "created": 0, "owned_by": "flask_eventstream"}
    return {"object": "list", "data": [{"id": id, **about} for id in MODELS]}


@api.post("/chat/completions")
def complete() -> EventStreamResponse | dict[str, Any]:
    """Answer in one piece, or token by token."""
    question = asked()  # a 400 or 404 from here is a normal answer
    id = uuid4()
    about = {
        "id": f"chatcmpl-{id}",
        "created": int(time.time()),
        "model": question.model,
    }
    produced = produce(id, question)
    if not question.is_stream:
        return in_one_piece(about, question, produced)
    stream = chunks(about, question, produced)
    return EventStreamResponse(stream, format="openai")


def in_one_piece(
    about: dict[str, Any],
    question: Question,
    produced: Generator[str, None, None],
) -> dict[str, Any]:
    """Return a whole answer."""
    written = list(produced)
    message = {"role": "assistant", "content": "".join(written)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        **about,
        "object": "chat.completion",
        "choices": [choice],
        "usage": usage(question, len(written)),
    }


def chunks(
    about: dict[str, Any],
    question: Question,
    produced: Generator[str, None, None],
) -> Generator[dict[str, Any], None, None]:
    """Yield the chunks of an answer; format="openai" adds [DONE]."""
    about = {**about, "object": "chat.completion.chunk"}
    if question.wants_usage:
        about["usage"] = None

    def chunk(delta: dict[str, str], reason: str | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**about, "choices": [choice]}

    with closing(produced):
        # What fails before the first token is still an HTTP error.
        first = next(produced)
        yield chunk({"role": "assistant", "content": ""})
        count = 0
        for token in chain([first], produced):
            count += 1
            yield chunk({"content": token})
    yield chunk({}, "stop")
    if question.wants_usage:
        yield {**about, "choices": [], "usage": usage(question, count)}


def produce(id: UUID, question: Question) -> Generator[str, None, None]:
    """Run the model, and report what becomes of this generator."""
    count, outcome = 0, "failed"
    try:
        for token in MODELS[question.model](question.prompt):
            count += 1
            yield token
            time.sleep(current_app.config["TOKEN_SECONDS"])
        outcome = "finished"
    except GeneratorExit:
        outcome = "closed"  # the client has left
        raise
    finally:
        channel = f"completion:{id}"
        fate = {"tokens": count, "outcome": outcome}
        eventstream.publish(fate, type="ended", channel=channel)


@api.get("/chat/completions/chatcmpl-<uuid:id>/report")
def report(id: UUID) -> EventStreamResponse:
    """Let who knows the random id read; OpenAI's API has none."""
    return eventstream.subscribe(f"completion:{id}", history=1)


def usage(question: Question, written: int) -> dict[str, int]:
    """Return how many tokens went in and out."""
    read = sum(len(tokens(message)) for message in question.messages)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def asked() -> Question:
    """Return what the current request asks for; abort if that is nothing."""
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        refuse(400, "The body is no JSON object.")
    messages = _messages(body)
    model, is_stream = _model(body), _flag(body, "stream")
    prompts = [text for role, text in messages if role == "user"]
    if not prompts or not prompts[-1].strip():
        refuse(400, "'messages' has no text of a user.", "messages")
    texts = [text for _, text in messages]
    return Question(model, texts, prompts[-1], is_stream, _wants_usage(body, is_stream))


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str):
        refuse(400, "'model' is no text.", "model")
    if model not in MODELS:
        refuse(404, f"The model '{model}' does not exist.", "model", "model_not_found")
    return model


def _messages(body: dict[str, Any]) -> list[tuple[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        refuse(400, "'messages' is no list of objects with 'role' and 'content'.", "messages")
    return [(message["role"], _text(message["content"])) for message in messages]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _text(content: str | list[dict[str, str]]) -> str:
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    # JSON can carry half a character ("\ud83d"), which UTF-8 cannot.
    return text.encode(errors="replace").decode()


def _flag(fields: dict[str, Any], name: str, prefix: str = "") -> bool:
    flag = fields.get(name)
    if flag is not None and not isinstance(flag, bool):
        refuse(400, f"'{prefix}{name}' is neither true nor false.", f"{prefix}{name}")
    return bool(flag)


def _wants_usage(body: dict[str, Any], is_stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not is_stream or not isinstance(options, dict):
        refuse(400, "'stream_options' is an object, and only for a stream.", "stream_options")
    return _flag(options, "include_usage", "stream_options.")


def refuse(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> NoReturn:
    """Abort the request with an error as OpenAI's API has it."""
    abort(make_response(_error(status, message, param, code), status))


def in_json(error: HTTPException) -> AnyResponse:
    """Return the response to an error that Flask has found, such as an unknown URL."""
    response = error.get_response()
    message = error.description or error.name
    response.data = json.dumps(_error(response.status_code, message))
    response.content_type = "application/json"
    return response


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    type = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
