"""Every code block of the documentation is run: by Sphinx, by a rule here, or by a test."""

from __future__ import annotations

import ast
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
import pytest
from flask import Flask
from flask.cli import run_command
from gunicorn.config import Config as GunicornConfig  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, generate_latest

from flask_eventstream import EventStream, EventStreamParser, ServerSentEvent, metrics
from flask_eventstream.body import SubscriptionBody
from flask_eventstream.cli import commands as cli_commands

from .blocks import Block, Shell, block, blocks, pages, typed
from .browser import chromium
from .docs_run_by import RUN_BY
from .npm import CLIENTS
from .redis_server import RedisServer
from .servers import (
    DEADLINE,
    ROOT,
    free_port,
    running,
    serving,
    skip_unless_ci,
    system_part,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

    from .servers import Server

pytestmark = pytest.mark.beside

# Sphinx's doctest builder runs these, in test_docs.
RUN_BY_SPHINX = ("testcode", "doctest", "testoutput")
# What sets up a machine or a folder, and is not run by a test. What it installs is looked at.
SETS_UP = ("mkdir", "cd", "python3", ".", "pip", "export")
INSTALLS = {
    "openai",
    "celery",
    *(f"flask-eventstream[{extra}]" for extra in ("gevent", "redis", "metrics", "gevent,redis")),
}


# The audit


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_is_run(page: str) -> None:
    unclaimed = [it for it in blocks(page) if not is_run(it)]
    rows = "".join(
        f'    {it.first_line!r}: "test_…::test_…",  # line {it.line}\n' for it in unclaimed
    )
    assert not unclaimed, (
        f"no test runs these blocks of {page}. Make each a testcode or a doctest, or have a test "
        f"extract it (tests/blocks.py), and name that test in tests/docs_run_by.py:\n{rows}"
    )


def is_run(it: Block) -> bool:
    if it.directive in RUN_BY_SPHINX:
        return "skipif" not in it.options and "+SKIP" not in it.text
    if claim(it) is not None:
        return True
    if it.page == "figures.rst":
        # What a benchmark has printed. "make bench" does it again.
        return it.argument == "text"
    if it.argument == "console":
        return all(line.startswith("$ ") and is_checked(line[2:]) for line in it.text.splitlines())
    return it.argument in ("text", "none") and is_wire(it.text)


def claim(it: Block) -> str | None:
    """Return the test that runs a block: the one of the longest beginning that is the block's."""
    claims = RUN_BY.get(it.page, {})
    found = [start for start in claims if it.first_line.startswith(start)]
    # A test that takes all files of a page takes no block that has no name.
    found = [
        start for start in found if start or "caption" in it.options or it.argument == "console"
    ]
    return claims[max(found, key=len)] if found else None


def is_wire(text: str) -> bool:
    """Return whether an example of the wire says what it seems to say: events, and all of it."""
    events = EventStreamParser().feed(f"{text}\n".encode())
    return bool(events) and b"".join(event.encode() for event in events).decode() == f"{text}\n"


def is_checked(line: str) -> bool:
    return all(is_command(shlex.split(part)) for part in line.split(" && "))


def is_command(words: list[str]) -> bool:
    """Return whether the program knows these options, by its own parser."""
    if words[0] == "pip":
        return words[1] == "install" and set(words[2:]) <= INSTALLS
    if words[0] == "gunicorn":
        return bool(GunicornConfig().parser().parse_args(words[1:]).args)
    if words[0] == "flask":
        return is_flask_command(words[3:] if words[1] == "--app" else words[1:])
    return words[0] in SETS_UP


def is_flask_command(words: list[str]) -> bool:
    group = {"eventstream": cli_commands, "run": run_command}[words[0]]
    with suppress(click.exceptions.Exit):  # --help
        context = group.make_context(words[0], words[1:])
        if isinstance(group, click.Group):
            name, command, rest = group.resolve_command(context, context._protected_args)
            assert name
            assert command
            command.make_context(name, [*rest, *context.args])
    return True


def test_what_is_installed_is_in_the_metadata() -> None:
    extras = metadata("flask-eventstream").get_all("Provides-Extra") or []
    named = {name for it in INSTALLS if "[" in it for name in it.split("[")[1][:-1].split(",")}
    assert named <= set(extras)


def test_every_test_that_is_named_is_there_and_reads_the_page() -> None:
    for page, claims in RUN_BY.items():
        starts = [it.first_line for it in blocks(page)]
        for start, test in claims.items():
            assert any(it.startswith(start) for it in starts), f"{page} has no block {start!r}"
            module, _, name = test.partition("::")
            text = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
            names = {it.name for it in ast.walk(ast.parse(text)) if isinstance(it, ast.FunctionDef)}
            assert name in names, f"there is no {test}"
            assert Path(page).stem in text, f"{module} does not read {page}"


def test_no_block_escapes_by_another_way_to_write_it() -> None:
    for page in pages():
        if page.endswith(".rst"):
            lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
            literal = [
                line for line in lines if line.endswith("::") and not line.lstrip().startswith("..")
            ]
            assert not literal, f"{page}: say what it is, with code-block"


# Pages


PAGES = """
from flask import Flask, request
from flask_eventstream import EventStream, EventStreamResponse, ServerSentEvent

app = Flask(__name__, static_folder=READ_EVENTS, static_url_path="/js")
app.config["EVENTSTREAM_RETRY"] = 10
eventstream = EventStream("eventstream", __name__)
imports = []

@eventstream.stream("/import")
def rows():
    imports.append(1)
    yield {"row": 1}
    if len(imports) == 2:
        raise ValueError

@eventstream.resumable("/chat")
def chat():
    yield from ("Hel", "lo")

app.register_blueprint(eventstream)
@app.get("/")
def page():
    return "<script>const shown = [], show = (it) => shown.push(it);</script>"

@app.get("/numbers")
def numbers():
    return EventStreamResponse(range(3))

@app.post("/report")
def report():
    return EventStreamResponse([f"building {request.json['name']}"])

@app.post("/publish")
def publish():
    return eventstream.publish(request.json, request.args.get("type"))

@app.post("/map")
def binary():
    return eventstream.publish(ServerSentEvent.binary(b"0" * 1000, gzip=True, type="map"))
"""
READ_EVENTS = ROOT / "example_app" / "static" / "js"
FETCH_EVENT_SOURCE = CLIENTS / "node_modules/@microsoft/fetch-event-source/lib/esm"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("pages")
    (home / "pages.py").write_text(PAGES.replace("READ_EVENTS", repr(str(READ_EVENTS))), "utf-8")
    with serving("pages:app", "gthread", "--threads=8", f"--pythonpath={home}") as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, site: Server) -> Iterator[Callable[..., Page]]:
    """Return what opens a page with a script in it."""
    context = browser.new_context()
    context.set_default_timeout(DEADLINE * 1000)

    def open_it(script: str = "") -> Page:
        page = context.new_page()
        page.goto(site.url)
        if script:
            page.add_script_tag(content=script, type="module")
        return page

    yield open_it
    context.close()


def test_a_page_takes_a_reset_for_a_new_beginning(
    open_page: Callable[..., Page], site: Server
) -> None:
    for text in ("one", "two"):
        httpx.post(f"{site.url}/publish", json={"text": text}, timeout=DEADLINE)
    before = """
      const source = new EventSource("/stream?lastEventId=made-up");
      const list = document.createElement("ol");
      const row = (it) => it.text + ";";
      document.body.append(list);
      list.append("old");
    """
    page = open_page(before + block("channels.rst", "javascript", "reset"))
    page.wait_for_function("document.querySelector('ol')?.textContent === 'one;two;'")


def test_a_page_takes_events_by_their_type(open_page: Callable[..., Page], site: Server) -> None:
    page = open_page('const source = new EventSource("/stream");' + block("faq.rst", "javascript"))
    wait_for(lambda: greet(site) and page.evaluate("shown.length"), what="a greeting")
    assert page.evaluate("shown[0]") == "Hello!"


def greet(site: Server) -> bool:
    return httpx.post(
        f"{site.url}/publish?type=greeting", json="Hello!", timeout=DEADLINE
    ).is_success


def test_curl_shows_events_as_they_come(site: Server, tmp_path: Path) -> None:
    system_part("curl")
    command = typed("faq.rst", "curl -N").replace("http://127.0.0.1:5000", site.url)
    with ThreadPoolExecutor() as pool:
        four_lines = f"sh -c '{command} --silent | head -n 4'"
        printed = pool.submit(Shell(tmp_path).type, four_lines)
        wait_for(lambda: greet(site) and printed.done(), what="four lines")
    assert printed.result().splitlines()[2:] == ["event: greeting", "data: Hello!"]


def test_a_page_closes_a_stream_at_its_end(open_page: Callable[..., Page]) -> None:
    printed: list[str] = []
    page = open_page()
    page.on("console", lambda it: printed.append(it.text))
    script = block("generator-streams.rst", "javascript", "/numbers") + "window.source = source;"
    page.add_script_tag(content=script, type="module")
    page.wait_for_function("window.source?.readyState === EventSource.CLOSED")
    assert printed == ["0", "1", "2"]


def test_a_page_shows_items_and_is_told_of_an_error(open_page: Callable[..., Page]) -> None:
    script = "const fail = show;" + block("generator-streams.rst", "javascript", "/import")
    page = open_page(script + "window.source = source;")
    page.wait_for_function("window.source?.readyState === EventSource.CLOSED")
    assert page.evaluate("shown") == [{"row": 1}]
    page = open_page(script)
    page.wait_for_function("shown.length === 2")
    assert page.evaluate("shown") == [{"row": 1}, "The stream failed on the server."]


def test_a_page_reads_the_answer_to_a_post(open_page: Callable[..., Page]) -> None:
    script = block("generator-streams.rst", "javascript", "readEvents")
    page = open_page(script.replace("./read-events.js", "/js/read-events.js"))
    page.wait_for_function("shown.length === 1")
    assert page.evaluate("shown") == ["building sales"]


def test_a_page_unzips_binary_data(open_page: Callable[..., Page], site: Server) -> None:
    script = block("wire.rst", "javascript").replace("\n});", "\n  show(bytes.length);\n});")
    page = open_page('const source = new EventSource("/stream");' + script)
    wait_for(
        lambda: httpx.post(f"{site.url}/map", timeout=DEADLINE) and page.evaluate("shown.length")
    )
    assert page.evaluate("shown[0]") == 1000


def module_of(url: str) -> dict[str, Any]:
    """Return a module of @microsoft/fetch-event-source, as a bundler would make it."""
    text = (FETCH_EVENT_SOURCE / url.rpartition("/")[2]).read_text("utf-8")
    named = re.sub(r"from '(./\w+)'", r"from '\1.js'", text)
    return {"body": named, "content_type": "text/javascript"}


def test_fetch_event_source_reads_a_run_and_stops_at_204(
    open_page: Callable[..., Page], site: Server
) -> None:
    if not FETCH_EVENT_SOURCE.exists():
        skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
    asked: list[int] = []
    page = open_page()
    page.on("response", lambda it: asked.append(it.status) if "/chat" in it.url else None)
    page.route("**/fes/*", lambda route: route.fulfill(**module_of(route.request.url)))
    script = (
        block("runs.rst", "javascript", "fetchEventSource")
        + "shown.push(controller.signal.aborted);"
    )
    imports = 'import { fetchEventSource } from "/fes/index.js";'
    page.add_script_tag(content=f'{imports} const url = "/stream/chat"; {script}', type="module")
    page.wait_for_function("shown.length === 4")
    events = page.evaluate("shown.slice(0, 3).map((it) => [it.event, it.data, it.id])")
    assert [event[:2] for event in events] == [["", "Hel"], ["", "lo"], ["end", "{}"]]
    again = f'{imports} const url = "/stream/chat?lastEventId={events[-1][2]}"; {script}'
    page.add_script_tag(content=again, type="module")
    page.wait_for_function("shown.length === 5")
    assert page.evaluate("[shown[3], shown[4]]") == [False, True]
    assert asked == [200, 204]


def test_the_quickstart_greets_two_tabs(browser: Browser, tmp_path: Path) -> None:
    [app, *_] = [it.text for it in blocks("quickstart.rst") if it.directive == "testcode"]
    (tmp_path / "app.py").write_text(app, "utf-8")
    port, curl = free_port(), system_part("curl")
    shell = Shell(tmp_path, FLASK_RUN_PORT=str(port))
    with (
        shell.typing(typed("quickstart.rst", "flask --app app run")),
        browser.new_context() as tabs,
    ):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/"), what="flask run")
        pages = [tabs.new_page(), tabs.new_page()]
        for page in pages:
            with page.expect_response("**/stream"):
                page.goto(f"http://127.0.0.1:{port}/")
        ask = typed("quickstart.rst", "curl").replace("5000", str(port))
        shell.type(ask.replace("curl", f"{curl} --silent"))
        for page in pages:
            page.wait_for_function("document.body.innerText === 'Hello!'")


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=DEADLINE).status_code == 200
    return False


# Programs


def test_the_programs_publish_to_the_app_with_its_setting(redis: RedisServer) -> None:
    texts = [it.text for it in blocks("redis.rst") if it.argument == "python"]
    config, publish, publish_many = (
        it.replace("redis://127.0.0.1:6379/0", redis.url) for it in texts
    )
    app, eventstream = Flask("docs"), EventStream("eventstream", "docs")
    names: dict[str, Any] = {"app": app, "lines": ["a", "b"]}
    exec(config, names)
    app.register_blueprint(eventstream)
    broker = app.extensions["eventstream"].broker
    with closing(broker), closing(broker.subscribe("job:7", "log")) as subscription:
        exec(publish, names)
        exec(publish_many, names)
        names["broker"].close()
        parser = EventStreamParser()
        events: list[ServerSentEvent] = []
        while len(events) < 3:
            wire = subscription.take(DEADLINE)
            assert wire, events
            events += parser.feed(wire)
    assert [(it.type, it.data) for it in events] == [
        ("progress", '{"done": 40}'), ("message", '{"line": "a"}'), ("message", '{"line": "b"}')
    ]  # fmt: skip


def test_redis_starts_with_the_settings_of_the_page(tmp_path: Path) -> None:
    settings = block("redis.rst", "text", "maxmemory-policy")
    options = [f"--{line}" for line in settings.splitlines()]
    words = [word for option in options for word in option.split(" ", 1)]
    with closing(RedisServer(tmp_path, *words)) as server:
        found: Any = server.redis.config_get(
            "maxmemory-policy", "appendonly", "client-output-buffer-limit"
        )
    assert (found["maxmemory-policy"], found["appendonly"]) == ("noeviction", "yes")
    assert "pubsub 67108864 16777216 60" in found["client-output-buffer-limit"]


SQLALCHEMY = """
from flask import Flask, request
from flask_eventstream import EventStream
from flask_sqlalchemy import SQLAlchemy

app = Flask("docs")
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///FOLDER/docs.sqlite"
db = SQLAlchemy(app)
eventstream = EventStream("eventstream", "docs")

class Prompt(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    text = db.Column(db.String)

def llm(prompt):
    yield f"{prompt} with {db.engine.pool.checkedout()} connections"
"""


def test_the_connection_goes_back_to_the_pool_before_the_stream(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(
        SQLALCHEMY.replace("FOLDER", str(tmp_path)) + block("generator-streams.rst", "python"),
        names,
    )
    app, db = names["app"], names["db"]
    app.register_blueprint(names["eventstream"])
    with app.app_context():
        db.create_all()
        db.session.add(names["Prompt"](text="Why?"))
        db.session.commit()
        answer = app.test_client().post("/stream/chat", json={"id": 1}).text
        db.session.remove()
        db.engine.dispose()
    assert answer.startswith("data: Why? with 0 connections\n")


METERED = """
from flask import Flask
from flask_eventstream import eventstream, metrics

app = Flask(__name__)
app.register_blueprint(eventstream, url_prefix="/stream")
metrics.instrument(app)
"""


def test_metrics_of_two_workers_are_read_from_one(tmp_path: Path) -> None:
    scrape = block("metrics.rst", "python", "def scrape")
    (tmp_path / "app.py").write_text(METERED + scrape, "utf-8")
    (tmp_path / "gunicorn.conf.py").write_text(
        block("metrics.rst", "python", "child_exit"), "utf-8"
    )
    export, make, start = block("metrics.rst", "console", "PROMETHEUS").splitlines()
    variable, _, path = export.removeprefix("$ export ").partition("=")
    folder = tmp_path / path.lstrip("/")
    shell = Shell(tmp_path, **{variable: str(folder)})
    shell.type(f"sh -c '{make.removeprefix('$ ')}'")
    assert folder.is_dir()
    port = free_port()
    with shell.typing(f"{start.removeprefix('$ ')} -w 2 -b 127.0.0.1:{port} --log-level warning"):
        url = f"http://127.0.0.1:{port}/metrics"
        wait_for(lambda: answers(url), what="gunicorn")
        with httpx.stream("GET", f"http://127.0.0.1:{port}/stream", timeout=DEADLINE):
            one = "eventstream_places_taken 1.0"
            wait_for(lambda: one in httpx.get(url, timeout=DEADLINE).text.splitlines(), what=one)


def test_the_alerts_ask_for_families_that_there_are(app: Flask) -> None:
    registry = CollectorRegistry()
    metrics.instrument(app, registry)
    families = set(re.findall(r"^# TYPE (\w+)", generate_latest(registry).decode(), re.MULTILINE))
    asked = set(re.findall(r"\beventstream_\w+", block("metrics.rst", "text", "rate(")))
    assert asked
    assert {name.removesuffix("_bucket") for name in asked} <= families


def test_the_log_line_of_the_page_is_one_of_the_app(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    state = app.extensions["eventstream"]
    SubscriptionBody(state.broker.subscribe("news"), b"", 15, None, state).end("lagged")
    line = block("operations.rst", "text", "reason=")
    assert shape(line) == shape(caplog.messages[-1])


def test_nginx_keeps_the_query_out_of_its_log(tmp_path: Path) -> None:
    log, port = tmp_path / "access.log", free_port()
    lines = block("security.rst", "nginx").replace("/var/log/nginx/access.log", str(log))
    server = f"server {{ listen 127.0.0.1:{port}; location / {{ return 204; }} }}"
    temporary = "".join(
        f"{it}_temp_path {it};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"events {{}} http {{ {temporary} {lines} {server} }}", "utf-8"
    )
    own = "daemon off; pid nginx.pid; error_log stderr;"
    nginx = [
        system_part("nginx"),
        "-p",
        str(tmp_path),
        "-c",
        "nginx.conf",
        "-e",
        "stderr",
        "-g",
        own,
    ]
    with running(nginx, port) as it:
        httpx.get(f"{it.url}/stream?token=secret", timeout=DEADLINE)
        wait_for(log.read_text, what="a line in the log")
    assert '"GET /stream" 204' in log.read_text()
    assert "secret" not in log.read_text()


APP = """
from flask import Flask
from flask_eventstream import eventstream

def create_app():
    app = Flask("docs")
    app.register_blueprint(eventstream, url_prefix="/stream")
    return app
"""


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP, "utf-8")
    (tmp_path / "test_app.py").write_text(block("testing.rst", "python", "import pytest"), "utf-8")
    assert "1 passed" in Shell(tmp_path).type("python -m pytest -q -p no:cacheprovider test_app.py")


# The command line


def shape(text: str) -> list[str]:
    """Return the lines of an output without what differs each time: times, ids and numbers."""
    return re.sub(r"\d\d:\d\d:\d\d|[0-9a-f]{8}-\d+|[\d,.]*\d", "#", text).splitlines()


def shown(part: str) -> tuple[list[list[str]], str]:
    """Return the commands of a block of the page, as arguments, and what they print."""
    lines = block("cli.rst", "console", part).splitlines()
    typed = [
        shlex.split(line.rpartition("flask eventstream ")[2]) for line in lines if line[0] == "$"
    ]
    return typed, "\n".join(line for line in lines if line[0] != "$")


@pytest.fixture
def redis_app(redis: RedisServer) -> Iterator[Flask]:
    app = Flask("docs")
    app.config.update(EVENTSTREAM_BROKER_URL=redis.url, EVENTSTREAM_KEY_PREFIX=redis.prefix())
    app.register_blueprint(EventStream("eventstream", "docs"))
    with closing(app.extensions["eventstream"].broker):
        yield app


def test_the_commands_print_what_the_page_shows(redis_app: Flask) -> None:
    broker, runner = redis_app.extensions["eventstream"].broker, redis_app.test_cli_runner()
    with closing(broker.subscribe("job:7")), closing(broker.subscribe("news")):
        for part in ("eventstream publish", "eventstream channels"):
            commands, output = shown(part)
            wait_for(broker.channels)
            results = [runner.invoke(cli_commands, it, input=b"a line\n") for it in commands]
            printed = "".join(it.stdout for it in results)
            assert shape(printed) == shape(output), [it.output for it in results]


def test_listen_prints_what_the_page_shows(redis_app: Flask) -> None:
    (of_url, of_channels), output = shown("eventstream listen")
    publish = redis_app.extensions["eventstream"].broker.publish_many
    first = publish([ServerSentEvent("Hello!", type="greeting")], channel="news")[0]
    publish([{"done": 40}], channel="job:7")
    before = [f"--last-event-id={first.rpartition('-')[0]}-0"]
    printed = redis_app.test_cli_runner().invoke(cli_commands, of_channels + before)
    assert shape(printed.stdout) == shape(output)[1:], printed.output
    assert of_url[:3] == ["listen", "https://example.com/stream", "--header"]
    assert shape(output)[0] == shape(output)[1]


def test_the_doctor_finds_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: Flask
) -> None:
    monkeypatch.chdir(tmp_path)
    app.secret_key = "secret"
    [(*command, url)], output = shown("eventstream doctor")
    printed = shape(app.test_cli_runner().invoke(cli_commands, command).stdout)
    expected = shape(output)
    of_url = next(n for n, line in enumerate(expected) if "https://" in line)
    told = [
        line
        for line in expected[:of_url]
        if "descriptors" not in line and "LimitNOFILE" not in line
    ]
    assert [line for line in told if line not in printed] == []
    assert url in output
