"""Read a stream once with sseclient-py and requests."""

import requests
from sseclient import SSEClient


def read(url, cursor="", silence=45):
    """Yield the events; ``silence`` is what a connection may have before it is dead (seconds)."""
    headers = {"Last-Event-ID": cursor} if cursor else {}
    with requests.get(url, headers=headers, stream=True, timeout=(10, silence)) as answer:
        answer.raise_for_status()
        yield from SSEClient(answer.iter_content(chunk_size=None)).events()
