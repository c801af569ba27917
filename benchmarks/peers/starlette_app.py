"""Starlette's bare ``StreamingResponse``. Each event is encoded once, when it is published."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from feed import Feed, numbered
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

feed: Feed[bytes] = Feed()
ids = count(1)


async def events() -> AsyncIterator[bytes]:
    """Yield what is published, from now on."""
    with feed.subscribed() as queue:
        yield b":\nretry: 3000\n"
        while True:
            yield await queue.get()


def send(data: str) -> None:
    """Publish an event with some data."""
    feed.publish(f"id: {next(ids)}\ndata: {data}\n\n".encode())


async def stream(request: Request) -> Response:
    """Answer a subscriber."""
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def publish(request: Request) -> Response:
    """Publish the body."""
    send((await request.body()).decode())
    return Response(status_code=204)


async def burst(request: Request) -> Response:
    """Publish the body ``n`` times."""
    data = (await request.body()).decode()
    for each in numbered(int(request.query_params["n"]), data):
        send(each)
    return Response(status_code=204)


app = Starlette(
    routes=[
        Route("/stream", stream),
        Route("/publish", publish, methods=["POST"]),
        Route("/burst", burst, methods=["POST"]),
    ]
)
