"""What does the inbox cost a worker? No-op tasks a second over NATS, in each pool.

Effectively-once tasks against plain Celery's that open one transaction and write one row in the same database; and
at-least-once tasks against plain Celery's that do nothing.
"""

from __future__ import annotations

import os

from sqlalchemy import text

from benchmarks.bench import Bench, Row, rounds
from benchmarks.worker import celery
from workers.servers import NatsServer

#: Ours, what it is compared with, and the ratio that is aimed at.
PAIRS = (
    ("effectively_once", "row", "plain tasks that write a row", 0.8),
    ("at_least_once", "nats", "plain Celery", 0.97),
)


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count, times = (200, 1) if quick else (3000, 3)
    rows = []
    os.environ.update({"BENCH_MARKS": bench.broker, "BENCH_DATABASE": bench.database})
    with bench.engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS effects (number bigint PRIMARY KEY)"))
    with NatsServer() as nats:
        for ours, theirs, what, target in PAIRS:
            for pool in ("solo",) if quick else ("solo", "prefork"):
                one, two = rounds(
                    times,
                    lambda kind=ours, pool=pool: emptied(bench, count, kind, nats.url, pool),
                    lambda kind=theirs, pool=pool: emptied(bench, count, kind, nats.url, pool),
                )
                name = f"worker, {pool}: {ours} tasks a second; {what}"
                met = one / two >= target
                rows.append(Row(name, f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.2f}x", f"≥ {target}x", met))
    bench.empty()
    return rows


def emptied(bench: Bench, count: int, kind: str, url: str, pool: str) -> float:
    """Return tasks a second, with tables as empty as at the other's turn."""
    with bench.engine.begin() as connection:
        connection.execute(text("TRUNCATE catga_inbox, effects"))
    return celery(bench, count, kind, url, pool)
