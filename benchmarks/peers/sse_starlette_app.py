"""sse-starlette's ``EventSourceResponse``, with a generator that yields dicts, as in its README."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from feed import Feed, numbered
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

feed: Feed[dict[str, str]] = Feed()
ids = count(1)


async def events() -> AsyncIterator[dict[str, str]]:
    """Yield what is published, from now on."""
    with feed.subscribed() as queue:
        while True:
            yield await queue.get()


def send(data: str) -> None:
    """Publish an event with some data."""
    feed.publish({"id": str(next(ids)), "data": data})


async def stream(request: Request) -> Response:
    """Answer a subscriber."""
    return EventSourceResponse(events())


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
