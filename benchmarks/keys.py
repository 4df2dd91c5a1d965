"""What does order cost? Messages a second of one ordering key and of many, and a call with a key, over Redis."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import redis
from sqlalchemy import text
from sqlalchemy.orm import Session

from benchmarks.bench import Bench, Row, rounds
from benchmarks.latency import process, wait

if TYPE_CHECKING:
    from sqlalchemy import Connection


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count, times = (20, 1) if quick else (500, 3)
    with ExitStack() as stack:
        stack.enter_context(process(bench, "ours", "worker", "-P", "solo", "--without-gossip", "--without-mingle"))
        stack.enter_context(process(bench, "ours", "outbox", "relay", "--loglevel", "WARNING"))
        through(bench, 5, None)
        one, plain = rounds(times, lambda: through(bench, count, 1), lambda: through(bench, count, None))
        many, same = rounds(times, lambda: through(bench, count, 50), lambda: through(bench, count, None))
    keyed, unkeyed = rounds(times, lambda: calls(bench, count, key="a"), lambda: calls(bench, count))
    bench.empty()
    return [
        Row("messages a second of one key; without keys", f"{one:,.0f}", f"{plain:,.0f}", f"{one / plain:.2f}x"),
        Row("messages a second of 50 keys; without keys", f"{many:,.0f}", f"{same:,.0f}", f"{many / same:.2f}x"),
        Row("joined delay() with a key; without", f"{keyed:,.0f} µs", f"{unkeyed:,.0f} µs", f"{keyed / unkeyed:.2f}x"),
    ]  # fmt: skip


def through(bench: Bench, count: int, keys: int | None) -> float:
    """Enqueue so many messages at once, and return how many a second began."""
    with redis.Redis.from_url(bench.broker) as client:
        client.delete("begun")
        with Session(bench.engine) as session, session.begin(), bench.ours.outbox.join(session):
            for number in range(count):
                options = {} if keys is None else {"key": f"k{number % keys}"}
                bench.ours.send_task("benchmarks.started", (number,), **options)
        started = time.perf_counter()
        wait(client, count)
        return count / (time.perf_counter() - started)


def calls(bench: Bench, count: int, **options: str) -> float:
    """Return the µs of a call in a transaction of its own, insert and commit included."""
    started = time.perf_counter()
    for number in range(count):
        with Session(bench.engine) as session, session.begin(), bench.ours.outbox.join(session):
            bench.ours.send_task("benchmarks.started", (number,), countdown=3600, **options)
    taken = (time.perf_counter() - started) / count
    with bench.engine.begin() as connection:
        forget(connection)
    return 1e6 * taken


def forget(connection: Connection) -> None:
    connection.execute(text("TRUNCATE catga_outbox, catga_turns"))
