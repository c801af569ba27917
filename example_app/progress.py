"""Jobs that run somewhere else, and tell how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flask import Blueprint, abort, current_app, request, session

from flask_eventstream import MemoryBroker, eventstream
from flask_eventstream.errors import BrokerUnavailableError

from .job import Job

if TYPE_CHECKING:
    from uuid import UUID

    from flask_eventstream import EventStreamResponse

progress = Blueprint("progress", __name__, url_prefix="/progress")

LIMITS = (10_000, 100_000, 1_000_000)
"""Below which number a job may count the primes."""

MAX_JOBS = 4
"""How many jobs one process of the app looks after at once."""


@progress.post("/jobs")
def start() -> dict[str, str]:
    """Start a job, which only this session may see and cancel."""
    limit = request.form.get("limit", type=int)
    if limit not in LIMITS:
        abort(400, f"The limit is none of {LIMITS}.")
    jobs = current_app.extensions.setdefault("jobs", set())
    if len(jobs) >= MAX_JOBS:
        abort(429, f"{MAX_JOBS} jobs run. Wait for one, or cancel it.")
    pause = current_app.config["STEP_SECONDS"]
    job = Job(str(uuid4()), owner(), limit, pause)
    jobs.add(job)
    state = current_app.extensions["eventstream"]
    Thread(target=look_after, args=[job, state, jobs], daemon=True).start()
    return {"id": job.id}


def look_after(job: Job, state: Any, jobs: set[Job]) -> None:
    """Stay with a job, and report it if it can no more do so itself."""
    try:
        if isinstance(state.broker, MemoryBroker):
            job.run(state.broker)  # which no other process can reach
        elif run_elsewhere(job, state.config) != 0:
            with suppress(BrokerUnavailableError):  # It reaches nobody.
                job.tell(state.broker, "failed", "Its process has died.")
    finally:
        jobs.discard(job)


def run_elsewhere(job: Job, config: Any) -> int:
    """Run a job in a new process, and return how that has ended."""
    command = [sys.executable, "-m", "example_app.worker"]
    environ = {
        **os.environ,
        "REDIS_URL": config.broker_url,
        "KEY_PREFIX": config.key_prefix,
    }
    folder = Path(__file__).parent.parent
    task = json.dumps(asdict(job))
    ended = subprocess.run(command, input=task, text=True, env=environ, cwd=folder)
    return ended.returncode


@progress.get("/jobs")
def all_jobs() -> EventStreamResponse:
    """Send what is known of this session's jobs, and then what is new."""
    return eventstream.subscribe(f"jobs:{owner()}", history=256)


@progress.get("/jobs/<uuid:id>")
def one_job(id: UUID) -> EventStreamResponse:
    """Let who knows the random id watch; the last event says it all."""
    return eventstream.subscribe(f"job:{id}", history=1)


@progress.post("/jobs/<uuid:id>/cancel")
def cancel(id: UUID) -> dict[str, str]:
    """Send an order, whichever process the job is in."""
    channel = f"orders:{owner()}:{id}"
    return {"id": eventstream.publish("cancel", channel=channel)}


def owner() -> str:
    """Return what tells this browser's jobs from those of others."""
    return str(session.setdefault("jobs", str(uuid4())))


def for_page() -> dict[str, Any]:
    """Return where jobs run, and give the page a session."""
    owner()
    broker = current_app.extensions["eventstream"].broker
    return {"limits": LIMITS, "is_elsewhere": not isinstance(broker, MemoryBroker)}
