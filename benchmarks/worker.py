"""No-op tasks a second of a worker process: NATS and kombu's own Redis transport, in each pool; and other queues.

All of them acknowledge late where they can, and ignore results. A queue is filled before its worker starts; the time
runs from the first task to the last, which mark themselves in Redis.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from benchmarks.bench import Bench, Row, rounds
from workers.servers import NatsServer, die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
#: Pools, with the ratio that is aimed at.
POOLS = {"solo": 5, "threads": 3, "prefork": 3}
#: Messages that a Celery worker may hold.
PREFETCH = 64


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count, times = (200, 1) if quick else (8000, 3)
    rows = []
    os.environ.update({"BENCH_URL": bench.broker, "BENCH_MARKS": bench.broker})
    with NatsServer() as nats:
        for pool, target in list(POOLS.items())[: 1 if quick else None]:
            ours, theirs = rounds(
                times,
                lambda pool=pool: celery(bench, count, "nats", nats.url, pool),
                lambda pool=pool: celery(bench, count, "redis", bench.broker, pool),
            )
            name = f"worker, {pool}: no-op tasks a second over NATS; kombu's Redis"
            ratio = ours / theirs
            rows.append(Row(name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ratio:.1f}x", f"≥ {target}x", ratio >= target))
        # Two workers don't start in the same moment: with more tasks that counts for less.
        many = count * 2
        others = {"dramatiq": dramatiq, "taskiq": taskiq}
        for name, other in others.items():
            if not find_spec(name):
                # The extra `bench` has it, which `make bench` installs.
                continue
            ours, theirs = rounds(
                times,
                lambda: celery(bench, many, "nats", nats.url, "solo", workers=2),
                lambda other=other: other(bench, many),
            )
            label = f"two solo workers over NATS; {name}'s two processes over Redis"
            rows.append(Row(label, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}x", "> 1x", ours > theirs))
    bench.empty()
    return rows


def celery(bench: Bench, count: int, kind: str, url: str, pool: str, workers: int = 1) -> float:
    """Fill the queue and let so many Celery workers empty it; return tasks a second."""
    from benchmarks.worker_app import make

    app = make("redis" if kind == "redis" else "nats", url)
    with app.connection_for_write() as connection:
        producer = connection.Producer()
        fill(count, lambda name, value: app.send_task(f"benchmarks.{name}", (value,), producer=producer))
    concurrency = {"solo": 1, "threads": 4, "prefork": 2}[pool]
    command = ["celery", "-A", "benchmarks.worker_app", "worker", "-P", pool, "-c", str(concurrency), "-l", "WARNING"]
    command += ["--prefetch-multiplier", str(PREFETCH // concurrency), "--without-gossip", "--without-mingle"]
    return emptied(bench, count, [command] * workers, {"BENCH_KIND": kind, "BENCH_URL": url})


def dramatiq(bench: Bench, count: int) -> float:
    """Fill dramatiq's queue and let its two processes empty it."""
    from benchmarks import dramatiq_app

    fill(count, lambda name, value: getattr(dramatiq_app, name).send(value))
    return emptied(bench, count, [["dramatiq", "benchmarks.dramatiq_app", "--processes", "2"]], {})


def taskiq(bench: Bench, count: int) -> float:
    """Fill taskiq's queue and let its two processes empty it."""
    from benchmarks import taskiq_app

    async def send() -> None:
        await taskiq_app.broker.startup()
        calls = []
        fill(count, lambda name, value: calls.append(getattr(taskiq_app, name).kiq(value)))
        for call in calls:
            await call
        await taskiq_app.broker.shutdown()

    asyncio.run(send())
    command = ["taskiq", "worker", "benchmarks.taskiq_app:broker", "--workers", "2", "--log-level", "ERROR"]
    return emptied(bench, count, [command], {})


def fill(count: int, send: Callable[[str, object], object]) -> None:
    """Send the tasks between two marks."""
    send("mark", "first")
    for number in range(count):
        send("nothing", number)
    send("mark", "last")


def emptied(bench: Bench, count: int, commands: list[list[str]], environment: dict[str, str]) -> float:
    """Run the workers until the last task has run; return tasks a second, from the first to the last."""
    deadline = time.monotonic() + 120
    with ExitStack() as stack, redis.Redis.from_url(bench.broker) as client:
        client.delete("first", "last")
        for command in commands:
            stack.enter_context(process(command, environment))
        while not client.get("last"):
            if time.monotonic() > deadline:
                message = f"{commands[0][0]} didn't run its tasks in two minutes."
                raise TimeoutError(message)
            time.sleep(0.02)
        return count / (float(client.get("last")) - float(client.get("first")))


@contextmanager
def process(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    try:
        yield
    finally:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(15)
        # taskiq's children outlive it for a moment, and would take the next round's first tasks.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
