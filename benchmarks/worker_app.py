"""The applications of the worker benchmarks: plain Celery over NATS by our transport, and over Redis by kombu's own.

And, over NATS: plain Celery whose tasks open a transaction and write a row, and ours with its deliveries.
"""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.marks import mark


def make(kind: str, url: str) -> Celery:
    """Return one of them; nothing of ours is imported for Redis."""
    if kind != "redis":
        import catga_tasks  # registers the transport
    if kind in ("at_least_once", "effectively_once"):
        app = catga_tasks.Catga("bench", broker=url, outbox=os.environ["BENCH_DATABASE"], set_as_current=False)
        app.conf.task_delivery = kind
    else:
        transport = "kombu.transport.redis:Transport" if kind == "redis" else None
        app = Celery("bench", broker=url, broker_transport=transport, set_as_current=False)
    app.conf.update(task_acks_late=True, task_ignore_result=True)
    app.task(name="benchmarks.nothing", shared=False)(writer() if kind == "row" else nothing)
    app.task(name="benchmarks.mark", shared=False)(mark)
    return app


def nothing(number: int) -> None:
    """Do nothing."""


def writer():
    """Return a task that opens one transaction and writes one row, as an application without an inbox does."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.orm import sessionmaker

    sessions = sessionmaker(create_engine(os.environ["BENCH_DATABASE"], pool_pre_ping=True))
    insert = text("INSERT INTO effects (number) VALUES (:number)")

    def write(number: int) -> None:
        with sessions.begin() as session:
            session.execute(insert, {"number": number})

    return write


if "BENCH_KIND" in os.environ:
    app = make(os.environ["BENCH_KIND"], os.environ["BENCH_URL"])
