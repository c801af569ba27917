"""The chat API of the example, as the official clients of OpenAI, curl and its page see it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import openai
import pytest
from playwright.sync_api import expect

from example_app import create_app
from example_app.model import TOKENS_BEFORE_FAILURE, answer, tokens

from .servers import DEADLINE, ROOT, Server, serving, skip_unless_ci, system_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask.testing import FlaskClient
    from openai.types.chat import ChatCompletionChunk
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.beside

CLIENTS = ROOT / "tests" / "clients"
PROMPT = "What is an event stream?"
ANSWER = list(answer(PROMPT))
TEXT = "".join(ANSWER)
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
USAGE = {
    "prompt_tokens": len(tokens(PROMPT)),
    "completion_tokens": len(ANSWER),
    "total_tokens": len(tokens(PROMPT)) + len(ANSWER),
}
FAILED = "The stream failed on the server."
# What a shell, Python, JSON or HTML would take for their own.
TRICKY = """It's "$HOME" `date` \\n <b>&amp;</b> !! {x} 世界 👩‍💻"""

expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Server]:
    """One whose answers take ten seconds, so that each of them is cancelled in its middle."""
    app = "example_app:create_app({'TOKEN_SECONDS': 0.1})"
    with serving(app, "gthread", "--threads", "8") as server:
        yield server
        assert server.log() == ""


@pytest.fixture(scope="module")
def server(slow_server: Server) -> Iterator[Server]:
    # After the slow one, which starts in the background meanwhile.
    with serving("example_app:create_app({'TOKEN_SECONDS': 0.001})", "gevent") as server:
        yield server
        # The broken model breaks, and nothing else does.
        errors = re.findall(r"^\S*(?:Error|Exception)\b", server.log(), re.M)
        assert set(errors) <= {"RuntimeError"}


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.goto(f"{server.url}/chat-api")
    yield page
    context.close()


@pytest.fixture
def client() -> FlaskClient:
    return create_app({"TESTING": True, "TOKEN_SECONDS": 0.0}).test_client()


@pytest.fixture(scope="module")
def official(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def fate(server: Server, id: str) -> dict[str, Any]:
    """Return what has become of the generator that wrote an answer."""
    url = f"{server.url}/v1/chat/completions/{id}/report"
    with (
        httpx.Client(timeout=DEADLINE) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
        told: dict[str, Any] = json.loads(next(source.iter_sse()).data)
        return told


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# The official Python client


def test_the_python_client_reads_a_stream(server: Server, official: openai.OpenAI) -> None:
    chunks = list(
        official.chat.completions.create(
            model="local", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert text_of(chunks) == TEXT
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert [reason for reason in reasons if reason] == [reasons[-1]] == ["stop"]
    usages = [chunk.usage.model_dump(exclude_unset=True) for chunk in chunks if chunk.usage]
    assert (usages, chunks[-1].choices) == ([USAGE], [])
    assert fate(server, chunks[0].id) == {"tokens": len(ANSWER), "outcome": "finished"}


def test_the_python_client_reads_an_answer_in_one_piece(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["local", "local-broken"]
    completion = official.chat.completions.create(model="local", messages=MESSAGES)
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert (completion.object, choice.finish_reason) == ("chat.completion", "stop")
    assert completion.usage is not None
    assert completion.usage.model_dump(exclude_unset=True) == USAGE


@pytest.mark.parametrize("stream", [False, True])
def test_the_python_client_raises_what_is_refused_before_the_first_token(
    official: openai.OpenAI, stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        official.chat.completions.create(model="unknown", messages=MESSAGES, stream=stream)
    with pytest.raises(openai.BadRequestError) as bad:
        official.chat.completions.create(model="local", messages=[], stream=stream)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "messages")


def test_the_python_client_raises_an_error_in_the_middle_of_a_stream(
    server: Server, official: openai.OpenAI
) -> None:
    broken = official.chat.completions.create(model="local-broken", messages=MESSAGES, stream=True)
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match=FAILED) as error:
        chunks.extend(broken)
    assert text_of(chunks) == "".join(ANSWER[:TOKENS_BEFORE_FAILURE])
    assert (type(error.value), error.value.type) == (openai.APIError, "server_error")
    assert fate(server, chunks[0].id) == {"tokens": TOKENS_BEFORE_FAILURE, "outcome": "failed"}


def test_the_python_client_raises_an_error_in_an_answer_in_one_piece(
    official: openai.OpenAI,
) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        official.chat.completions.create(model="local-broken", messages=MESSAGES)
    assert error.value.type == "server_error"
    assert "RuntimeError" not in error.value.message


def test_the_generator_is_closed_when_the_python_client_closes_its_stream(
    slow_server: Server, official: openai.OpenAI
) -> None:
    slow = official.with_options(base_url=f"{slow_server.url}/v1")
    stream = slow.chat.completions.create(model="local", messages=MESSAGES, stream=True)
    chunks = [next(stream), next(stream)]
    stream.close()
    closed = fate(slow_server, chunks[0].id)
    assert text_of(chunks) == ANSWER[0]
    assert closed["outcome"] == "closed"
    assert closed["tokens"] < len(ANSWER)


# The official client from npm


def test_the_npm_client_gets_the_same_answers_and_errors(
    server: Server, slow_server: Server
) -> None:
    node = system_part("node")
    if not (CLIENTS / "node_modules" / "openai").exists():
        skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
    command = [node, "openai.mjs", f"{server.url}/v1", f"{slow_server.url}/v1", PROMPT]
    ended = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["stream"] == {"text": TEXT, "reasons": ["stop"], "usage": USAGE}
    assert told["in one piece"] == told["stream"]
    unknown, bad = told["unknown model"], told["bad request"]
    assert (unknown["class"], unknown["code"]) == ("NotFoundError", "model_not_found")
    assert (bad["class"], bad["status"], bad["text"]) == ("BadRequestError", 400, "")
    broken = told["error in the middle"]
    assert (broken["class"], broken["message"]) == ("APIError", FAILED)
    assert broken["text"] == "".join(ANSWER[:TOKENS_BEFORE_FAILURE])
    cancelled = told["cancelled"]
    assert TEXT.startswith(cancelled["text"])
    assert fate(slow_server, cancelled["id"])["outcome"] == "closed"


# The wire


def test_a_stream_is_typed_chunks_and_then_done(client: FlaskClient) -> None:
    response = client.post(
        "/v1/chat/completions", json={"model": "local", "messages": MESSAGES, "stream": True}
    )
    assert response.mimetype == "text/event-stream"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert len(chunks) == 1 + len(ANSWER) + 1
    assert not any("usage" in chunk for chunk in chunks)


def test_the_last_message_of_the_user_is_the_prompt(client: FlaskClient) -> None:
    parts = [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "It"},
    ]
    response = client.post("/v1/chat/completions", json={"model": "local", "messages": messages})
    assert response.json is not None
    assert response.json["choices"][0]["message"]["content"] == TEXT
    said = ["Be brief.", "Hello!", PROMPT, "It"]
    assert response.json["usage"]["prompt_tokens"] == sum(len(tokens(text)) for text in said)


def test_half_a_character_does_not_break_an_answer(client: FlaskClient) -> None:
    body = '{"model": "local", "messages": [{"role": "user", "content": "\\ud83d!"}]}'
    response = client.post("/v1/chat/completions", data=body, content_type="application/json")
    assert response.json is not None
    assert response.json["choices"][0]["message"]["content"] == "".join(answer("?!"))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": ["Hello!"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": True}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_a_bad_body_is_refused_and_its_parameter_named(
    client: FlaskClient, changes: dict[str, Any], param: str
) -> None:
    body = {"model": "local", "messages": MESSAGES, **changes}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json is not None
    assert response.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions", 400),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/nothing", 404),
    ],
)
def test_every_error_is_the_json_that_clients_expect(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    response = client.open(path, method=method, data="[", content_type="application/json")
    assert (response.status_code, response.mimetype) == (status, "application/json")
    assert response.json is not None
    assert response.json["error"].keys() == {"message", "type", "param", "code"}


# The page


def test_the_page_shows_the_answer_character_for_character(page: Page) -> None:
    for is_stream in (True, False):
        page.set_checked("#stream", is_stream)
        page.fill("#prompt", TRICKY)
        page.click("#ask")
        expect(page.locator("#state")).to_have_text("finished")
        assert page.locator("#answer").text_content() == "".join(answer(TRICKY))
        ran = f"The generator ran to its end, after {len(list(answer(TRICKY)))} tokens."
        expect(page.locator("#report")).to_have_text(ran)


def test_the_page_shows_the_error_of_the_broken_model(page: Page) -> None:
    page.select_option("#model", "local-broken")
    page.click("#ask")
    expect(page.locator("#state")).to_have_text("failed")
    assert page.locator("#problem").text_content() == FAILED
    assert page.locator("#answer").text_content() == "".join(ANSWER[:TOKENS_BEFORE_FAILURE])
    page.fill("#prompt", " ")
    page.click("#ask")
    expect(page.locator("#problem")).to_have_text("'messages' has no text of a user.")


def test_stop_closes_the_generator_and_the_page_says_so(page: Page, slow_server: Server) -> None:
    page.goto(f"{slow_server.url}/chat-api")
    page.click("#ask")
    expect(page.locator("#answer")).to_contain_text(ANSWER[0])
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#report")).to_contain_text("was closed")
    assert TEXT.startswith(page.locator("#answer").text_content() or "?")


def test_the_commands_that_the_page_shows_do_what_the_page_does(page: Page) -> None:
    text = "".join(answer(TRICKY))
    page.fill("#prompt", TRICKY)
    lines = run_in_a_shell(page.locator("#curl").text_content() or "").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert run_as_python(page.locator("#python").text_content() or "") == text
    page.uncheck("#stream")
    page.click("[data-of=python]")
    expect(page.locator("[data-of=python]")).to_have_text("Copied")
    assert run_as_python(page.evaluate("navigator.clipboard.readText()")) == f"{text}\n"
    told = json.loads(run_in_a_shell(page.locator("#curl").text_content() or ""))
    assert told["choices"][0]["message"]["content"] == text


def run_in_a_shell(command: str) -> str:
    system_part("curl")
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def run_as_python(source: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names: dict[str, Any] = {}
        exec(source, names)
        names["client"].close()
    return printed.getvalue()
