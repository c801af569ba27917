"""Clients that keep their connections, and streams that end on them: no request is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import aiohttp
import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter

from .npm import CLIENTS, node
from .proxies import nginx
from .roads import GUNICORN
from .servers import DEADLINE, Server, free_port, running, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Asked = list[tuple[str, str]]
    Answers = list[str]

pytestmark = pytest.mark.beside

REQUESTS = int(os.environ.get("POOLED_REQUESTS", 100))
"""How many runs each client asks for, and how many ordinary answers beside them."""

AT_ONCE = 8
SERVERS = ["sync", "gthread", "gevent", "pywsgi", "pywsgi-patched", "werkzeug-threaded"]
APP = "tests.pooled_app:create_app"


@contextmanager
def server_named(name: str) -> Iterator[Server]:
    if name in GUNICORN:
        # So that it closes none for being idle, which may be when a client is about to use it.
        with serving(f"{APP}()", *GUNICORN[name], "--keep-alive=300") as server:
            yield server
        return
    port = free_port()
    command = [sys.executable, "-m", "tests.hijack_servers", name, str(port), APP]
    with running(command, port) as server:
        yield server


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> Iterator[Server]:
    with server_named(request.param) as server:
        yield server
        assert "Traceback" not in server.log()


# The clients. Each sends POSTs, AT_ONCE of them at a time, and tries none of them again.


def by_threads(ask: Callable[[str, str], str], asked: Asked) -> Answers:
    def answer(one: tuple[str, str]) -> str:
        try:
            return ask(*one)
        except (httpx.HTTPError, requests.RequestException) as error:
            return repr(error)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(answer, asked))


def ask_by_httpx(url: str, asked: Asked) -> Answers:
    transport = httpx.HTTPTransport(retries=0)
    with httpx.Client(base_url=url, transport=transport, timeout=DEADLINE) as client:

        def ask(path: str, body: str) -> str:
            answer = client.post(path, content=body)
            return f"{answer.status_code} {answer.text}"

        return by_threads(ask, asked)


def ask_by_requests(url: str, asked: Asked) -> Answers:
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=0))

        def ask(path: str, body: str) -> str:
            with session.post(url + path, body, timeout=DEADLINE) as answer:
                return f"{answer.status_code} {answer.text}"

        return by_threads(ask, asked)


def ask_by_aiohttp(url: str, asked: Asked) -> Answers:
    return asyncio.run(answers_of_aiohttp(url, asked))


async def answers_of_aiohttp(url: str, asked: Asked) -> Answers:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=DEADLINE, sock_read=DEADLINE)
    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(path: str, body: str) -> str:
            try:
                async with session.post(url + path, data=body) as answer:
                    return f"{answer.status} {await answer.text()}"
            except aiohttp.ClientError as error:
                return repr(error)

        return await asyncio.gather(*[ask(*one) for one in asked])


def ask_by_node(url: str, asked: Asked) -> Answers:
    command = [node(), "pooled.mjs", url, str(AT_ONCE)]
    output = subprocess.run(
        command, cwd=CLIENTS, input=json.dumps(asked).encode(), capture_output=True, check=True
    ).stdout
    answers: Answers = json.loads(output)
    return answers


# What is asked, and how often it fails


def asked_for() -> Asked:
    pairs = [
        ((f"/stream/run/{number}", f"run {number}"), (f"/stream/echo/{number}", f"echo {number}"))
        for number in range(REQUESTS)
    ]
    return list(chain.from_iterable(pairs))


def expected(path: str, body: str) -> str:
    """Return a pattern for the whole answer."""
    name = path.rpartition("/")[2]
    if "echo" in path:
        return f"200 {name} {body}"
    items = [rf"data: {name} {number} {body}\nid: \S+\n\n" for number in range(3)]
    return rf"200 :\nretry: \d+\n{''.join(items)}event: end\ndata: {{}}\nid: \S+\n\n"


def failures(ask: Callable[[str, Asked], Answers], url: str) -> list[tuple[str, str]]:
    asked = asked_for()
    answers = ask(url, asked)
    assert len(answers) == len(asked)
    return [
        (path, answer)
        for (path, body), answer in zip(asked, answers, strict=True)
        if not re.fullmatch(expected(path, body), answer)
    ]


@pytest.mark.parametrize("ask", [ask_by_httpx, ask_by_requests, ask_by_aiohttp, ask_by_node])
def test_no_request_of_a_pool_fails_beside_runs_that_end(
    served: Server, ask: Callable[[str, Asked], Answers]
) -> None:
    assert failures(ask, served.url) == []


def test_no_request_through_the_nginx_of_the_docs_fails_beside_runs_that_end(
    served: Server, tmp_path: Path
) -> None:
    with nginx(tmp_path, served.port) as proxy:
        assert failures(ask_by_httpx, proxy.url) == []
