"""The taskiq tasks of the worker benchmark, over a Redis stream: its broker that acknowledges."""

from __future__ import annotations

import os

from taskiq_redis import RedisStreamBroker

from benchmarks import marks

broker = RedisStreamBroker(os.environ["BENCH_URL"])


@broker.task
async def nothing(number: int) -> None:
    """Do nothing."""


@broker.task
async def mark(name: str) -> None:
    """Note the time."""
    marks.mark(name)
