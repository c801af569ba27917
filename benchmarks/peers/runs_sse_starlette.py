"""The same tokens by sse-starlette's ``EventSourceResponse``, with an async generator."""

from __future__ import annotations

import asyncio
import random
import time
from itertools import count
from typing import TYPE_CHECKING

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response


async def plain(request: Request) -> Response:
    """Answer a client."""
    return EventSourceResponse(tokens(float(request.query_params["pause"])))


async def tokens(pause: float) -> AsyncIterator[dict[str, str]]:
    """Yield tokens with their number and time, ``pause`` seconds apart on average."""
    for number in count():
        yield {"data": f"{number}@{time.monotonic_ns()}@word~"}
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))


app = Starlette(routes=[Route("/stream/plain/{number}", plain, methods=["POST"])])
