"""An app as Flask's users have them, with the extensions that they use, and streams of each kind.

A view is named by its way of streaming and by what it streams: ``/heartbeat/tutorial``. What a
stream does after its first item it does once the request has been torn down, where it has a thread
of its own; so each view shows whether it depends on the request's contexts.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from cachelib import SimpleCache
from flask import Flask, Response, abort, g, request, session, stream_with_context
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_session import Session
from flask_sqlalchemy import SQLAlchemy
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import TracerProvider

from flask_eventstream import EventStream, EventStreamResponse, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOME = os.environ.get("COMMON_APP_HOME", "")

IN_ASYNC = ("async-plain", "async-merge", "async-wrapped")

eventstream = EventStream("eventstream", __name__, url_prefix="/")
db = SQLAlchemy()
login = LoginManager()
torn: Counter[str] = Counter()
"""How often the request with each mark was torn down."""
torn_apps: Counter[str] = Counter()
over: dict[str, threading.Event] = {}
"""Set once the request with each mark was torn down."""


class User(UserMixin, db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String)
    notes = db.relationship("Note")


class Note(db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)
    user_id = db.Column(db.Integer, db.ForeignKey("user.id"))
    text = db.Column(db.String)


def create_app() -> Flask:
    trace.set_tracer_provider(TracerProvider())
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="common",
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{HOME}/alchemy.sqlite",
        SQLALCHEMY_ENGINE_OPTIONS={"pool_timeout": 2},
        SESSION_TYPE="cachelib",
        SESSION_CACHELIB=SimpleCache(),
        EVENTSTREAM_HEARTBEAT=60,
    )
    db.init_app(app)
    login.init_app(app)
    Session(app)
    with app.app_context():
        db.create_all()
        if db.session.get(User, 1) is None:
            notes = [Note(text=f"note {n}") for n in range(3)]
            db.session.add_all([User(id=1, name="alice", notes=notes), User(id=2, name="bob")])
            db.session.commit()
            get_db().execute("CREATE TABLE user (id INTEGER PRIMARY KEY, name TEXT)")
            get_db().execute("INSERT INTO user VALUES (1, 'alice'), (2, 'bob')")
            get_db().commit()
    for name, items in STREAMS.items():
        add_views(app, name, items)
    add_hooks(app)
    app.register_blueprint(eventstream)
    add_ordinary(app)
    FlaskInstrumentor().instrument_app(app)  # type: ignore[no-untyped-call]
    return app


def get_db() -> sqlite3.Connection:
    """The tutorial's."""
    if "db" not in g:
        g.db = sqlite3.connect(f"{HOME}/tutorial.sqlite")
        g.db.row_factory = sqlite3.Row
    connection: sqlite3.Connection = g.db
    return connection


@login.user_loader  # type: ignore[untyped-decorator]
def load_user(user_id: str) -> Any:
    return db.session.get(User, int(user_id))


def add_hooks(app: Flask) -> None:
    @app.before_request
    def load_logged_in_user() -> None:
        user_id = session.get("user_id")
        query = "SELECT * FROM user WHERE id = ?"
        g.user = user_id and get_db().execute(query, (user_id,)).fetchone()
        g.mark = request.args.get("mark")
        if g.mark:
            over.setdefault(g.mark, threading.Event())

    @app.after_request
    def interfere(response: Response) -> Response:
        how = request.args.get("drop")
        if how == "raise":
            raise RuntimeError("the session could not be saved")
        if how == "read":
            response.get_data()
        return Response("maintenance", 503) if how == "replace" else response

    @app.teardown_request
    def count(_: BaseException | None) -> None:
        if request.args.get("mark"):
            torn[request.args["mark"]] += 1
            over[request.args["mark"]].set()

    @app.teardown_appcontext
    def close_db(_: BaseException | None) -> None:
        connection = g.pop("db", None)
        if connection is not None:
            connection.close()
        if g.get("mark"):
            torn_apps[g.mark] += 1


def has_own_thread() -> bool:
    kind = request.path.split("/")[1]
    # An async view's stream has a thread of its own where the server has threads.
    is_gevent = "gevent" in sys.modules
    return "heartbeat" in kind or kind == "run" or (kind in IN_ASYNC and not is_gevent)


def wait_for_the_end_of_the_request() -> None:
    if has_own_thread():
        assert over[request.args["mark"]].wait(20), "the request was not torn down"


def tutorial() -> Iterator[Any]:
    """The tutorial's database and its user, before the request's end and after."""
    query = "SELECT name FROM user ORDER BY id"
    first = get_db().execute(query)
    yield first.fetchone()["name"]
    wait_for_the_end_of_the_request()
    yield [row["name"] for row in get_db().execute(query)]
    yield first.fetchone()["name"]
    yield g.user["name"]


def alchemy() -> Iterator[Any]:
    """Flask-SQLAlchemy's session, with an object that was loaded before the request's end."""
    user: Any = db.session.get(User, 1)
    yield user.name
    wait_for_the_end_of_the_request()
    yield [note.text for note in user.notes]
    user = db.session.get(User, 2)
    yield user.name


def pending() -> Iterator[Any]:
    """A row that this stream never commits."""
    yield "begun"
    wait_for_the_end_of_the_request()
    db.session.add(Note(text="never committed"))
    yield "added"


def signed_in() -> Iterator[Any]:
    yield current_user.get_id()
    wait_for_the_end_of_the_request()
    yield {"name": current_user.name, "session": session["user_id"], "path": request.path}


def upload() -> Iterator[Any]:
    if "csv" not in request.files:
        abort(400)
    yield request.form["title"]
    wait_for_the_end_of_the_request()
    for line in request.files["csv"]:
        yield line.decode().strip()


def traced() -> Iterator[Any]:
    span = trace.get_current_span().get_span_context().span_id
    yield "begun"
    wait_for_the_end_of_the_request()
    with trace.get_tracer("app").start_as_current_span("work"):
        yield "working"
    yield trace.get_current_span().get_span_context().span_id == span


STREAMS = {one.__name__: one for one in (tutorial, alchemy, pending, signed_in, upload, traced)}


def add_views(app: Flask, name: str, items: Callable[[], Iterator[Any]]) -> None:
    def answer(kind: str) -> Callable[[], Any]:
        def view() -> Any:
            if kind == "plain":
                response = EventStreamResponse(items())
            elif kind == "heartbeat":
                response = EventStreamResponse(items(), heartbeat=60)
            elif kind == "merge":
                response = EventStreamResponse(merge(items()))
            elif kind == "merge-heartbeat":
                response = EventStreamResponse(merge(items()), heartbeat=60)
            elif kind == "wrapped":
                response = EventStreamResponse(stream_with_context(items()))
            else:
                response = EventStreamResponse(stream_with_context(items()), heartbeat=60)
            if request.args.get("drop") == "abort":
                abort(403)
            return response

        return view

    def in_async(view: Callable[[], Any]) -> Callable[[], Any]:
        async def respond() -> Any:
            return view()

        return respond

    for kind in ("plain", "heartbeat", "merge", "merge-heartbeat", "wrapped", "wrapped-heartbeat"):
        app.add_url_rule(f"/{kind}/{name}", f"{kind}-{name}", answer(kind), methods=["POST"])
        app.add_url_rule(
            f"/async-{kind}/{name}",
            f"async-{kind}-{name}",
            in_async(answer(kind)),
            methods=["POST"],
        )
    options: Any = {"methods": ["POST"]}
    eventstream.stream(f"/view/{name}", endpoint=f"view-{name}", **options)(items)
    eventstream.stream(
        f"/view-heartbeat/{name}", endpoint=f"view-heartbeat-{name}", heartbeat=60, **options
    )(items)
    eventstream.stream(f"/async-view/{name}", endpoint=f"async-view-{name}", **options)(
        in_async(items)
    )

    @eventstream.resumable(f"/run/{name}/<key>", endpoint=f"run-{name}")
    def run(key: str) -> Iterator[Any]:
        yield from items()


def add_ordinary(app: Flask) -> None:
    @app.post("/login/<int:user_id>")
    def sign_in(user_id: int) -> str:
        login_user(db.session.get(User, user_id))
        session["user_id"] = user_id
        return "ok"

    @app.get("/whoami")
    def whoami() -> dict[str, Any]:
        span: Any = trace.get_current_span()
        return {
            "g": g.user and g.user["name"],
            "login": current_user.name if current_user.is_authenticated else None,
            "mark": g.get("mark"),
            "has parent": span.parent is not None,
        }

    @app.post("/notes")
    def commit() -> dict[str, int]:
        db.session.commit()
        return {"notes": db.session.query(Note).count()}

    @app.get("/left")
    def left() -> dict[str, Any]:
        mark = request.args["of"]
        return {
            "torn": torn[mark],
            "torn apps": torn_apps[mark],
            "connections": db.engine.pool.checkedout(),  # type: ignore[attr-defined]
            "sessions": len(db.session.registry.registry),
        }
