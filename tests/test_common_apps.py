"""Streams in apps as Flask's users have them, on real servers, with each way of streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from .servers import DEADLINE, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.beside

WAYS = (
    "plain", "heartbeat", "merge", "merge-heartbeat", "wrapped", "wrapped-heartbeat", "view",
    "view-heartbeat", "async-plain", "async-heartbeat", "async-merge", "async-wrapped",
    "async-view", "run",
)  # fmt: skip
DROPPED = ("plain", "heartbeat", "merge", "wrapped")
WORKERS = {
    "sync": ["-k", "sync"],
    "gthread": ["-k", "gthread", "--threads", "2"],
    "gevent": ["-k", "gevent"],
}
EXPECTED = {
    "tutorial": ["alice", '["alice", "bob"]', "bob", "alice"],
    "alchemy": ["alice", '["note 0", "note 1", "note 2"]', "bob"],
    "pending": ["begun", "added"],
    "signed_in": ["1", '{"name": "alice", "path": "PATH", "session": 1}'],
    "upload": ["imported", "row 0", "row 1"],
    "traced": ["begun", "working", "true"],
}


class Visitors:
    """Two people who use an app."""

    def __init__(self, alice: httpx.Client, bob: httpx.Client) -> None:
        self.alice, self.bob = alice, bob
        self.alice.post("/login/1")
        self.bob.post("/login/2")
        self._marks = 0

    def new_mark(self) -> str:
        self._marks += 1
        return f"mark-{self._marks}"

    def stream(self, way: str, name: str, mark: str, drop: str = "") -> httpx.Response:
        path = f"/{way}/{name}/{mark}" if way == "run" else f"/{way}/{name}"
        return self.alice.post(
            path,
            params={"mark": mark, "drop": drop},
            data={"title": "imported"},
            files={"csv": b"row 0\nrow 1\n"},
        )

    def left(self, mark: str) -> dict[str, Any]:
        found: dict[str, Any] = self.bob.get("/left", params={"of": mark}).json()
        return found


@pytest.fixture(scope="module", params=WORKERS)
def visitors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Visitors]:
    home = str(tmp_path_factory.mktemp("common"))
    worker, *options = WORKERS[request.param][1:]
    app = "tests.common_app:create_app()"
    # Or the server may close a connection between two requests.
    options.append("--keep-alive=300")
    with (
        serving(app, worker, *options, environ={"COMMON_APP_HOME": home}) as server,
        httpx.Client(base_url=server.url, timeout=DEADLINE) as alice,
        httpx.Client(base_url=server.url, timeout=DEADLINE) as bob,
    ):
        yield Visitors(alice, bob)


def data_of(text: str) -> list[str]:
    return [line[6:] for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("way", WAYS)
def test_what_people_stream_works_and_is_torn_down(visitors: Visitors, way: str, name: str) -> None:
    mark = visitors.new_mark()
    answer = visitors.stream(way, name, mark)
    *data, end = data_of(answer.text)
    path = answer.request.url.path
    assert data == [one.replace("PATH", path) for one in EXPECTED[name]]
    assert end == "{}"
    wait_for(lambda: visitors.left(mark)["torn"])
    found = visitors.left(mark)
    assert found["torn"] == 1
    wait_for(lambda: visitors.left(mark)["connections"] == 0)
    # The session of the request that asks.
    wait_for(lambda: visitors.left(mark)["sessions"] <= 1)


@pytest.mark.parametrize("way", WAYS)
def test_more_streams_than_the_pool_has_connections_leave_it_full(
    visitors: Visitors, way: str
) -> None:
    for _ in range(20):
        assert data_of(visitors.stream(way, "alchemy", visitors.new_mark()).text)[0] == "alice"
    assert visitors.bob.post("/notes").status_code == 200


@pytest.mark.parametrize("way", WAYS)
def test_what_a_stream_does_not_commit_no_other_request_commits(
    visitors: Visitors, way: str
) -> None:
    for _ in range(3):
        visitors.stream(way, "pending", visitors.new_mark())
        assert visitors.bob.post("/notes").json() == {"notes": 3}


@pytest.mark.parametrize("drop", ["raise", "replace", "read", "abort"])
@pytest.mark.parametrize("way", DROPPED)
def test_a_response_that_is_dropped_leaves_nothing_to_the_next_request(
    visitors: Visitors, way: str, drop: str
) -> None:
    mark = visitors.new_mark()
    answer = visitors.stream(way, "tutorial", mark, drop)
    status = {"raise": 500, "replace": 503, "read": 500, "abort": 403}[drop]
    assert answer.status_code == status
    for visitor, name in ((visitors.alice, "alice"), (visitors.bob, "bob")):
        expected = {"g": name, "login": name, "mark": None, "has parent": False}
        # On the same connection, and so in the same greenlet, first.
        assert visitor.get("/whoami").json() == expected
    assert visitors.left(mark)["torn"] == 1
    wait_for(lambda: visitors.left(mark)["sessions"] <= 1)
