"""How long from the commit to the task's start, at fifty tasks a second? A worker and a relay run as processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from sqlalchemy.orm import Session

from benchmarks.bench import Bench, Row
from workers.servers import die_with_parent

RATE = 50  # tasks a second


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count = 20 if quick else 500
    results = {}
    for kind in ("plain", "ours"):
        with ExitStack() as stack:
            stack.enter_context(process(bench, kind, "worker", "-P", "solo", "--without-gossip", "--without-mingle"))
            if kind == "ours":
                stack.enter_context(process(bench, kind, "outbox", "relay", "--loglevel", "WARNING"))
            results[kind] = measure(bench, kind, count)
        bench.empty()
    (p50, p99), (plain50, plain99) = results["ours"], results["plain"]
    # A task may begin before its publish returns.
    plain50, plain99 = max(0.01, plain50), max(0.01, plain99)
    return [
        Row(
            "commit to task start, p50",
            f"{p50:.2f} ms",
            f"{plain50:.2f} ms",
            f"{p50 / plain50:.1f}x",
            "< 5 ms",
            p50 < 5,
        ),
        Row(
            "commit to task start, p99",
            f"{p99:.2f} ms",
            f"{plain99:.2f} ms",
            f"{p99 / plain99:.1f}x",
            "< 20 ms",
            p99 < 20,
        ),
    ]


def measure(bench: Bench, kind: str, count: int) -> tuple[float, float]:
    """Enqueue at the rate, and read from Redis when each task began; return p50 and p99 in ms."""
    app = bench.ours if kind == "ours" else bench.plain
    client = redis.Redis.from_url(bench.broker)
    for warm in range(-5, 0):
        app.send_task("benchmarks.started", (warm,))
    wait(client, 5)
    committed = []
    begin = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, begin + number / RATE - time.perf_counter()))
        if kind == "ours":
            with Session(bench.engine) as session:
                with bench.ours.outbox.join(session):
                    app.send_task("benchmarks.started", (number,))
                session.commit()
        else:
            app.send_task("benchmarks.started", (number,))
        # From the moment when the caller goes on: the commit has returned, or plain Celery's publish.
        committed.append(time.time())
    wait(client, count + 5)
    begun = {int(number): float(moment) for number, moment in client.hgetall("begun").items()}
    client.close()
    waits = [max(0.0, 1000 * (begun[number] - committed[number])) for number in range(count)]
    cuts = statistics.quantiles(waits, n=100)
    return cuts[49], cuts[98]


def wait(client: redis.Redis, count: int) -> None:
    deadline = time.monotonic() + 60
    while client.hlen("begun") < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{client.hlen('begun')} of {count} tasks began")
        time.sleep(0.05)


@contextmanager
def process(bench: Bench, kind: str, *arguments: str):
    environment = {**os.environ, "BENCH_KIND": kind, "BENCH_BROKER": bench.broker, "BENCH_DATABASE": bench.database}
    command = [sys.executable, "-W", "ignore", "-m", "celery", "-q", "-A", "benchmarks.app", *arguments]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, env=environment, cwd=root, preexec_fn=die_with_parent, **silent) as running:
        try:
            yield
        finally:
            running.terminate()
            running.wait(30)
