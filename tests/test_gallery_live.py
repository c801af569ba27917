"""The pages of the gallery that many look at together: the ticker, the game and the chat room."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from example_app import create_app
from example_app.game import WIDTH, place_of, touches
from example_app.ticker import POINTS, SYMBOLS, has_turn, price

from .browser import Visitor, reaches
from .servers import serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask
    from flask.testing import FlaskClient
    from playwright.sync_api import Page

    from flask_eventstream.testing import ClientStream

    from .redis_server import RedisServer
    from .servers import Server

    OpenStream = Callable[..., ClientStream]
    NewVisitor = Callable[[], Visitor]

pytestmark = pytest.mark.beside

CONFIG = {
    "TICK_SECONDS": 0.05,
    "REST_SECONDS": 1.0,
    "DOT_SECONDS": 3.0,
    "EVENTSTREAM_RETRY": 200,
    "EVENTSTREAM_PRESENCE_SECONDS": 0.5,
}
SECRET = "test"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One process, which has a broker of its own."""
    with serving(f"example_app:create_app({CONFIG!r})", "gevent") as server:
        yield server
        assert server.log() == ""


@pytest.fixture(scope="module")
def two_processes(redis: RedisServer) -> Iterator[Server]:
    config = {**CONFIG, "EVENTSTREAM_KEY_PREFIX": redis.prefix()}
    app = f"example_app:create_app({config!r})"
    environ = {"REDIS_URL": redis.url, "SECRET_KEY": SECRET}
    with serving(app, "gevent", "--workers=2", environ=environ) as server:
        yield server


@pytest.fixture
def app() -> Flask:
    return create_app({"TESTING": True, **CONFIG})


# Ticker


def test_the_ticker_begins_with_all_prices_and_goes_on_with_what_changes(
    server: Server, new_visitor: NewVisitor
) -> None:
    page = new_visitor().opens(server, "/ticker")
    reaches(page, "#count", 20)
    for symbol in SYMBOLS:
        row = page.locator(f"#{symbol}")
        expect(row.locator(".price")).to_have_text(re.compile(r"^[▲▼] \d+\.\d\d$"))
        points = row.locator("polyline").get_attribute("points") or ""
        assert len(points.split()) == POINTS


def test_a_slow_reader_gets_only_the_newest_price_of_each_symbol(
    server: Server, new_visitor: NewVisitor
) -> None:
    page = new_visitor().opens(server, "/ticker")
    page.check("#slow")
    expect(page.locator("#slow-state")).to_have_text("not reading")
    expect(page.locator("#stale")).to_have_text(re.compile(r"^[1-9]"))
    report = re.compile(r"Of \d+ events .* and [1-9]\d* were replaced .* no price was stale\.")
    expect(page.locator("#report")).to_have_text(report)
    shown = "['published', 'received', 'replaced'].map((id) => document.getElementById(id).value)"
    published, received, replaced = map(int, page.evaluate(shown))
    assert published == received + replaced


def test_prices_are_made_as_long_as_somebody_watches(app: Flask, event_stream: OpenStream) -> None:
    for _ in range(2):
        stream = event_stream("/ticker/prices")
        snapshot = json.loads(stream.next().data)
        assert [quote["symbol"] for quote in snapshot] == list(SYMBOLS)
        told = {quote["symbol"]: quote["past"][-1] for quote in snapshot}
        trade = json.loads(stream.next().data)
        assert trade["price"] == price(trade["symbol"], trade["trade"])
        assert 0.5 < trade["price"] / told[trade["symbol"]] < 2
        stream.close()
        wait_for(lambda: "ticker" not in [thread.name for thread in threading.enumerate()])


def test_no_two_processes_have_the_turn_and_none_keeps_it_that_dies(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys; turn = open(sys.argv[1], 'a'); fcntl.flock(turn, fcntl.LOCK_EX);"
        "print(flush=True); input()"
    )
    path = tmp_path / "turn"
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other, path.open("a") as turn:
        assert other.stdout is not None
        other.stdout.readline()
        assert not has_turn(turn)
        other.kill()
        wait_for(lambda: has_turn(turn), what="the turn to be free")
        assert has_turn(turn)


# None ends before the others: a process whose readers have gone hands its turn on, and the one that
# has it then begins with what was published last.
READ_TRADES = """async (streams) => {
    const { readEvents } = await import("/static/js/read-events.js");
    const all = [];
    const read = async () => {
        const trades = [];
        all.push(trades);
        for await (const { type, data } of readEvents((await fetch("/ticker/prices")).body)) {
            if (type === "message") trades.push(JSON.parse(data));
            if (all.length === streams && all.every((trades) => trades.length > 40)) return;
        }
    };
    await Promise.all(Array.from({ length: streams }, read));
    return all.map((trades) => trades.slice(0, 40).map(({ symbol, trade }) => [symbol, trade]));
}"""


def test_two_processes_publish_each_trade_once(
    two_processes: Server, new_visitor: NewVisitor
) -> None:
    page = new_visitor().opens(two_processes, "/")
    for trades in page.evaluate(READ_TRADES, 4):
        for symbol in SYMBOLS:
            numbers = [number for name, number in trades if name == symbol]
            assert numbers == sorted(set(numbers))


# Game


def test_players_see_each_other_and_who_catches_the_dot(
    server: Server, new_visitor: NewVisitor
) -> None:
    one, other = (new_visitor().opens(server, "/game") for _ in range(2))
    moves_to(other, 0.1, 0.9)
    catches_a_dot(one)
    expect(one.locator("#news")).to_have_text("You have caught the dot.")
    expect(other.locator("#news")).to_have_text(re.compile(r"^\w+ \w+ has caught the dot\.$"))
    expect(other.locator("#players li")).to_have_count(2)
    expect(other.locator("#players li").first).to_have_text(re.compile(r"[1-9]$"))
    # Nobody stores points: a newcomer counts what the history has.
    newcomer = new_visitor().opens(server, "/game")
    expect(newcomer.locator("#players li").first).to_have_text(re.compile(r"[1-9]$"))
    one.close()
    expect(other.locator("#players li")).to_have_count(1)


def test_a_cursor_is_drawn_where_it_is(server: Server, new_visitor: NewVisitor) -> None:
    one, other = (new_visitor().opens(server, "/game") for _ in range(2))
    moves_to(one, 0.2, 0.2)
    expect(other.locator("#players li")).to_have_count(1)
    moves_to(one, 1.2, 0.7)
    wait_for(lambda: other.evaluate(IS_DRAWN_AT, [1.2, 0.7]), what="the cursor to arrive")


IS_DRAWN_AT = """([x, y]) => {
    const field = document.getElementById("field");
    const options = { willReadFrequently: true };
    const copy = document.createElement("canvas").getContext("2d", options);
    const pixel = () => String(copy.getImageData(0, 0, 1, 1).data);
    copy.drawImage(field, -Math.round(x * field.height), -Math.round(y * field.height));
    const drawn = pixel();
    const [player] = document.querySelectorAll("#players li");
    copy.fillStyle = player.style.getPropertyValue("--colour");
    copy.fillRect(0, 0, 1, 1);
    return drawn === pixel();
}"""


def test_a_finger_and_the_arrow_keys_move_the_cursor(
    server: Server, new_visitor: NewVisitor
) -> None:
    visitor = new_visitor()
    page = visitor.opens(server, "/game")
    place = page.locator("#field").bounding_box()
    assert place is not None
    finger = visitor.context.new_cdp_session(page)
    at = [{"x": place["x"] + 50, "y": place["y"] + 50}]
    finger.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(page.locator("#players li")).to_have_text(re.compile(r"\(you\)"))
    with page.expect_request(lambda one: is_move(one) and (one.post_data_json or {})["x"] > 0.3):
        for _ in range(5):
            page.press("#field", "ArrowRight")


def is_move(request: Any) -> bool:
    return str(request.url).endswith("/game/move")


def test_a_page_tells_its_place_at_most_twenty_times_a_second(
    server: Server, new_visitor: NewVisitor
) -> None:
    page = new_visitor().opens(server, "/game")
    moves: list[Any] = []
    page.on("request", lambda one: moves.append(one) if is_move(one) else None)
    began = time.monotonic()
    moves_to(page, 0.1, 0.5)
    moves_to(page, 1, 0.5, steps=60)
    while moves[-1].post_data_json["x"] < 0.98:
        with page.expect_request(is_move):
            pass
    assert len(moves) <= 2 + (time.monotonic() - began) / 0.05


def catches_a_dot(page: Page) -> None:
    def is_there() -> bool:
        x, y = place_of(int(time.time() / CONFIG["DOT_SECONDS"]))
        # Each time anew: a mouse that stays where it is says nothing.
        moves_to(page, x + 0.01, y)
        moves_to(page, x, y)
        return page.locator("#news").text_content() != ""

    wait_for(is_there, what="the dot to be caught")


def moves_to(page: Page, x: float, y: float, steps: int = 1) -> None:
    box = page.locator("#field").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x * box["height"], box["y"] + y * box["height"], steps=steps)


def test_who_has_left_the_game_is_not_there_for_a_newcomer(
    client: FlaskClient, event_stream: OpenStream
) -> None:
    place = {"x": 0.5, "y": 0.5, "dot": 0, "sent": 0}
    for secret in ("one", "two"):
        for _ in range(3):
            assert client.post("/game/move", json={"secret": secret, **place}).status_code == 200
    assert client.post("/game/leave", json={"secret": "one"}).status_code == 200
    stream = event_stream("/game/events")
    assert [stream.next().type, stream.next().type] == ["move", "leave"]


@pytest.mark.parametrize(
    "wrong",
    [{"x": WIDTH + 1}, {"y": -1}, {"x": "1"}, {"x": math.nan}, {"sent": None}, {"secret": ""}],
)
def test_a_move_to_nowhere_is_refused(client: FlaskClient, wrong: dict[str, Any]) -> None:
    move = {"secret": "one", "x": 1, "y": 1, "dot": 0, "sent": 0, **wrong}
    assert client.post("/game/move", json=move).status_code == 400


def test_a_dot_is_caught_where_and_when_it_is(app: Flask) -> None:
    now = 3_000_000_000.0
    dot = int(now / CONFIG["DOT_SECONDS"])
    x, y = place_of(dot)
    with app.app_context():
        assert touches(dot, x + 0.01, y, now)
        assert not touches(dot, x + 0.1, y, now)
        assert not touches(dot, x, y, now - 1)
        assert not touches(dot, x, y, now + 2 * CONFIG["DOT_SECONDS"])


# Chat room


def enters(visitor: Visitor, server: Server, name: str, room: str) -> Page:
    page = visitor.opens(server, f"/chat-room?room={room}")
    page.fill("#name", name)
    page.click("#rename")
    expect(page.locator("#members")).to_contain_text(f"{name} (you)")
    return page


def says(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.click("#say")
    expect(page.locator("#text")).to_have_value("")


def said(page: Page) -> list[str]:
    rows = page.locator("#messages li:not(.event)").all_text_contents()
    # Behind the time, which ends with the seconds and perhaps a word.
    return [re.sub(r"^\w+, [\d:]+(\s[AP]M)?", "", row) for row in rows]


def test_a_chat_room_tells_who_is_there_and_who_comes_and_goes(
    server: Server, new_visitor: NewVisitor
) -> None:
    ada = enters(new_visitor(), server, "Ada", "one")
    says(ada, "Is anybody here?")
    bob = enters(new_visitor(), server, "Bob", "one")
    # The history, before he came.
    assert said(bob) == ["Is anybody here?"]
    says(bob, "<b>I am.</b>")
    wait_for(lambda: said(ada) == ["Is anybody here?", "<b>I am.</b>"])
    wait_for(lambda: ada.locator("#members li").all_text_contents() == ["Ada (you)", "Bob"])
    expect(ada.locator("#count")).to_have_text("2")
    bob.close()
    expect(ada.locator("#messages")).to_contain_text("Bob has left.")
    expect(ada.locator("#count")).to_have_text("1")


def test_who_was_offline_gets_what_was_said_meanwhile(
    server: Server, new_visitor: NewVisitor
) -> None:
    ada = enters(new_visitor(), server, "Ada", "two")
    bob = enters(new_visitor(), server, "Bob", "two")
    bob.click("#offline")
    expect(ada.locator("#messages")).to_contain_text("Bob has left.")
    says(ada, "Bob?")
    assert said(bob) == []
    bob.click("#online")
    wait_for(lambda: said(bob) == ["Bob?"])
    # Only the tail of it was missed: who was there before is not told again.
    expect(bob.locator("#messages")).to_contain_text("Bob has left.")
    expect(bob.locator("#count")).to_have_text("2")


def test_nothing_said_is_lost_or_doubled_when_all_processes_are_killed(
    two_processes: Server, new_visitor: NewVisitor
) -> None:
    visitors = [new_visitor(), new_visitor()]
    ada = enters(visitors[0], two_processes, "Ada", "three")
    bob = enters(visitors[1], two_processes, "Bob", "three")
    says(ada, "one")
    wait_for(lambda: said(bob) == ["one"])
    for page in (ada, bob):
        # As whom they have come first is forgotten by now.
        expect(page.locator("#count")).to_have_text("2")
    for worker in workers(two_processes):
        os.kill(worker, signal.SIGKILL)
    says(ada, "two")
    says(bob, "three")
    for page in (ada, bob):
        wait_for(lambda page=page: said(page) == ["one", "two", "three"])  # type: ignore[misc]
        expect(page.locator("#count")).to_have_text("2")
    # Chromium reports the streams that broke off.
    broken = "error: Failed to load resource: net::ERR_"
    for visitor in visitors:
        visitor.problems = [one for one in visitor.problems if not one.startswith(broken)]


def workers(server: Server) -> list[int]:
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_room_is_closed_to_those_without_a_name(client: FlaskClient) -> None:
    assert client.get("/chat-room/lobby/events").status_code == 401
    assert client.post("/chat-room/lobby/say", data={"text": "x"}).status_code == 401


@pytest.mark.parametrize("room", ["", "a b", "<b>", "x" * 31])
def test_a_room_that_cannot_be_is_not_found(client: FlaskClient, room: str) -> None:
    assert client.get("/chat-room", query_string={"room": room}).status_code == 404


@pytest.mark.parametrize("name", ["", " ", "x" * 31, "\x00"])
def test_a_name_that_cannot_be_is_a_bad_request(client: FlaskClient, name: str) -> None:
    assert client.post("/chat-room/name", data={"name": name}).status_code == 400
