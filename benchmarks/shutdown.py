"""How long a server takes to be gone once it is told to stop, with all its streams open.

Each server has so many streams (``--streams``, 10,000 by default; a fifth of them where each takes
a thread, and one where the server serves one request at a time). Then the process gets
SIGTERM. Its clients read, and close what has ended, as browsers do. A stream has ended cleanly if
its last line says when to return, and its body is complete.

``python -m benchmarks.shutdown``
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import print_columns, print_machine, raise_descriptor_limit
from tests.servers import free_port, gunicorn, running
from tests.stress import UNTRACED, Readers
from tests.test_shutdown import PYWSGI

LIMIT = 2.0
_PER_THREAD = 5
_AT_ONCE = 200
_FAREWELL = re.compile(rb"retry: \d+\n(\r\n0\r\n\r\n)?\Z")


class Case(NamedTuple):
    """One server with streams of one kind; ``share`` is how many of all of them it gets."""

    server: str
    streams: str
    path: str
    is_hijacked: bool
    share: float


CASES = [
    *[Case(name, "subscribers, hub", "/stream", True, 1) for name in ("gevent", "gthread", "sync")],
    Case("pywsgi", "subscribers, hub", "/stream", True, 1),
    Case("gevent", "subscribers, iterated", "/stream", False, 1),
    Case("gthread", "subscribers, iterated", "/stream", False, 1 / _PER_THREAD),
    Case("sync", "subscriber, iterated", "/stream", False, 0),
    Case("pywsgi", "subscribers, iterated", "/stream", False, 1),
    Case("gevent", "generators that wait", "/stream/blocked", True, 1),
    Case("gevent", "generators, heartbeat=", "/stream/mute", True, 1),
    # Ten items a second each, which is what the GIL can do.
    Case("gthread", "generators that tick", "/stream/ticks", True, 1 / (10 * _PER_THREAD)),
    # Two threads each.
    Case("gthread", "generators, heartbeat=", "/stream/mute", True, 1 / (2 * _PER_THREAD)),
    Case("sync", "generator that ticks", "/stream/ticks", True, 0),
]


def command(case: Case, port: int, streams: int) -> list[str]:
    config = {"EVENTSTREAM_HIJACK": case.is_hijacked, "EVENTSTREAM_MAX_SUBSCRIBERS": 10**6}
    if case.server == "pywsgi":
        road = ["hub"] if case.is_hijacked else []
        return [sys.executable, "-c", PYWSGI, str(port), "patched", *road]
    room = str(2 * streams + 100)
    options = {
        "gevent": ["--worker-connections", room],
        "gthread": ["--threads", room, "--worker-connections", room],
        "sync": [],
    }[case.server]
    options = [*options, "--graceful-timeout", "30"]
    return gunicorn(f"tests.apps:create_app({config})", case.server, *options, port=port)


def measure(case: Case, all_streams: int) -> dict[str, Any]:
    streams = max(1, int(all_streams * case.share))
    port = free_port()
    with (
        running(command(case, port, streams), port, UNTRACED) as server,
        closing(Readers(port)) as clients,
    ):
        numbers: list[int] = []
        while len(numbers) < streams:
            numbers += clients.connect(case.path, min(_AT_ONCE, streams - len(numbers)))
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        seconds = time.monotonic() - start
        clean = sum(bool(_FAREWELL.search(end)) for end in clients.ends(numbers))
    return {"streams": streams, "seconds": round(seconds, 2), "clean": clean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    raise_descriptor_limit()
    machine = print_machine(["flask-eventstream", "flask", "gunicorn", "gevent"])
    found: dict[str, Any] = {"machine": machine}
    slow: list[str] = []
    lines = [["", "streams", "seconds (each round)", "ended cleanly"]]
    slow: list[str] = []
    for case in CASES:
        name = f"{case.server}, {case.streams}"
        rounds = [measure(case, options.streams) for _ in range(options.rounds)]
        found[name] = rounds
        seconds = [one["seconds"] for one in rounds]
        if max(seconds) > LIMIT:
            slow.append(name)
        clean = min(one["clean"] for one in rounds)
        shown = " ".join(f"{one:.2f}" for one in seconds)
        lines.append([name, f"{rounds[0]['streams']:,}", shown, f"{clean:,}"])
        print(*lines[-1], file=sys.stderr)
    print_columns(lines)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    print(f"\nBar: {LIMIT} s. " + (f"MISSED by {', '.join(slow)}." if slow else "Met."))


if __name__ == "__main__":
    main()
