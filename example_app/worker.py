"""The process of one job: ``python -m example_app.worker``, with the job as JSON on its stdin."""

from .job import run_alone

run_alone()
