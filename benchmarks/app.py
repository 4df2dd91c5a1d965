"""The application of the worker and the relay that the latency benchmark starts."""

from __future__ import annotations

import os
import time

import redis
from celery import Celery

from catga_tasks import Catga

BROKER = os.environ.get("BENCH_BROKER", "redis://127.0.0.1:6379/0")

if os.environ.get("BENCH_KIND") == "plain":
    app = Celery("bench", broker=BROKER)
else:
    app = Catga("bench", broker=BROKER, outbox=os.environ.get("BENCH_DATABASE", "sqlite://"))
client = redis.Redis.from_url(BROKER)


@app.task(name="benchmarks.started", ignore_result=True)
def started(number: int) -> None:
    """Note when this task began."""
    client.hset("begun", str(number), time.time())
