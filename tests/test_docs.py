"""The documentation: it builds, its examples run, it leaves nothing out."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import zlib
from contextlib import ExitStack, closing
from dataclasses import fields
from http.client import HTTPConnection, HTTPResponse
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest

import flask_eventstream
from flask_eventstream import errors, signals, testing
from flask_eventstream.config import Config
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.testing import client_stream

from .blocks import DOCS, blocks, pages
from .browser import chromium
from .proxies import AT_ONCE, replaced
from .servers import ROOT, free_port, running, serving

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from flask import Flask

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

README = (ROOT / "README.md").read_text("utf-8")


# Sphinx


def built(builder: str, home: Path) -> Path:
    """Build the documentation; anything that Sphinx says is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-E", "-q", "-b", builder]
    options = ["-d", str(home / "doctrees"), str(DOCS), str(home / builder)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return home / builder


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("html", tmp_path_factory.mktemp("html"))


def test_the_docs_build_without_warnings(html: Path) -> None:
    assert (html / "index.html").exists()


def test_the_examples_of_the_docs_run(tmp_path: Path) -> None:
    built("doctest", tmp_path)


def described(html: Path) -> set[str]:
    """Return the full names that the built API describes, by Sphinx's inventory."""
    inventory = (html / "objects.inv").read_bytes().split(b"\n", 4)[-1]
    lines = zlib.decompress(inventory).decode().splitlines()
    return {line.split()[0] for line in lines if " py:" in line}


def test_whatever_is_public_is_in_the_built_api(html: Path) -> None:
    public = {f"flask_eventstream.{name}" for name in flask_eventstream.__all__}
    for name in flask_eventstream.__all__:
        owner = getattr(flask_eventstream, name)
        if inspect.isclass(owner):
            public |= {f"flask_eventstream.{name}.{it}" for it in own_methods(owner)}
    for room in (errors, testing):
        public |= {f"{room.__name__}.{it}" for it in vars(room) if is_own(room, it)}
    missing = public - described(html) - INSIDE - {"flask_eventstream.EventStreamError"}
    assert not missing, f"docs/api.rst does not describe {sorted(missing)}"


def own_methods(owner: type) -> list[str]:
    """Return the public methods with a docstring that no base class has."""
    inherited = {name for base in owner.__bases__ for name in dir(base)}
    own = [name for name, it in vars(owner).items() if inspect.getdoc(it) and name[0] != "_"]
    return [name for name in own if callable(getattr(owner, name)) and name not in inherited]


def is_own(room: ModuleType, name: str) -> bool:
    """Return whether a public name with a docstring was made in a room."""
    value = getattr(room, name)
    is_there = name[0] != "_" and getattr(value, "__module__", "") == room.__name__
    return is_there and bool(getattr(value, "__doc__", ""))


def test_whatever_readers_are_told_to_import_is_in_the_built_api(html: Path) -> None:
    names, imports = described(html), r"^ *from (flask_eventstream[\w.]*) import (?:\(\n)?([\w, ]+)"
    for page in pages():
        shown = "".join(it.text for it in blocks(page) if "hide" not in it.options)
        for room, imported in re.findall(imports, shown, re.MULTILINE):
            told = [f"{room}.{name.strip()}" for name in imported.split(",") if name.strip()]
            missing = [name for name in told if name not in names | IN_WORDS]
            assert not missing, f"{page} imports what docs/api.rst does not describe: {missing}"


# The package's own rooms call these.
INSIDE = {
    "flask_eventstream.EventStreamResponse.end",
    "flask_eventstream.MemoryBroker.end_log",
    "flask_eventstream.MemoryBroker.forget_log",
    "flask_eventstream.MemoryBroker.write_log",
}
# Described in the text of the module that they are in, which the API shows.
IN_WORDS = {
    "flask_eventstream.metrics",
    "flask_eventstream.signals.event_published",
    "flask_eventstream.signals.subscriber_connected",
    "flask_eventstream.signals.subscriber_disconnected",
}


def test_the_numbers_of_the_comparison_are_those_of_the_figures() -> None:
    comparison = (DOCS / "comparison.rst").read_text("utf-8")
    figures = (DOCS / "figures.rst").read_text("utf-8")
    numbers = set(re.findall(r"\b[\d.]+(?= (?:KB|us|to [\d.]+ (?:KB|us))\b)", comparison))
    assert len(numbers) > 10
    assert not {number for number in numbers if f" {number} " not in figures}


def test_every_key_of_the_configuration_is_documented_with_its_default() -> None:
    page = (DOCS / "configuration.rst").read_text("utf-8")
    documented = re.findall(r"^``(EVENTSTREAM_\w+)`` : .*Default: ``(.*)``$", page, re.MULTILINE)
    defaults = {f"EVENTSTREAM_{field.name.upper()}": str(field.default) for field in fields(Config)}
    assert dict(documented) == defaults


def test_every_public_name_is_documented() -> None:
    page = (DOCS / "api.rst").read_text("utf-8")
    directives = r"^\.\. (?:auto|py:)(?:class|exception|function|data):: ([\w.]+)"
    documented = {name.rpartition(".")[2] for name in re.findall(directives, page, re.MULTILINE)}
    public_errors = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert not {*flask_eventstream.__all__, *public_errors} - documented
    sent = {name for name, value in vars(signals).items() if hasattr(value, "connect")}
    assert sent
    assert all(f"``{name}``" in str(signals.__doc__) for name in sent)


def test_every_room_is_in_the_design() -> None:
    page = (DOCS / "design.rst").read_text("utf-8")
    rooms = {path.stem for path in (ROOT / "flask_eventstream").glob("[a-z]*.py")}
    assert not {room for room in rooms if f"``{room}``" not in page}


# Redis


def test_another_program_publishes_as_the_documentation_says(
    redis: RedisServer, tmp_path: Path
) -> None:
    page = (DOCS / "redis.rst").read_text("utf-8")
    [block] = re.findall(r"code-block:: bash\n\n((?:   .*\n)+)", page)
    program = dedent(block).replace("redis-cli", f"redis-cli -p {redis.port}")
    program = program.replace("python ", f"{sys.executable} ")
    with closing(RedisBroker(redis.url)) as broker:
        subscription = broker.subscribe()
        done = subprocess.run(
            ["bash", "-ec", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stderr == ""
        epoch, seq, _ = done.stdout.split()
        wire = f"event: greeting\ndata: Hello!\nid: {epoch}-{seq}\n\n"
        assert subscription.take(10) == wire.encode()


# README


@pytest.fixture
def readme_app() -> Flask:
    """Run the Python of README, block after block."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, namespace)
    app: Flask = namespace["app"]
    return app


def test_the_app_of_the_readme_publishes_to_every_subscriber(readme_app: Flask) -> None:
    client = readme_app.test_client()
    with client_stream(client, "/stream") as one, client_stream(client, "/stream") as two:
        id = json.loads(client.post("/greet").text)["id"]
        events = [one.next(), two.next()]
    assert {(event.type, event.data, event.id) for event in events} == {
        ("greeting", '{"text": "Hello!"}', id)
    }


def test_the_generator_of_the_readme_streams_its_items(readme_app: Flask) -> None:
    with client_stream(readme_app.test_client(), "/count/3") as stream:
        assert [event.data for event in stream] == ['{"n": 1}', '{"n": 2}', '{"n": 3}', "{}"]


def test_the_page_of_the_readme_prints_what_the_readme_says(tmp_path: Path) -> None:
    [app] = re.findall(r"as `app.py`:\n\n```python\n(.*?)```", README, re.DOTALL)
    [printed] = re.findall(r"Both tabs print\n\n```\n(.*?)\n```", README, re.DOTALL)
    (tmp_path / "readme_app.py").write_text(app, "utf-8")
    path = f"--pythonpath={tmp_path}"
    with serving("readme_app:app", "gthread", "--threads=4", path) as server, chromium() as browser:
        page = browser.new_page()
        with page.expect_response(f"{server.url}/stream"):
            page.goto(server.url)
        page.request.post(f"{server.url}/greet")
        page.wait_for_function("document.body.innerText")
        assert page.inner_text("body") == printed


RUN_APP = """
import time
from flask import Flask, request
from flask_eventstream import eventstream

app = Flask(__name__)

@eventstream.resumable("/chat/<conversation>")
def chat(conversation):
    for character in request.json["prompt"]:
        yield character
        time.sleep(0.02)

app.register_blueprint(eventstream, url_prefix="/stream")
app.get("/")(lambda: '''<output id="text"></output><output id="state"></output><script>
const conversation = 1;
{script}
follow();
</script>''')
"""


def test_the_page_of_a_run_shows_all_of_it_after_a_reload_too(tmp_path: Path) -> None:
    docs = (DOCS / "runs.rst").read_text("utf-8")
    script = re.findall(r"code-block:: javascript\n\n((?:   .*\n|\n)+)", docs)[0]
    (tmp_path / "run_page.py").write_text(RUN_APP.replace("{script}", script), "utf-8")
    path = f"--pythonpath={tmp_path}"
    prompt = "Hé, 你好!\n👩‍💻 writes:\n\n data: x " * 3
    with serving("run_page:app", "gthread", "--threads=4", path) as server, chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        page.evaluate("(prompt) => void ask(prompt)", prompt)
        page.wait_for_function("text.value.length > 20")
        page.reload()
        page.wait_for_function("state.value === 'end'")
        assert page.evaluate("text.value") == prompt
        page.evaluate("(prompt) => void ask(prompt)", prompt)
        page.wait_for_function("text.value.length > 5 && text.value.length < 40")
        page.evaluate("void stop()")
        page.wait_for_function("state.value === 'cancelled'")
        assert prompt.startswith(page.evaluate("text.value"))


TOKEN_APP = """
from flask import Flask
from flask_eventstream import eventstream

app = Flask(__name__)
app.config.update(SECRET_KEY="secret", EVENTSTREAM_RETRY=10, EVENTSTREAM_HEARTBEAT=1)
app.register_blueprint(eventstream, url_prefix="/stream")
tokens = []

@app.post("/stream-token")
def stream_token():
    tokens.append(eventstream.token("news", max_age=3))
    if len(tokens) > 1:
        eventstream.publish("between", channel="news")
    return tokens[-1]

@app.post("/publish")
def publish():
    return eventstream.publish("first", channel="news")

app.get("/")(lambda: '''<ol></ol><script>
const show = (text) => document.querySelector("ol").append(text, ";");
{script}
follow();
</script>''')
"""


def test_the_page_with_a_token_goes_on_with_a_new_one_where_it_was(tmp_path: Path) -> None:
    docs = (DOCS / "channels.rst").read_text("utf-8")
    scripts = re.findall(r"code-block:: javascript\n\n((?:   .*\n|\n)+)", docs)
    [script] = [script for script in scripts if "stream-token" in script]
    (tmp_path / "token_page.py").write_text(TOKEN_APP.replace("{script}", script), "utf-8")
    path = f"--pythonpath={tmp_path}"
    with serving("token_page:app", "gthread", "--threads=4", path) as server, chromium() as browser:
        page = browser.new_page()
        with page.expect_response("**/stream?*"):
            page.goto(server.url)
        page.evaluate("void fetch('/publish', {method: 'POST'})")
        page.wait_for_function(
            "document.querySelector('ol').innerText.startsWith('first;between;')"
        )


PRESENCE_APP = """
from flask import Flask, abort, request
from flask_eventstream import eventstream

app = Flask(__name__)
app.config.update(SECRET_KEY="secret")
app.register_blueprint(eventstream, url_prefix="/stream")

{code}

@app.get("/as/<name>")
def page(name):
    session["name"] = name
    return '''<pre id="who"></pre><pre id="said"></pre><script>
const heard = [];
{script}
for (const type of ["join", "leave"]) on(type, (data) => heard.push(`${{type}} ${{data.member}}`));
</script>'''
"""


def test_the_page_of_a_room_shows_who_is_there_and_a_reload_is_nothing(tmp_path: Path) -> None:
    docs = (DOCS / "presence.rst").read_text("utf-8")
    [code] = re.findall(r"testcode::\n\n((?:   .*def room_events.*\n|   .*\n|\n)+)", docs)[:1]
    [script] = re.findall(r"code-block:: javascript\n\n((?:   .*\n|\n)+)", docs)
    app = PRESENCE_APP.format(code=dedent(code), script=script)
    (tmp_path / "room_page.py").write_text(app, "utf-8")
    path = f"--pythonpath={tmp_path}"
    with serving("room_page:app", "gthread", "--threads=8", path) as server, chromium() as browser:
        ada, bob = (browser.new_context().new_page() for _ in range(2))
        for page, name in ((ada, "ada"), (bob, "bob")):
            page.goto(f"{server.url}/as/{name}")
            page.wait_for_function(f"who.textContent.includes('{name}')")
        second = ada.context.new_page()
        second.goto(f"{server.url}/as/ada")
        for page in (ada, second, bob):
            page.wait_for_function("who.textContent === '2: ada, bob'")
        second.close()
        ada.reload()
        ada.wait_for_function("who.textContent === '2: ada, bob'")
        ada.evaluate(
            "fetch('/rooms/1/messages', {method: 'POST', body: new URLSearchParams({text: '<b>'})})"
        )
        bob.wait_for_function("said.textContent === 'ada: <b>\\n'")
        ada.close()
        bob.wait_for_function("who.textContent === '1: bob'")
        # Not one of the reload, or of the tab, which came before the last one was closed.
        assert bob.evaluate("heard") == ["join bob", "leave ada"]


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert all((ROOT / link).is_file() for link in links)


# gevent.pywsgi


def test_the_program_with_pywsgi_ends_its_streams_when_it_is_told_to_stop(tmp_path: Path) -> None:
    docs = (DOCS / "operations.rst").read_text("utf-8")
    [block] = re.findall(r"code-block:: python\n\n((?:      .*\n|\n)+)", docs)
    port, app = free_port(), "from tests.apps import create_app"
    program = replaced(dedent(block), ("8000", str(port)), ("from app import app", app))
    program = replaced(program, (" app)", " create_app())"))
    (tmp_path / "program.py").write_text(program, "utf-8")
    command = [sys.executable, str(tmp_path / "program.py")]
    with running(command, port, {"PYTHONPATH": str(ROOT)}) as server, ExitStack() as open_ones:
        answers = [answer_of(open_ones, port, path) for path in ("/stream", "/stream/ticks")]
        assert [answer.readline() for answer in answers] == [b":\n", b"data: 0\n"]
        server.stop(AT_ONCE)
        assert server.process.returncode == 0
        # Read to the last chunk, without which this would be an IncompleteRead.
        ends = [answer.read().splitlines()[-1] for answer in answers]
    assert all(end.startswith(b"retry: ") for end in ends)


def answer_of(open_ones: ExitStack, port: int, path: str, **headers: str) -> HTTPResponse:
    """Ask for something on a connection that stays open."""
    connection = HTTPConnection("127.0.0.1", port, timeout=AT_ONCE)
    open_ones.enter_context(closing(connection))
    connection.request("GET", path, headers=headers)
    return open_ones.enter_context(connection.getresponse())
