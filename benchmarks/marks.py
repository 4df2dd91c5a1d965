"""Notes in Redis when a benchmark's first and last task ran; imported by the workers that it starts."""

from __future__ import annotations

import os
import time

import redis


def mark(name: str) -> None:
    """Note the time."""
    with redis.Redis.from_url(os.environ["BENCH_MARKS"]) as client:
        client.set(name, time.time())
