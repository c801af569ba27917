"""eventstream.js, in a real Chromium, against a real server."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from playwright.sync_api import Error

import flask_eventstream

from .servers import DEADLINE, ROOT, Server, serving, skip_unless_ci, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.beside

STATIC = Path(flask_eventstream.__file__).parent / "static"
CLIENTS = Path(__file__).parent / "clients"
CONNECTING, OPEN, CLOSED = range(3)


class Tab:
    """A page that imports the module, in a browser that has others of its origin."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.goto(url)
        wait_for(lambda: page.evaluate("'follow' in window"), what="the module to be there")

    def follow(self, url: str, options: str = "{}") -> Tab:
        self.page.evaluate(f"void follow({url!r}, {options})")
        return self

    def seen(self, data: bool = True) -> list[Any]:
        found: list[Any] = self.page.evaluate("seen")
        return [event[1] for event in found] if data else found

    def told(self) -> list[Any]:
        found: list[Any] = self.page.evaluate("told")
        return found

    def state(self) -> int:
        found: int = self.page.evaluate("stream.readyState")
        return found

    def wait_for_state(self, state: int) -> None:
        wait_for(lambda: self.state() == state, what=f"{state}, {self.told()}, {self.seen()}")

    def wait_for_events(self, count: int) -> None:
        wait_for(
            lambda: self.page.evaluate("seen.length") >= count,
            what=f"{count} events, {self.told()}",
        )

    def wait_for_data(self, *data: str) -> None:
        wait_for(lambda: self.seen() == list(data) or None, what=f"{data} to be in {self.seen()}")


class Stage:
    """The server, and a browser with tabs.

    :ivar name: a name for what this test alone uses: a channel, a run.
    """

    def __init__(self, server: Server, context: BrowserContext, name: str) -> None:
        self.server, self.context, self.name = server, context, name
        # The server may close one that is kept at any moment.
        alone = {"Connection": "close"}
        self.client = httpx.Client(base_url=server.url, headers=alone, timeout=DEADLINE)

    @property
    def channel(self) -> str:
        return f"/stream?channel={self.name}"

    def tab(self, script: str = "", path: str = "/") -> Tab:
        page = self.context.new_page()
        page.add_init_script(script)
        return Tab(page, f"{self.server.url}{path}")

    def post(self, path: str, data: Any = None) -> Any:
        return self.client.post(path, json=data)

    def publish(self, data: str, **fields: Any) -> str:
        fields = {"channel": self.name, **fields, "data": data}
        id: str = self.post("/publish", fields).json()["id"]
        return id

    def asked(self) -> list[dict[str, Any]]:
        return self.asked_for(self.name)

    def asked_for(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.client.get("/asked").json() if part in row["url"]]

    def subscribers(self) -> int:
        return int(self.client.get(f"/subscribers/{self.name}").text)

    def wait_for_subscribers(self, count: int) -> None:
        wait_for(lambda: self.subscribers() == count, what=f"{count} subscribers")

    def leader(self, tabs: list[Tab]) -> Tab:
        [found] = [tab for tab in tabs if tab.page.evaluate(HOLDS_LOCK)]
        return found


# Every lock has the id of the page that holds it; a lock of one's own tells which that is.
HOLDS_LOCK = """navigator.locks.request("me " + Math.random(), async (me) => {
  const { held } = await navigator.locks.query();
  const { clientId } = held.find(({ name }) => name === me.name);
  return held.some((lock) => lock.name.startsWith("eventstream") && lock.clientId === clientId);
})"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("tests.browser_app:create_app()", "gthread", "--threads=40") as server:
        yield server


@pytest.fixture
def stage(server: Server, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Stage]:
    context = browser.new_context()
    stage = Stage(server, context, f"t{abs(hash(request.node.name))}")
    yield stage
    context.close()
    stage.post(f"/go/{stage.name}")
    stage.client.close()


def test_the_parser_is_the_file_of_its_package_unchanged_with_its_license() -> None:
    package = CLIENTS / "node_modules" / "eventsource-parser"
    if not package.exists():
        skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
    head, _, code = (STATIC / "eventsource-parser.js").read_text("utf-8").partition("*/\n")
    assert code == (package / "dist" / "index.js").read_text("utf-8")
    assert (package / "LICENSE").read_text("utf-8") in head
    version = json.loads((CLIENTS / "package.json").read_text())["dependencies"][package.name]
    assert f"{package.name} {version}," in head


# One connection


def test_it_is_an_eventsource_to_its_page(stage: Stage) -> None:
    tab = stage.tab().follow(stage.channel)
    tab.wait_for_state(OPEN)
    assert tab.told() == ["open"]
    id = stage.publish("two\nlines", type="message")
    stage.publish("a user's own", type="end")
    stage.publish("own id", id="数 1")
    tab.wait_for_events(3)
    seen = tab.seen(data=False)
    assert seen[0] == ["message", "two\nlines", id]
    # An event of an app that has the type of a finished stream's last one ends nothing.
    assert seen[1][:2] == ["end", "a user's own"]
    assert seen[2] == ["message", "own id", "数 1"]
    stage.post(f"/end/{stage.name}")
    wait_for(lambda: len(stage.asked()) == 2, what="it to come back")
    assert stage.asked()[1]["cursor"] == "数 1"
    stage.publish("goes on")
    wait_for(lambda: tab.seen()[3:] == ["goes on"])
    told = tab.page.evaluate("""[
      stream.url, stream.lastEventId === seen[3][2], stream.withCredentials, stream.OPEN,
      EventStream.CLOSED, stream.onmessage === stream.onreset, stream instanceof EventTarget,
    ]""")
    assert told == [f"{stage.server.url}{stage.channel}", True, False, 1, 2, True, True]


def test_closing_it_ends_the_request_on_the_server(stage: Stage) -> None:
    tab = stage.tab().follow(stage.channel)
    stage.wait_for_subscribers(1)
    tab.page.evaluate("stream.close()")
    stage.wait_for_subscribers(0)
    assert tab.state() == CLOSED
    assert len(stage.asked()) == 1


def test_a_page_that_closes_it_gets_nothing_more_of_what_came_along(stage: Stage) -> None:
    tab = stage.tab()
    first = stage.publish("0")
    for n in "123":
        stage.publish(n)
    tab.page.evaluate(
        """([url, lastEventId]) => {
      follow(url, {lastEventId});
      stream.addEventListener("message", ({data}) => data === "2" && stream.close());
    }""",
        [stage.channel, first],
    )
    tab.wait_for_state(CLOSED)
    stage.wait_for_subscribers(0)
    assert tab.seen() == ["1", "2"]


def test_a_run_is_started_by_post_with_headers_and_resumed_after_a_break(stage: Stage) -> None:
    tab = stage.tab().follow(
        f"/stream/chat/{stage.name}",
        """{
          headers: async () => ({"Content-Type": "application/json", "X-Page": `${seen.length}`}),
          body: JSON.stringify({prompt: "Hi"}),
          silence: 500,
        }""",
    )
    wait_for(lambda: len(stage.asked()) > 1, what="the silent connection to be given up")
    stage.post(f"/go/{stage.name}")
    tab.wait_for_state(CLOSED)
    assert [event[:2] for event in tab.seen(data=False)] == [
        ["message", "Hi 0"],
        ["message", "the end"],
        ["end", "{}"],
    ]
    first, *others = stage.asked()
    assert (first["method"], first["cursor"]) == ("POST", None)
    assert {(row["method"], bool(row["header"])) for row in others} == {("POST", True)}
    assert tab.told()[-1] == "open", "closed without an error"


def test_a_post_without_a_cursor_is_not_repeated(stage: Stage) -> None:
    stage.post(f"/answer/{stage.name}", [200])
    tab = stage.tab().follow(f"/stream/answers/{stage.name}", "{body: 'question'}")
    tab.wait_for_state(CLOSED)
    assert tab.seen() == ["question"]
    assert tab.told()[-1][:3] == [None, "The stream has ended.", CLOSED]
    assert [row["method"] for row in stage.asked()] == ["POST"]


@pytest.mark.parametrize("type", ["end", "stream-error"])
def test_a_finished_stream_is_closed_without_another_request(stage: Stage, type: str) -> None:
    url = f"/stream/finished/{type}"
    tab = stage.tab().follow(url)
    tab.wait_for_state(CLOSED)
    assert [event[0] for event in tab.seen(data=False)] == ["message", type]
    assert tab.told() == ["open"]
    assert len(stage.asked_for(url)) == 1


@pytest.mark.parametrize("status", [204, 404, 401])
def test_an_answer_that_will_not_change_closes_it(stage: Stage, status: int) -> None:
    stage.post(f"/answer/{stage.name}", [status])
    tab = stage.tab().follow(f"/stream/answers/{stage.name}")
    tab.wait_for_state(CLOSED)
    [[told, message, state, _]] = tab.told()
    assert (told, state) == (status, CLOSED)
    assert str(status) in message
    assert len(stage.asked()) == 1


def test_what_is_no_event_stream_closes_it(stage: Stage) -> None:
    tab = stage.tab().follow("/page.js")
    tab.wait_for_state(CLOSED)
    [[status, message, _, _]] = tab.told()
    assert (status, message) == (
        200,
        "The answer is text/javascript; charset=utf-8, and no event stream.",
    )


def test_it_backs_off_and_comes_back_after_answers_that_eventsource_gives_up_at(
    stage: Stage,
) -> None:
    stage.post(f"/answer/{stage.name}", [200, 500, 502, 503])
    tab = stage.tab().follow(f"/stream/answers/{stage.name}?id=7")
    wait_for(lambda: len(tab.told()) == 6)
    opened, *errors, last = tab.told()
    assert [opened, last] == ["open", "open"]
    assert [error[::2] for error in errors] == [[None, 0], [500, 0], [502, 0], [503, 0]]
    asked = stage.asked()
    assert [row["header"] for row in asked] == [None, "7", "7", "7", "7"]
    times = [row["time"] for row in asked]
    pauses = [after - before for before, after in pairwise(times)]
    # The `retry` of 100 ms, doubled twice, and then the server's `Retry-After`, which is longer.
    assert all(
        pause >= least for pause, least in zip(pauses, [0.08, 0.16, 0.32, 1.0], strict=True)
    ), pauses


def test_a_retry_of_nothing_does_not_have_it_ask_without_a_pause(stage: Stage) -> None:
    stage.post(f"/answer/{stage.name}", [200, 200, 200])
    stage.tab().follow(f"/stream/answers/{stage.name}?retry=0&id=7")
    asked = wait_for(lambda: stage.asked()[3:] and stage.asked())
    times = [row["time"] for row in asked]
    assert all(after - before >= 0.08 for before, after in pairwise(times)), times


def test_a_page_that_waits_comes_back_as_soon_as_it_is_online(stage: Stage) -> None:
    stage.post(f"/answer/{stage.name}", [200])
    # A timer of more than 2**31 - 1 ms fires at once.
    tab = stage.tab().follow(f"/stream/answers/{stage.name}?retry=9999999999&id=1")
    wait_for(lambda: tab.told()[1:], what="it to wait")
    tab.page.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")
    assert len(stage.asked()) == 1
    stage.context.set_offline(True)
    stage.context.set_offline(False)
    wait_for(lambda: tab.told()[2:] == ["open"])
    assert stage.asked()[1]["header"] == "1"


def test_a_server_that_is_away_is_asked_again(stage: Stage) -> None:
    tab = stage.tab()
    stage.context.set_offline(True)
    tab.follow(f"/stream/answers/{stage.name}")
    wait_for(tab.told)
    assert tab.told()[0][::2] == [None, CONNECTING]
    stage.context.set_offline(False)
    tab.wait_for_data("data")


def test_a_silent_connection_is_made_anew_and_a_heartbeat_is_no_silence(stage: Stage) -> None:
    tab = stage.tab()
    tab.page.evaluate(
        """(name) => {
      follow(`/stream/silent/${name}`, {silence: 2000});
      window.beating = stream;
      follow(`/stream/answers/${name}?id=1`, {silence: 500});
    }""",
        stage.name,
    )
    wait_for(lambda: len([row for row in stage.asked() if "answers" in row["url"]]) > 5)
    assert "There was not a byte for 500 ms." in [error[1] for error in tab.told()[2:]]
    assert tab.page.evaluate("beating.readyState") == OPEN
    assert len([row for row in stage.asked() if "silent" in row["url"]]) == 1


def test_another_origin_gets_the_cursor_in_the_query(stage: Stage) -> None:
    there = stage.server.url.replace("127.0.0.1", "localhost")
    stage.post(f"/answer/{stage.name}", [200])
    tab = stage.tab().follow(f"{there}/stream/answers/{stage.name}?id=a%26b")
    tab.wait_for_events(2)
    assert [(row["method"], row["header"], row["cursor"]) for row in stage.asked()] == [
        ("GET", None, None),
        ("GET", None, "a&b"),
    ]


def test_a_token_that_has_expired_is_renewed_and_no_event_is_lost(stage: Stage) -> None:
    tab = stage.tab().follow(
        stage.channel,
        """{token: async () => {
          const channel = new URL(stream.url).searchParams.get("channel");
          window.asked = (window.asked ?? 0) + 1;
          const headers = {"Content-Type": "application/json"};
          const body = JSON.stringify({data: "between", channel});
          if (asked > 1) await fetch("/publish", {method: "POST", headers, body});
          return (await fetch(`/token/${channel}?max_age=${asked > 1 ? 60 : 3}`)).text();
        }}""",
    )
    tab.wait_for_state(OPEN)
    stage.publish("one")
    tab.wait_for_data("one", "between")
    assert [row["status"] for row in stage.asked()] == [200, 401, 200]
    assert len({row["token"] for row in stage.asked()}) == 2
    assert tab.page.evaluate("asked") == 2


def test_a_new_token_that_is_refused_too_closes_it(stage: Stage) -> None:
    tab = stage.tab().follow(stage.channel, "{token: () => 'es1.' + Math.random()}")
    tab.wait_for_state(CLOSED)
    assert [row["status"] for row in stage.asked()] == [401, 401]
    assert [error[::2] for error in tab.told()] == [[401, CLOSED]]


HIDE = "dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))"
SHOW = "dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))"


@pytest.mark.parametrize("options", ["{}", "{shared: true}"])
def test_a_page_that_the_browser_keeps_is_not_connected_and_goes_on_when_it_is_shown(
    stage: Stage, options: str
) -> None:
    tab = stage.tab().follow(stage.channel, options)
    stage.wait_for_subscribers(1)
    stage.publish("one")
    tab.wait_for_data("one")
    tab.page.evaluate(HIDE)
    stage.wait_for_subscribers(0)
    assert tab.state() == CONNECTING
    assert tab.page.evaluate("navigator.locks.query().then(({held}) => held.length)") == 0
    stage.publish("two")
    tab.page.evaluate(SHOW)
    tab.wait_for_data("one", "two")


def test_a_post_without_a_cursor_is_not_repeated_for_a_page_that_is_shown_again(
    stage: Stage,
) -> None:
    tab = stage.tab().follow(f"/stream/answers/{stage.name}", "{method: 'POST'}")
    tab.wait_for_data("data")
    tab.page.evaluate(HIDE)
    tab.page.evaluate(SHOW)
    tab.wait_for_state(CLOSED)
    assert "do it twice" in tab.told()[-1][1]
    assert len(stage.asked()) == 1


# One connection for all tabs

SHARED = "{shared: true}"


def followers(stage: Stage, count: int) -> list[Tab]:
    tabs = [stage.tab().follow(stage.channel, SHARED) for _ in range(count)]
    for tab in tabs:
        tab.wait_for_state(OPEN)
    return tabs


def test_eight_tabs_have_one_connection_and_all_get_every_event(stage: Stage) -> None:
    tabs = followers(stage, 8)
    ids = [stage.publish(str(n)) for n in range(3)]
    for tab in tabs:
        tab.wait_for_events(3)
        assert tab.seen(data=False) == [["message", str(n), id] for n, id in enumerate(ids)]
    assert stage.subscribers() == 1
    assert len(stage.asked()) == 1


def test_tabs_take_over_at_speed_and_each_has_every_event_once_in_order(stage: Stage) -> None:
    tabs = followers(stage, 6)
    stage.post(f"/flood/{stage.name}")

    def closes_its_stream(tab: Tab) -> None:
        tab.page.evaluate("stream.close()")

    def is_closed(tab: Tab) -> None:
        tab.page.close()

    def crashes(tab: Tab) -> None:
        tab.page.goto("chrome://crash", wait_until="commit")

    for leave in (is_closed, closes_its_stream, crashes):
        leader = stage.leader(tabs)
        tabs.remove(leader)
        heard = len(tabs[-1].seen())
        try:
            leave(leader)
        except Error:
            assert leave is crashes
        tabs[-1].wait_for_events(heard + 50)
    stage.post(f"/go/{stage.name}")
    for tab in tabs:
        wait_for(lambda: tab.page.evaluate("seen.at(-1)[1]") == "over")  # noqa: B023
        *numbers, _ = tab.seen()
        assert numbers == [str(n) for n in range(len(numbers))]
    assert stage.subscribers() == 1
    assert len(stage.asked()) == 4
    assert [row["cursor"] is None for row in stage.asked()] == [True, False, False, False]


def test_a_tab_that_joins_gets_what_has_come_since_the_connection_began(stage: Stage) -> None:
    [first] = followers(stage, 1)
    ids = [stage.publish(str(n)) for n in range(3)]
    first.wait_for_data("0", "1", "2")
    stage.tab().follow(stage.channel, SHARED).wait_for_data("0", "1", "2")
    cursor = f"{{shared: true, lastEventId: {ids[1]!r}}}"
    stage.tab().follow(stage.channel, cursor).wait_for_data("2")
    assert len(stage.asked()) == 1


def test_a_tab_may_join_with_the_cursor_of_its_page(stage: Stage) -> None:
    def cursor() -> str:
        return stage.client.get("/cursor").text

    def options() -> str:
        return f"{{shared: true, lastEventId: {cursor()!r}}}"

    first = stage.tab().follow(stage.channel, options())
    first.wait_for_state(OPEN)
    stage.publish("of another channel", channel="other")
    early = stage.tab().follow(stage.channel, options())
    stage.publish("one")
    stage.publish("of another channel", channel="other")
    first.wait_for_data("one")
    late = stage.tab().follow(stage.channel, options())
    late.wait_for_state(OPEN)
    stage.publish("two")
    late.wait_for_data("two")
    early.wait_for_data("one", "two")
    assert len(stage.asked()) == 1


def test_a_cursor_of_a_page_among_ids_of_the_app_gets_a_reset_and_all_of_the_log(
    stage: Stage,
) -> None:
    [first] = followers(stage, 1)
    stage.publish("0")
    stage.publish("own", id=f"{stage.name} 1")
    first.wait_for_data("0", "own")
    cursor = stage.client.get("/cursor").text
    late = stage.tab().follow(stage.channel, f"{{shared: true, lastEventId: {cursor!r}}}")
    late.wait_for_events(3)
    assert [event[0] for event in late.seen(data=False)] == ["reset", "message", "message"]
    assert late.seen()[1:] == ["0", "own"]


def test_a_tab_that_is_too_late_for_the_log_gets_a_reset_and_the_log(stage: Stage) -> None:
    [first] = followers(stage, 1)
    ids = stage.post(f"/publish-many/{stage.name}").json()
    first.wait_for_events(260)
    for cursor, requested in (("", ""), (ids[0], ids[0]), ("deadbeef-7", "deadbeef-7")):
        tab = stage.tab().follow(stage.channel, f"{{shared: true, lastEventId: {cursor!r}}}")
        tab.wait_for_events(257)
        [type, data, id], *rest = tab.seen(data=False)
        assert (type, id) == ("reset", ids[3])
        assert json.loads(data) == {"requested": requested, "earliest": ids[4]}
        assert [event[1] for event in rest] == [str(n) for n in range(4, 260)]
        tab.page.close()


def test_a_log_has_at_most_a_mebibyte(stage: Stage) -> None:
    [first] = followers(stage, 1)
    for n in range(4):
        stage.publish(str(n) * 400_000)
    first.wait_for_events(4)
    tab = stage.tab().follow(stage.channel, SHARED)
    tab.wait_for_events(3)
    assert [data[0] for data in tab.seen()] == ["{", "2", "3"]


# What the browser drops for a page that is frozen, this drops for one that is not.
MAY_BE_DEAF = """window.BroadcastChannel = class extends BroadcastChannel {
  set onmessage(hear) { super.onmessage = (event) => window.isDeaf || hear(event); }
}"""


@pytest.mark.parametrize("kind", ["ids of the server", "ids of the app", "keys"])
def test_what_a_successor_gets_again_is_not_told_again(stage: Stage, kind: str) -> None:
    [leader] = followers(stage, 1)
    successor = stage.tab(MAY_BE_DEAF).follow(stage.channel, SHARED)
    successor.wait_for_state(OPEN)
    ahead = stage.tab().follow(stage.channel, SHARED)
    stage.publish("0")
    for tab in (successor, ahead):
        tab.wait_for_data("0")
    successor.page.evaluate("isDeaf = true")
    for n in "123":
        own = f"{stage.name} {n}" if kind == "ids of the app" else None
        stage.publish(n, id=own, key="price" if kind == "keys" else None)
        # One by one: of those with one key, the next one may take the place of one on its way.
        ahead.wait_for_data(*"0123"[: int(n) + 1])
    leader.page.close()
    # Of those with one key, the server has only the last one.
    known = "03" if kind == "keys" else "0123"
    successor.wait_for_data(*known)
    stage.publish("4")
    successor.wait_for_data(*known, "4")
    ahead.wait_for_data(*"01234")
    successor.page.evaluate("isDeaf = false")
    late = stage.tab().follow(stage.channel, SHARED)
    late.wait_for_data(*known, "4")


def test_what_comes_late_from_a_predecessor_is_not_heeded(stage: Stage) -> None:
    leader, _, tab = followers(stage, 3)
    tab.page.evaluate("""async () => {
      const { held } = await navigator.locks.query();
      window.channel = new BroadcastChannel(held[0].name);
      channel.onmessage = ({ data }) => data.event && (window.heard ??= data);
    }""")
    stage.publish("0")
    tab.wait_for_data("0")
    wait_for(lambda: tab.page.evaluate("'heard' in window"))
    leader.page.close()
    stage.publish("1")
    tab.wait_for_data("0", "1")
    tab.page.evaluate("""() => {
      const { number, event } = heard;
      channel.postMessage({ ...heard, number: number + 2, event: { ...event, data: "late" } });
    }""")
    stage.publish("2")
    tab.wait_for_data("0", "1", "2")


def test_a_tab_that_was_deaf_for_a_while_asks_for_what_it_has_missed(stage: Stage) -> None:
    [leader] = followers(stage, 1)
    tab = stage.tab(MAY_BE_DEAF).follow(stage.channel, SHARED)
    tab.wait_for_state(OPEN)
    page = tab.page
    other = stage.tab().follow(stage.channel, SHARED)
    stage.publish("0")
    tab.wait_for_data("0")
    page.evaluate("isDeaf = true")
    stage.publish("1")
    other.wait_for_data("0", "1")
    page.evaluate("isDeaf = false")
    # It has a number that is not the next.
    stage.publish("2")
    tab.wait_for_data("0", "1", "2")
    page.evaluate("isDeaf = true")
    stage.publish("3")
    other.wait_for_data("0", "1", "2", "3")
    # Now there is no next one.
    page.evaluate("isDeaf = false; dispatchEvent(new Event('online'))")
    tab.wait_for_data("0", "1", "2", "3")
    assert stage.leader([leader, tab, other]) is leader


def test_who_comes_while_nobody_answers_asks_the_next_one(stage: Stage) -> None:
    leader, follower = followers(stage, 2)
    stage.publish("0")
    follower.wait_for_data("0")
    cdp = stage.context.new_cdp_session(leader.page)
    # It has the lock, and hears nothing.
    cdp.send("Page.setWebLifecycleState", {"state": "frozen"})
    late = stage.tab().follow(stage.channel, SHARED)
    leader.page.close()
    late.wait_for_data("0")
    stage.publish("1")
    late.wait_for_data("0", "1")
    follower.wait_for_data("0", "1")


def test_who_has_the_lock_before_it_knows_anything_asks_the_others(stage: Stage) -> None:
    [leader] = followers(stage, 1)
    # As if the answer of the one with the lock came later than the lock.
    script = """window.BroadcastChannel = class extends BroadcastChannel {
      set onmessage(hear) { super.onmessage = (event) => window.isHeir && hear(event); }
      postMessage(message) { window.isHeir ||= message.isHeir; super.postMessage(message); }
    }"""
    heir = stage.tab(script).follow(stage.channel, SHARED)
    other = stage.tab().follow(stage.channel, SHARED)
    stage.publish("0")
    other.wait_for_data("0")
    leader.page.close()
    heir.wait_for_data("0")
    stage.publish("1")
    other.wait_for_data("0", "1")
    heir.wait_for_data("0", "1")
    assert stage.leader([heir, other]) is heir


def test_two_that_ask_something_else_do_not_share(stage: Stage) -> None:
    tab = stage.tab()
    for options in (SHARED, SHARED, "{shared: 'mine'}", "{shared: true, method: 'POST'}"):
        tab.follow(f"/stream/answers/{stage.name}", options)
    tab.wait_for_events(4)
    assert len(stage.asked()) == 3


def test_tabs_of_two_users_do_not_share(stage: Stage) -> None:
    stage.context.add_cookies([{"name": "user", "value": "ada", "url": stage.server.url}])
    ada = [stage.tab().follow(stage.channel, "{shared: 'ada'}") for _ in range(2)]
    stage.wait_for_subscribers(1)
    # Somebody else logs in, in the same browser.
    stage.context.add_cookies([{"name": "user", "value": "bob", "url": stage.server.url}])
    bob = stage.tab().follow(stage.channel, "{shared: 'bob'}")
    stage.wait_for_subscribers(2)
    stage.publish("x")
    for tab in (*ada, bob):
        tab.wait_for_data("x")
    assert [row["cookie"] for row in stage.asked()] == ["user=ada", "user=bob"]


@pytest.mark.parametrize("key", ["undefined", "null", "''", "false", "0"])
def test_without_a_key_nobody_shares(stage: Stage, key: str) -> None:
    for _ in range(2):
        stage.tab().follow(stage.channel, f"{{shared: {key}}}")
    stage.wait_for_subscribers(2)


def test_what_everybody_shares_is_asked_for_by_nobody(stage: Stage) -> None:
    stage.context.add_cookies([{"name": "user", "value": "ada", "url": stage.server.url}])
    tabs = followers(stage, 2)
    assert [row["cookie"] for row in stage.asked()] == [None]
    for options in (
        "{shared: true, token: () => 'secret'}",
        "{shared: true, headers: () => ({})}",
        "{shared: true, withCredentials: true}",
        "{shared: true, credentials: 'same-origin'}",
    ):
        with pytest.raises(Error, match=r"TypeError: .* is for what everybody may read"):
            tabs[0].follow(stage.channel, options)
    assert len(stage.asked()) == 1


def test_other_headers_and_bodies_that_cannot_be_compared_are_not_shared(stage: Stage) -> None:
    url, tab = f"/stream/answers/{stage.name}", stage.tab()
    for options in (
        "{shared: 'ada', headers: {Authorization: 'Bearer secret'}}",
        "{shared: 'ada', headers: [['authorization', 'Bearer secret']]}",
        "{shared: 'ada', headers: {Authorization: 'Bearer other'}}",
        "{shared: 'ada', body: new URLSearchParams({a: 1})}",
        "{shared: 'ada', body: new URLSearchParams({a: 2})}",
        "{shared: 'ada', body: new Blob(['1'])}",
        "{shared: 'ada', body: new Blob(['2'])}",
    ):
        tab.follow(url, options)
    tab.wait_for_events(7)
    assert len(stage.asked()) == 6
    names = tab.page.evaluate(
        "navigator.locks.query().then(({held}) => held.map(({name}) => name))"
    )
    assert len(names) == 6
    assert all(re.fullmatch("eventstream [0-9a-f]{64}", name) for name in names)


def test_all_tabs_hear_of_the_end_and_of_an_error_that_closes_the_stream(stage: Stage) -> None:
    url = f"/stream/chat/{stage.name}"
    post = """{shared: true, body: '{"prompt": "Hi"}',
      headers: {"Content-Type": "application/json", "X-Page": ""}}"""
    tabs = [stage.tab().follow(url, post) for _ in range(3)]
    for tab in tabs:
        tab.wait_for_data("Hi ")
    stage.post(f"/go/{stage.name}")
    for tab in tabs:
        tab.wait_for_state(CLOSED)
        assert tab.seen() == ["Hi ", "the end", "{}"]
        assert tab.told() == ["open"]
    assert [row["method"] for row in stage.asked()] == ["POST"]
    for tab in tabs:
        tab.page.evaluate("told = []")
        tab.follow("/nowhere", SHARED)
    for tab in tabs:
        tab.wait_for_state(CLOSED)
        assert [told[0] for told in tab.told()] == [404]
    tabs[0].page.close()


def test_who_begins_anew_after_the_end_is_not_told_of_the_old_one(stage: Stage) -> None:
    stage.post(f"/answer/{stage.name}", [404])
    tab = stage.tab()
    tab.page.evaluate(
        """(url) => {
          const stream = new EventStream(url, {shared: true});
          stream.onerror = () => setTimeout(() => follow(url, {shared: true}), 10);
        }""",
        f"/stream/answers/{stage.name}",
    )
    wait_for(lambda: len(stage.asked()) == 2)
    tab.wait_for_data("data")
    assert tab.told() == ["open"]


def test_without_locks_each_tab_has_a_connection(stage: Stage) -> None:
    # What a page has that came over plain HTTP.
    stage.context.add_init_script("delete Navigator.prototype.locks")
    followers(stage, 2)
    stage.wait_for_subscribers(2)


def test_in_a_sandboxed_frame_a_stream_has_a_connection_of_its_own(stage: Stage) -> None:
    followers(stage, 1)
    page = stage.tab().page
    page.evaluate("""() => {
      const frame = document.createElement("iframe");
      Object.assign(frame, {sandbox: "allow-scripts", src: "/"});
      document.body.append(frame);
    }""")
    frame = wait_for(lambda: page.frames[1:], what="the frame")[0]
    wait_for(lambda: frame.evaluate("'follow' in window"))
    frame.evaluate(f"follow({stage.server.url + stage.channel!r}, {SHARED})")
    stage.wait_for_subscribers(2)
    stage.publish("one")
    wait_for(lambda: frame.evaluate("seen.map((event) => event[1])") == ["one"])
    stage.post(f"/end/{stage.name}")
    # Its origin is no other's, so the cursor goes without a header.
    wait_for(lambda: None in [row["header"] for row in stage.asked() if row["cursor"]])
    stage.publish("two")
    wait_for(lambda: frame.evaluate("seen.map((event) => event[1])") == ["one", "two"])


# What the documentation says

PAGE = (ROOT / "docs" / "browser.rst").read_text("utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: javascript\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)


class DocsPage:
    """A page with blocks of the documentation in it, whose channel and run are the test's."""

    def __init__(self, stage: Stage, *parts: str) -> None:
        self.page = stage.context.new_page()
        self.page.goto(f"{stage.server.url}/docs")
        found = [block for block in BLOCKS if any(part in block for part in parts)]
        assert len(found) == len(parts)
        imported = "" if "import" in found[0] else BLOCKS[0].splitlines()[0]
        code = "\n".join([imported, *found])
        code = code.replace("channel=news", f"channel={stage.name}")
        code = code.replace("function ask", "window.ask = ask; function ask")
        code = code.replace("${conversation}", stage.name)
        self.page.add_script_tag(content=code, type="module")

    def wait_for(self, expression: str, value: Any) -> None:
        wait_for(
            lambda: self.page.evaluate(expression) == value or None,
            what=f"{value} to be {expression}: {self.page.evaluate(expression)}",
        )


def test_the_first_page_of_the_docs_shows_what_is_published_and_what_goes_wrong(
    stage: Stage,
) -> None:
    docs = DocsPage(stage, 'new EventStream("/stream?channel=news");', "connecting again")
    stage.wait_for_subscribers(1)
    stage.publish("Hello!")
    docs.wait_for("shown", ["Hello!"])
    stage.post(f"/end/{stage.name}")
    docs.wait_for("shown", ["Hello!", "connecting again"])


def test_the_page_of_the_docs_with_a_token_reads_by_it(stage: Stage) -> None:
    docs = DocsPage(stage, "token: async")
    wait_for(stage.asked)
    # The token is for another channel, and the app decides on this one.
    stage.wait_for_subscribers(1)
    stage.publish("Hello!")
    docs.wait_for("shown", ["Hello!"])
    assert stage.asked()[0]["token"].startswith("Bearer es1.")


def test_the_page_of_the_docs_writes_what_the_model_says(stage: Stage) -> None:
    docs = DocsPage(stage, "function ask")
    wait_for(lambda: docs.page.evaluate("Boolean(window.ask)"))
    docs.page.evaluate("void ask('Hello, ')")
    docs.wait_for("text.value", "Hello,  ")
    stage.post(f"/go/{stage.name}")
    docs.wait_for("state.value", "end")
    assert docs.page.evaluate("text.value") == "Hello,  the end"


def test_the_pages_of_the_docs_share_a_connection_and_their_list(stage: Stage) -> None:
    first = DocsPage(stage, "shared: true")
    stage.wait_for_subscribers(1)
    stage.publish("one")
    for docs in (first, DocsPage(stage, "shared: true")):
        docs.wait_for("list.innerText", "one")
    assert len(stage.asked()) == 1


# The last one: the server is another one then


@pytest.mark.parametrize("options", ["{}", "{shared: true}"])
def test_a_new_server_sends_a_reset(stage: Stage, options: str) -> None:
    tabs = [stage.tab().follow(stage.channel, options) for _ in range(2)]
    for tab in tabs:
        tab.wait_for_state(OPEN)
    lost = stage.publish("before")
    for tab in tabs:
        tab.wait_for_data("before")
    stage.server.stop()
    stage.server.start()
    for tab in tabs:
        tab.wait_for_events(2)
    stage.publish("after")
    for tab in tabs:
        tab.wait_for_events(3)
        types = [event[0] for event in tab.seen(data=False)]
        assert types == ["message", "reset", "message"]
        assert json.loads(tab.seen()[1]) == {"requested": lost, "earliest": None}
        assert tab.seen()[2] == "after"
