"""FastAPI's own server-sent events: a path operation that yields ``ServerSentEvent``.

FastAPI reads the annotations of its views when it registers them, so that they are no strings here.
"""

from collections.abc import AsyncIterable
from itertools import count

from fastapi import FastAPI, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from feed import Feed, numbered

app = FastAPI()
feed: Feed[ServerSentEvent] = Feed()
ids = count(1)


def send(data: str) -> None:
    """Publish an event with some data, as it is, not as JSON."""
    feed.publish(ServerSentEvent(id=str(next(ids)), raw_data=data))


@app.get("/stream", response_class=EventSourceResponse)
async def stream() -> AsyncIterable[ServerSentEvent]:
    """Yield what is published, from now on."""
    with feed.subscribed() as queue:
        while True:
            yield await queue.get()


@app.post("/publish", status_code=204)
async def publish(request: Request) -> Response:
    """Publish the body."""
    send((await request.body()).decode())
    return Response(status_code=204)


@app.post("/burst", status_code=204)
async def burst(request: Request, n: int) -> Response:
    """Publish the body ``n`` times."""
    for each in numbered(n, (await request.body()).decode()):
        send(each)
    return Response(status_code=204)
