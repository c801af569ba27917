"""The requests for runs: who starts, resumes and cancels which, and who gets nothing."""

from __future__ import annotations

import io
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

import flask
import pytest
from flask import abort, current_app, g, got_request_exception, redirect, request

from flask_eventstream import EventStreamParser, resumable
from flask_eventstream.errors import BrokerUnavailableError, ConfigurationError
from flask_eventstream.signals import subscriber_connected, subscriber_disconnected
from flask_eventstream.subscription import FRAME_BYTES
from flask_eventstream.testing import ClientStream, client_stream

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask
    from werkzeug.test import TestResponse

    from flask_eventstream import EventStream

color: ContextVar[str] = ContextVar("color", default="none")


class Model:
    """A view that yields what it is told to, and counts how often it was started.

    An item that is a ``list`` has it wait until :meth:`go_on`.
    """

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.closed = 0
        self._next = threading.Semaphore(0)

    def __call__(self, **arguments: Any) -> Iterator[Any]:
        sent = request.get_json(silent=True) or {}
        self.starts.append(sent)
        try:
            for item in sent.get("items", ["Hé", "你好", "🙂"]):
                if isinstance(item, list):
                    assert self._next.acquire(timeout=DEADLINE)
                else:
                    yield item
        finally:
            self.closed += 1

    def go_on(self) -> None:
        self._next.release()


@pytest.fixture
def model() -> Model:
    return Model()


class Site:
    """An app with one resumable view, and its clients."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.client = app.test_client()
        self.url = "/stream/chat/1"

    def open(self, method: str = "GET", url: str = "", **options: Any) -> ClientStream:
        return client_stream(self.client, url or self.url, method=method, **options)

    def post(self, *items: Any, **options: Any) -> ClientStream:
        return self.open("POST", json={"items": items}, **options)

    def ask(self, method: str = "GET", url: str = "", **options: Any) -> TestResponse:
        """Return the whole of an answer that ends."""
        return self.client.open(url or self.url, method=method, **options)

    def cursor(self, stream: ClientStream, n: int) -> dict[str, str]:
        return {"Last-Event-ID": f"{stream.headers['X-Run-Id']}.{n}"}


@pytest.fixture
def make_site(
    eventstream: EventStream, make_app: Callable[..., Flask], model: Model
) -> Callable[..., Site]:
    def make(config: dict[str, Any] | None = None, **options: Any) -> Site:
        def chat(number: int) -> Iterator[Any]:
            yield from model()

        eventstream.resumable("/chat/<int:number>", **options)(chat)
        return Site(make_app(**(config or {})))

    return make


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def data(stream: ClientStream) -> list[str]:
    return [event.data for event in stream]


def types(stream: ClientStream) -> list[str]:
    return [event.type for event in stream]


# --- POST starts, GET resumes


def test_post_starts_a_run_and_streams_it(site: Site, model: Model) -> None:
    with site.post("Hé", "你好", {"a": 1}) as stream:
        run = stream.headers["X-Run-Id"]
        assert stream.status_code == 200
        assert stream.headers["Location"] == f"/stream/chat/1?run={run}"
        assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["Cache-Control"] == "no-cache, no-transform"
        events = list(stream)
    assert [(event.id, event.data) for event in events] == [
        (f"{run}.1", "Hé"),
        (f"{run}.2", "你好"),
        (f"{run}.3", '{"a": 1}'),
        (f"{run}.4", "{}"),
    ]
    assert events[-1].type == "end"
    assert stream.reconnection_time is not None


def test_get_resumes_from_the_start_without_a_cursor(site: Site, model: Model) -> None:
    with site.post("a", [], "b") as first, site.open() as second:
        assert first.next().data == second.next().data == "a"
        assert first.headers["X-Run-Id"] == second.headers["X-Run-Id"]
        model.go_on()
        assert data(first) == data(second) == ["b", "{}"]
    assert len(model.starts) == 1


@pytest.mark.parametrize("seen", [0, 1, 2, 3])
def test_get_resumes_after_the_cursor_live_and_when_it_has_ended(
    site: Site, model: Model, seen: int
) -> None:
    with site.post("a", "b", "c", []) as first:
        for expected in "abc":
            assert first.next().data == expected
        with site.open(headers=site.cursor(first, seen)) as live:
            model.go_on()
            assert data(live) == [*"abc"[seen:], "{}"]
        with site.open(headers=site.cursor(first, seen)) as late:
            assert data(late) == [*"abc"[seen:], "{}"]


def test_a_run_that_has_ended_is_read_from_a_place_too(make_site: Callable[..., Site]) -> None:
    site = make_site({"MAX_SUBSCRIBERS": 1})
    assert "data: a" in site.ask("POST", json={"items": ["a"]}).text
    with site.post("b", [], url="/stream/chat/2") as other:
        assert other.next().data == "b"
        refused = site.ask()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    wait_for(lambda: site.ask().status_code == 200)
    assert "data: a" in site.ask().text


def test_a_large_run_that_has_ended_is_read_in_frames(
    make_site: Callable[..., Site], model: Model
) -> None:
    site = make_site()
    items = [f"{n:10000}" for n in range(100)]
    with site.post(*items) as stream:
        assert [one.strip() for one in data(stream)][:-1] == [item.strip() for item in items]
    for n in (0, 1, 57, 100):
        response = site.client.get(site.url, headers=site.cursor(stream, n), buffered=False)
        frames: list[Any] = list(response.response)
        assert max(map(len, frames)) < FRAME_BYTES + 40_000
        events = EventStreamParser().feed(b"".join(frames))
        assert [event.data.strip() for event in events[:-1]] == [str(i) for i in range(n, 100)]
        assert events[-1].type == "end"
        response.close()


def test_a_run_that_ends_while_a_client_is_on_its_way_ends_for_it(
    site: Site, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = site.app.extensions["eventstream"].broker
    subscribe = broker.subscribe_log

    def subscribe_late(*arguments: Any) -> Any:
        monkeypatch.undo()
        assert site.ask("DELETE").status_code == 204
        return subscribe(*arguments)

    with site.post("a", []) as stream:
        assert stream.next().data == "a"
        monkeypatch.setattr(broker, "subscribe_log", subscribe_late)
        with site.open() as late:
            assert types(late) == ["message", "cancelled"]
        model.go_on()


def test_of_a_run_that_has_ended_and_whose_log_is_gone_there_is_only_a_reset(site: Site) -> None:
    run = site.ask("POST", json={"items": ["a"]}).headers["X-Run-Id"]
    site.app.extensions["eventstream"].broker.forget_log(run)
    with site.open() as stream:
        assert types(stream) == ["reset"]
    assert site.ask(headers={"Last-Event-ID": stream.last_event_id}).status_code == 204


@pytest.mark.parametrize("name", ["lastEventId", "last_event_id"])
def test_the_cursor_may_be_in_the_query(site: Site, name: str) -> None:
    with site.post("a", "b") as first:
        list(first)
    run = first.headers["X-Run-Id"]
    with site.open(url=f"{site.url}?{name}={run}.1") as stream:
        assert data(stream) == ["b", "{}"]


def test_the_location_resumes_too(site: Site) -> None:
    with site.post("a") as first:
        list(first)
    with site.open(url=first.headers["Location"]) as stream:
        assert data(stream) == ["a", "{}"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_is_at_the_end_gets_204_and_stops(site: Site, model: Model, method: str) -> None:
    with site.post("a") as first:
        list(first)
    response = site.ask(method, headers=site.cursor(first, 2))
    assert (response.status_code, response.data) == (204, b"")
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert len(model.starts) == 1


def test_where_nothing_was_started_there_is_204(site: Site) -> None:
    assert site.ask().status_code == 204


def test_a_post_with_a_cursor_never_runs_the_model_twice(site: Site, model: Model) -> None:
    with site.post("a", "b") as first:
        list(first)
    with site.post("x", headers=site.cursor(first, 1)) as stream:
        assert data(stream) == ["b", "{}"]
    with site.open("POST", first.headers["Location"]) as stream:
        assert data(stream) == ["a", "b", "{}"]
    assert site.ask("POST", headers={"Last-Event-ID": "gone.7"}).status_code == 404
    assert len(model.starts) == 1


def test_the_next_post_starts_the_next_run(site: Site) -> None:
    with site.post("a") as first:
        list(first)
    with site.post("b") as second:
        assert data(second) == ["b", "{}"]
    assert second.headers["X-Run-Id"] != first.headers["X-Run-Id"]
    with site.open() as stream:
        assert data(stream) == ["b", "{}"]
    assert site.ask(headers=site.cursor(first, 1)).status_code == 404


def test_each_url_has_a_run_of_its_own(site: Site) -> None:
    with site.post("a") as first, site.post("b", url="/stream/chat/2") as second:
        assert data(first) == ["a", "{}"]
        assert data(second) == ["b", "{}"]
    with site.open(url="/stream/chat/2") as stream:
        assert data(stream) == ["b", "{}"]


def test_a_query_belongs_to_no_url(site: Site) -> None:
    with site.post("a", url="/stream/chat/1?model=large") as first:
        list(first)
    with site.open() as stream:
        assert data(stream) == ["a", "{}"]


def test_each_host_has_runs_of_its_own(site: Site) -> None:
    with site.post("a", base_url="http://one.example") as first:
        list(first)
    assert site.ask(base_url="http://two.example").status_code == 204
    assert site.ask(base_url="http://one.example").status_code == 200


def test_a_client_that_leaves_does_not_stop_the_run(site: Site, model: Model) -> None:
    with site.post("a", [], "b") as first:
        assert first.next().data == "a"
    model.go_on()
    with site.open(headers=site.cursor(first, 1)) as stream:
        assert data(stream) == ["b", "{}"]
    assert model.closed == 1


def test_head_starts_and_tells_nothing(site: Site, model: Model) -> None:
    with site.post("a") as first:
        list(first)
    response = site.ask("HEAD")
    assert response.status_code == 200
    assert response.mimetype == "text/event-stream"
    assert "X-Run-Id" not in response.headers
    assert len(model.starts) == 1


def test_a_client_that_missed_what_is_gone_gets_a_reset(make_site: Callable[..., Site]) -> None:
    site = make_site({"MAX_RUN_BYTES": 30_000})
    with site.post(*["x" * 10_000] * 9) as first:
        list(first)
    with site.open(headers=site.cursor(first, 1)) as stream:
        reset = stream.next()
        assert reset.type == "reset"
        rest = types(stream)
    assert rest[-1] == "end"
    assert 1 < len(rest) < 6
    # Without a cursor the beginning is missing as well, and who returns to the reset goes on there.
    with site.open() as stream:
        assert stream.next().type == "reset"
    with site.open(headers={"Last-Event-ID": str(reset.id)}) as stream:
        assert types(stream) == rest


def test_who_returns_from_the_reset_of_a_broker_gets_everything(site: Site) -> None:
    with site.post("a") as first:
        list(first)
    with site.open(headers={"Last-Event-ID": "abcd0123-7"}) as stream:
        assert data(stream) == ["a", "{}"]


# --- Before the first item, and errors


def test_what_is_raised_before_the_first_item_is_a_normal_answer(
    eventstream: EventStream, make_app: Callable[..., Flask]
) -> None:
    @eventstream.resumable("/refusing")
    def refusing() -> Iterator[str]:
        abort(418, "no coffee")
        yield ""

    @eventstream.resumable("/failing")
    def failing() -> Iterator[str]:
        yield str(1 / 0)

    site = Site(make_app())
    response = site.ask("POST", "/stream/refusing")
    assert (response.status_code, "no coffee" in response.text) == (418, True)
    assert site.ask("POST", "/stream/failing").status_code == 500
    for url in ("/stream/refusing", "/stream/failing"):
        assert site.ask(url=url).status_code == 204
    site.app.testing = True
    with pytest.raises(ZeroDivisionError):
        site.ask("POST", "/stream/failing")


def test_what_is_raised_later_is_logged_signalled_and_told_without_details(
    eventstream: EventStream, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    @eventstream.resumable("/failing")
    def failing() -> Iterator[str]:
        yield "a"
        raise RuntimeError("secret")

    app = make_app()
    signalled: list[Exception] = []

    def note(_: Any, exception: Exception, **__: Any) -> None:
        signalled.append(exception)

    with got_request_exception.connected_to(note, app):
        with Site(app).open("POST", "/stream/failing") as stream:
            first, last = stream
    assert (first.data, last.type) == ("a", "stream-error")
    assert last.data == '{"message": "The stream failed on the server."}'
    assert [str(error) for error in signalled] == ["secret"]
    assert "secret" in caplog.text


def test_the_head_waits_for_the_first_item_only_so_long(
    make_site: Callable[..., Site], model: Model
) -> None:
    site = make_site(heartbeat=0.01)
    with site.post([], "a") as stream:
        model.go_on()
        assert data(stream) == ["a", "{}"]


def test_the_view_has_its_contexts_when_the_request_has_ended(
    eventstream: EventStream, make_app: Callable[..., Flask]
) -> None:
    go = threading.Event()

    @eventstream.resumable("/context")
    def context() -> Iterator[Any]:
        yield "first"
        assert go.wait(DEADLINE)
        yield [request.json["a"], g.user, color.get(), current_app.name, request.path]

    app = make_app()

    @app.before_request
    def prepare() -> None:
        g.user = "me"
        color.set("red")

    site = Site(app)
    with site.open("POST", "/stream/context", json={"a": 1}) as stream:
        assert stream.next().data == "first"
    go.set()
    with site.open(url="/stream/context") as stream:
        stream.next()
        assert stream.next().data == f'[1, "me", "red", "{app.name}", "/stream/context"]'


def test_a_form_can_be_read_when_the_request_has_ended(
    eventstream: EventStream, make_app: Callable[..., Flask]
) -> None:
    @eventstream.resumable("/form")
    def form() -> Iterator[str]:
        yield "first"
        yield request.form["prompt"]

    with Site(make_app()).open("POST", "/stream/form", data={"prompt": "你好"}) as stream:
        assert data(stream) == ["first", "你好", "{}"]


# --- A run that is active already


def test_a_second_post_attaches(site: Site, model: Model) -> None:
    with site.post("a", []) as first, site.post("b") as second:
        assert second.headers["X-Run-Id"] == first.headers["X-Run-Id"]
        model.go_on()
        assert data(first) == data(second) == ["a", "{}"]
    assert len(model.starts) == 1


def test_a_second_post_is_rejected(make_site: Callable[..., Site], model: Model) -> None:
    site = make_site(on_busy="reject")
    with site.post("a", []) as first:
        assert site.ask("POST").status_code == 409
        with site.open() as stream:
            model.go_on()
            assert data(stream) == data(first) == ["a", "{}"]
    assert site.ask("POST").status_code == 200


def test_a_second_post_replaces_the_first(make_site: Callable[..., Site], model: Model) -> None:
    site = make_site(on_busy="replace")
    with site.post("a", [], "never") as first:
        assert first.next().data == "a"
        with site.post("b") as second:
            assert data(second) == ["b", "{}"]
        assert types(first) == ["cancelled"]
    model.go_on()
    wait_for(lambda: model.closed == 2)


def test_of_many_posts_at_once_one_starts(make_site: Callable[..., Site], model: Model) -> None:
    site = make_site()
    ready = threading.Barrier(8)
    got: list[list[str]] = []

    def post() -> None:
        ready.wait(DEADLINE)
        with site.post("a", []) as stream:
            got.append(data(stream))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    with site.app.app_context():
        broker = site.app.extensions["eventstream"].broker
    wait_for(lambda: broker.subscriptions == 8)
    model.go_on()
    for thread in threads:
        thread.join(DEADLINE)
    assert got == [["a", "{}"]] * 8
    assert len(model.starts) == 1


# --- DELETE cancels


def test_delete_ends_the_run_for_all_and_keeps_what_there_is(site: Site, model: Model) -> None:
    with site.post("a", [], "b", []) as first, site.open() as second:
        assert first.next().data == second.next().data == "a"
        assert site.ask("DELETE").status_code == 204
        assert types(first) == types(second) == ["cancelled"]
    model.go_on()
    wait_for(lambda: model.closed == 1)
    with site.open() as stream:
        assert [(event.type, event.data) for event in stream] == [
            ("message", "a"),
            ("cancelled", '{"message": "The run was cancelled."}'),
        ]
    assert site.ask(headers=site.cursor(first, 2)).status_code == 204


def test_delete_of_what_has_ended_changes_nothing(site: Site) -> None:
    with site.post("a") as first:
        list(first)
    assert site.ask("DELETE").status_code == 204
    with site.open() as stream:
        assert types(stream) == ["message", "end"]


def test_delete_of_nothing_is_404(site: Site) -> None:
    assert site.ask("DELETE").status_code == 404


def test_delete_ends_only_the_run_that_is_named(site: Site, model: Model) -> None:
    with site.post("a", []) as stream:
        assert site.ask("DELETE", f"{site.url}?run=other").status_code == 404
        assert site.ask("DELETE", stream.headers["Location"]).status_code == 204
        assert types(stream) == ["message", "cancelled"]
    model.go_on()


# --- Somebody else's


@pytest.fixture
def owned(make_site: Callable[..., Site], model: Model) -> Iterator[Site]:
    """A site where a run of Alice's goes on."""

    def owner() -> str | None:
        user = request.headers.get("User") or None
        return abort(401) if user == "nobody" else user

    site = make_site(owner=owner)
    with site.post("secret", [], headers={"User": "alice"}) as stream:
        assert stream.next().data == "secret"
        site.run = stream.headers["X-Run-Id"]  # type: ignore[attr-defined]
        yield site
        model.go_on()


WAYS = {
    "GET with the run": ("GET", "?run={run}", {}),
    "GET with a cursor": ("GET", "", {"Last-Event-ID": "{run}.1"}),
    "GET with the first cursor": ("GET", "", {"Last-Event-ID": "{run}.0"}),
    "GET with a cursor of the future": ("GET", "", {"Last-Event-ID": "{run}.99"}),
    "GET with a cursor in the query": ("GET", "?lastEventId={run}.1", {}),
    "GET with both": ("GET", "?run={run}", {"Last-Event-ID": "{run}.1"}),
    "POST with the run": ("POST", "?run={run}", {}),
    "POST with a cursor": ("POST", "", {"Last-Event-ID": "{run}.1"}),
    "DELETE": ("DELETE", "", {}),
    "DELETE with the run": ("DELETE", "?run={run}", {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", ["alice's", "forged"])
def test_somebody_elses_run_is_not_found(owned: Any, way: str, run: str, model: Model) -> None:
    id = owned.run if run == "alice's" else "AAAAAAAAAAAA"
    method, query, headers = WAYS[way]
    named = {name: value.format(run=id) for name, value in headers.items()}
    response = owned.ask(method, owned.url + query.format(run=id), headers={"User": "bob", **named})
    assert response.status_code == 404
    assert "secret" not in response.text
    assert owned.run not in f"{response.headers} {response.text}"
    assert len(model.starts) == 1
    # And it goes on.
    with owned.open(headers={"User": "alice"}) as stream:
        assert stream.next().data == "secret"


def test_without_a_cursor_there_is_nothing_of_somebody_else(owned: Any) -> None:
    response = owned.ask(headers={"User": "bob"})
    assert (response.status_code, response.data) == (204, b"")
    assert "X-Run-Id" not in response.headers


def test_two_owners_have_two_runs_at_one_url(owned: Any, model: Model) -> None:
    with owned.post("bob's", headers={"User": "bob"}) as stream:
        assert data(stream) == ["bob's", "{}"]
    with owned.open(headers={"User": "alice"}) as stream:
        assert stream.next().data == "secret"


@pytest.mark.parametrize(("user", "status"), [("", 404), ("nobody", 401)])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD"])
def test_who_is_nobody_gets_nothing(owned: Any, method: str, user: str, status: int) -> None:
    assert owned.ask(method, headers={"User": user}).status_code == status


def test_a_log_cannot_be_read_as_a_channel(owned: Any) -> None:
    for prefix in ("\x1frun:", "run:", ""):
        response = owned.ask(url="/stream", query_string={"channel": prefix + owned.run})
        assert response.status_code in {400, 403}
        assert "secret" not in response.text


def test_what_guards_the_view_guards_every_request(
    eventstream: EventStream, make_app: Callable[..., Flask], model: Model
) -> None:
    def login_required(view: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(view)
        def guarded(**arguments: Any) -> Any:
            if "User" not in request.headers:
                return redirect("/login")
            return view(**arguments)

        return guarded

    @eventstream.resumable("/guarded")
    @login_required
    def guarded() -> Iterator[Any]:
        yield from model()

    site = Site(make_app())
    me = {"User": "me"}
    with site.open("POST", "/stream/guarded", headers=me) as stream:
        list(stream)
    for method in ("GET", "POST", "DELETE", "HEAD"):
        for headers in ({}, site.cursor(stream, 1)):
            assert site.ask(method, "/stream/guarded", headers=headers).status_code == 302
    assert site.ask(url="/stream/guarded", headers=me).status_code == 200
    assert len(model.starts) == 1


# --- Limits and settings


def test_too_many_runs_of_one_owner_are_429(make_site: Callable[..., Site], model: Model) -> None:
    limits = {"MAX_RUNS_PER_OWNER": 1, "MAX_RUNS": 2}
    # Heads leave at once, though the producers wait before their first item.
    site = make_site(limits, owner=lambda: request.args["user"], heartbeat=0.02)
    urls = [f"/stream/chat/{n}" for n in range(4)]
    with site.post([], "a", url=f"{urls[0]}?user=me") as one:
        response = site.ask("POST", f"{urls[1]}?user=me")
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) > 0
        # To attach is no new run.
        with site.post("x", url=f"{urls[0]}?user=me") as again:
            assert again.headers["X-Run-Id"] == one.headers["X-Run-Id"]
        with site.post([], "a", url=f"{urls[1]}?user=you"):
            assert site.ask("POST", f"{urls[2]}?user=they").status_code == 429
            model.go_on()
            model.go_on()
    # Not only their generators have ended: their places are free.
    wait_for(lambda: not site.app.extensions["eventstream"].runs.active)
    assert model.closed == 2
    assert site.ask("POST", f"{urls[2]}?user=me").status_code == 200


def test_a_run_needs_room_for_its_client(make_site: Callable[..., Site], model: Model) -> None:
    site = make_site({"MAX_SUBSCRIBERS": 1})
    with site.post("a", []):
        assert site.ask("POST", "/stream/chat/2").status_code == 503
        assert site.ask().status_code == 503
        model.go_on()
    assert len(model.starts) == 1


@pytest.mark.parametrize(
    "options", [{"on_busy": "queue"}, {"heartbeat": 0}, {"format": "xml"}, {"heartbeat": "soon"}]
)
def test_a_bad_setting_is_an_error_that_names_it(
    eventstream: EventStream, options: dict[str, Any]
) -> None:
    def view() -> Iterator[str]:
        yield ""

    with pytest.raises(ConfigurationError, match=next(iter(options))):
        eventstream.resumable("/x", **options)(view)


def test_a_view_whose_code_would_run_for_all_is_refused(eventstream: EventStream) -> None:
    def view() -> Iterator[str]:
        return iter("abc")

    with pytest.raises(TypeError, match="yield from"):
        eventstream.resumable("/x")(view)


def test_the_view_itself_is_returned_and_has_its_endpoint(
    eventstream: EventStream, make_app: Callable[..., Flask]
) -> None:
    def view() -> Iterator[str]:
        yield "x"

    assert eventstream.resumable("/x")(view) is view
    eventstream.resumable("/y", endpoint="other")(view)
    rules = {rule.endpoint: rule for rule in make_app().url_map.iter_rules()}
    assert rules["eventstream.view"].methods == {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
    assert "eventstream.other" in rules


# --- Formats, signals, the broker


def test_openais_format(make_site: Callable[..., Site], model: Model) -> None:
    site = make_site(format="openai")
    with site.post({"id": "x"}) as stream:
        assert data(stream) == ['{"id": "x"}', "[DONE]"]
    with site.post("a", []) as stream:
        assert stream.next().data == "a"
        site.ask("DELETE")
        assert data(stream) == [
            '{"error": {"message": "The run was cancelled.", "type": "server_error", '
            '"param": null, "code": "cancelled"}}'
        ]
    model.go_on()


def test_clients_of_runs_are_signalled_as_subscribers(site: Site, model: Model) -> None:
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _, **__: seen.append(name)

    connected, disconnected = note("connected"), note("disconnected")
    with subscriber_connected.connected_to(connected, site.app):
        with subscriber_disconnected.connected_to(disconnected, site.app):
            with site.post("a", []) as stream:
                stream.next()
                model.go_on()
                list(stream)
            wait_for(lambda: seen == ["connected", "disconnected"])


def test_while_the_broker_is_away_a_reader_returns_and_a_starter_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    def ask(*_: Any) -> None:
        raise BrokerUnavailableError("redis://there", "no answer")

    runs = site.app.extensions["eventstream"].runs
    for name in ("find", "begin"):
        monkeypatch.setattr(runs.registry, name, ask)
    response = site.ask()
    assert response.status_code == 200
    assert response.data.startswith(b":\nretry: ")
    for method in ("POST", "DELETE"):
        response = site.ask(method)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
    assert model.starts == []


def test_a_run_that_another_replaced_meanwhile_is_looked_for_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.post("a") as first:
        list(first)
    registry = site.app.extensions["eventstream"].runs.registry
    found = registry.find
    answers: list[Any] = [lambda key: found(key), lambda key: None]
    monkeypatch.setattr(registry, "find", lambda key: (answers.pop(0) if answers else found)(key))
    with site.open() as stream:
        assert data(stream) == ["a", "{}"]
    assert answers == []


def test_a_post_with_a_large_body_that_comes_second_attaches_to_the_first(
    site: Site, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    runs = site.app.extensions["eventstream"].runs
    begin = runs.begin

    def begin_late(*arguments: Any) -> Any:
        # Another one has begun since it was looked.
        monkeypatch.setattr(runs, "begin", begin)
        with site.post("first", []) as first:
            first.next()
        return begin(*arguments)

    monkeypatch.setattr(runs, "begin", begin_late)
    with site.post("second" * 20_000) as stream:
        assert stream.next().data == "first"
        model.go_on()
        assert data(stream) == ["{}"]
    assert len(model.starts) == 1


# --- Bodies that nobody needs


class Body(io.RawIOBase):
    """A body that counts what is read of it."""

    def __init__(self) -> None:
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.taken += len(buffer)
        return 0


@pytest.mark.parametrize(
    "header", [{"CONTENT_LENGTH": str(300 << 20)}, {"HTTP_TRANSFER_ENCODING": "chunked"}]
)
@pytest.mark.parametrize(
    ("method", "query"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("HEAD", ""),
        ("POST", ""),
        ("POST", "?run=x"),
        ("POST", "?lastEventId=x.1"),
    ],
)
def test_what_starts_no_run_reads_no_body(
    site: Site, model: Model, method: str, query: str, header: dict[str, str]
) -> None:
    body = Body()
    with site.post("a", []) as first:
        first.next()
        site.client.open(
            site.url + query,
            method=method,
            environ_overrides={"wsgi.input": body, "wsgi.input_terminated": True, **header},
        ).close()
        assert body.taken == 0
        model.go_on()
    assert len(model.starts) == 1


# --- Limits that hold at the same moment


def test_a_run_that_is_replaced_leaves_its_room_to_the_next(
    make_site: Callable[..., Site], model: Model
) -> None:
    limits = {"MAX_RUNS_PER_OWNER": 1, "MAX_RUNS": 1}
    site = make_site(limits, owner=lambda: "me", on_busy="replace")
    with site.post("old", [], "older") as old:
        old.next()
        timer = threading.Timer(0.1, model.go_on)
        timer.start()
        with site.post("new") as new:
            assert data(new) == ["new", "{}"]
        assert types(old)[-1] == "cancelled"


def test_a_run_whose_place_stays_taken_is_not_replaced(
    make_site: Callable[..., Site], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "_REPLACE_SECONDS", 0.05)
    site = make_site({"MAX_RUNS": 1}, on_busy="replace")
    with site.post("old", [], "older") as old:
        old.next()
        response = site.ask("POST", json={"items": ["new"]})
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) > 0
        model.go_on()
    wait_for(lambda: model.closed == 1)
    assert len(model.starts) == 1


def test_who_cancels_and_starts_again_takes_no_more_than_its_own_room(
    make_site: Callable[..., Site], model: Model
) -> None:
    site = make_site({"MAX_RUNS_PER_OWNER": 2, "MAX_RUNS": 4}, owner=lambda: request.args["user"])
    answers = []
    for n in range(6):
        url = f"/stream/chat/{n}?user=me"
        with client_stream_or_status(site, url) as answer:
            answers.append(answer)
        site.ask("DELETE", url)
    assert answers == [200, 200, 429, 429, 429, 429]
    with site.post("a", url="/stream/chat/1?user=you") as stream:
        assert data(stream) == ["a", "{}"]
    for _ in range(2):
        model.go_on()
    wait_for(lambda: model.closed == 3)


@contextmanager
def client_stream_or_status(site: Site, url: str) -> Iterator[int]:
    """Start a run that stays, and yield the status of the answer."""
    response = site.client.post(url, json={"items": ["a", []]}, buffered=False)
    try:
        yield response.status_code
    finally:
        response.close()


def test_a_view_that_aborts_gives_its_room_back(
    eventstream: EventStream, make_app: Callable[..., Flask]
) -> None:
    @eventstream.resumable("/no", owner=lambda: "me")
    def no() -> Iterator[str]:
        abort(418)
        yield ""

    site = Site(make_app(MAX_RUNS_PER_OWNER=1, MAX_RUNS=1))
    for _ in range(20):
        assert site.ask("POST", "/stream/no").status_code == 418
    assert site.ask("GET", "/stream/no").status_code == 204


@pytest.mark.parametrize("broker", ["memory", "redis"])
@pytest.mark.parametrize(("limit", "users"), [(2, ["me"] * 8), (3, [str(n) for n in range(8)])])
def test_at_the_same_moment_as_many_begin_as_are_allowed(
    make_site: Callable[..., Site],
    model: Model,
    request: pytest.FixtureRequest,
    broker: str,
    limit: int,
    users: list[str],
) -> None:
    config: dict[str, Any] = {"MAX_RUNS_PER_OWNER": 2, "MAX_RUNS": 3}
    if broker == "redis":
        server = request.getfixturevalue("redis")
        config |= {"BROKER_URL": server.url, "KEY_PREFIX": server.prefix()}
    site = make_site(config, owner=lambda: flask.request.args["user"], heartbeat=0.05)
    barrier = threading.Barrier(8)
    answers: list[int] = []

    def post(n: int, user: str) -> None:
        barrier.wait(DEADLINE)
        with client_stream_or_status(site, f"/stream/chat/{n}?user={user}") as status:
            answers.append(status)

    threads = [threading.Thread(target=post, args=each) for each in enumerate(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(answers) == [200] * limit + [429] * (8 - limit)
    # A head that does not wait for the first item may leave before the view has begun.
    wait_for(lambda: len(model.starts) == limit)
    for _ in range(limit):
        model.go_on()
    wait_for(lambda: model.closed == limit)
    site.app.extensions["eventstream"].broker.close()
