"""What every benchmark needs: servers, applications, rounds, and a row of the table."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery import Celery
from sqlalchemy import create_engine, text

from catga_tasks import Catga, migrate
from workers.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine


@dataclass(frozen=True)
class Row:
    """One comparison. `met` is None where there is no target."""

    name: str
    ours: str
    theirs: str
    ratio: str
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Bench:
    """The servers, and an application of each kind on them."""

    engine: Engine
    database: str
    broker: str
    ours: Catga
    plain: Celery

    def empty(self) -> None:
        """Forget every message."""
        import redis

        with redis.Redis.from_url(self.broker) as client:
            client.flushdb()
        with self.engine.begin() as connection:
            connection.execute(text("TRUNCATE catga_outbox, catga_dead_letters, catga_outbox_journal"))


@contextmanager
def servers() -> Iterator[Bench]:
    """Start PostgreSQL, durable, and Redis, which keeps nothing on disk: the broker at its fastest."""
    database, broker = PostgresServer(durable=True), RedisServer("--appendonly", "no")
    database.start()
    try:
        broker.start()
        engine = create_engine(database.url)
        migrate.upgrade(engine)
        ours = Catga("ours", broker=broker.url, outbox=engine, set_as_current=False)
        plain = Celery("plain", broker=broker.url, set_as_current=False)
        for app in (ours, plain):
            app.task(name="charge", shared=False, ignore_result=True)(charge)
            # The first call imports and connects.
            app.tasks["charge"].delay(1, "warm", amount=1)
        yield Bench(engine, database.url, broker.url, ours, plain)
        engine.dispose()
    finally:
        broker.stop()
        database.stop()


def charge(order, customer, *, amount):
    """Do nothing: its call is what is measured."""


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rounds(count: int, *works: Callable[[], float]) -> list[float]:
    """Run them in turns, so that a noisy moment hits all of them; return the median of each."""
    found = [[work() for work in works] for _ in range(count)]
    return [statistics.median(column) for column in zip(*found, strict=True)]
