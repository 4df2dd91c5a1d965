"""The dramatiq actors of the worker benchmark."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks import marks

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_URL"]))


@dramatiq.actor
def nothing(number: int) -> None:
    """Do nothing."""


@dramatiq.actor
def mark(name: str) -> None:
    """Note the time."""
    marks.mark(name)
