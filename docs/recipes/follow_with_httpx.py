"""Follow a stream with httpx-sse, and come back when it is cut off."""

import random
import time

import httpx
from httpx_sse import connect_sse


def follow(url, cursor="", silence=45):
    """Yield the events; ``silence`` is what a connection may have before it is dead (seconds)."""
    pause = 3
    with httpx.Client(timeout=httpx.Timeout(10, read=silence)) as client:
        while True:
            headers = {"Last-Event-ID": cursor} if cursor else {}
            try:
                with connect_sse(client, "GET", url, headers=headers) as source:
                    if source.response.status_code == 204:
                        return
                    source.response.raise_for_status()
                    for event in source.iter_sse():
                        cursor = event.id
                        pause = pause if event.retry is None else event.retry / 1000
                        yield event
                        if event.event in ("end", "stream-error"):
                            return
            except httpx.TransportError:
                pass
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
            time.sleep(pause * random.uniform(0.8, 1.2))
