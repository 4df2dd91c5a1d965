"""The Celery application of the worker benchmark: over NATS by our transport, over Redis by kombu's own."""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.marks import mark


def make(kind: str, url: str) -> Celery:
    """Return it for one of the two brokers; nothing of ours is imported for Redis."""
    if kind == "nats":
        import catga_tasks  # noqa: F401 - it registers the transport
    transport = None if kind == "nats" else "kombu.transport.redis:Transport"
    app = Celery("bench", broker=url, broker_transport=transport, set_as_current=False)
    app.conf.update(task_acks_late=True, task_ignore_result=True)
    app.task(name="benchmarks.nothing", shared=False)(nothing)
    app.task(name="benchmarks.mark", shared=False)(mark)
    return app


def nothing(number: int) -> None:
    """Do nothing."""


if "BENCH_KIND" in os.environ:
    app = make(os.environ["BENCH_KIND"], os.environ["BENCH_URL"])
