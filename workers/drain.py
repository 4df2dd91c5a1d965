"""Is any message still under way: in the outbox, in the broker, or in a worker's hands?"""

from __future__ import annotations

import asyncio
import time

#: Seconds without a message anywhere, after which none is under way: one may be between the broker and a worker.
QUIET = 1.0


class Drain:
    """`over` once nothing was under way for a while: only then nothing more is sent, or a task is lost."""

    def __init__(self) -> None:
        self._quiet_since: float | None = None

    def over(self) -> bool:
        """Look once more; return whether nothing has been under way for `QUIET` seconds."""
        if not drained():
            self._quiet_since = None
            return False
        if self._quiet_since is None:
            self._quiet_since = time.monotonic()
        return time.monotonic() - self._quiet_since > QUIET


def drained() -> bool:
    """Return whether no message is left: not in the outbox, not in the broker, not in a worker's hands."""
    from workers.app import BROKER_URL, app

    if waiting():
        return False
    held = held_by_nats if BROKER_URL.startswith("nats") else held_by_redis
    return not held(BROKER_URL, app.conf.task_default_queue)


def waiting() -> int:
    """Return how many messages the outbox has."""
    from sqlalchemy import text

    from workers.models import Session

    with Session() as session:
        return int(session.scalar(text("SELECT count(*) FROM catga_outbox")) or 0)


def held_by_nats(url: str, queue: str) -> int:
    """Return how many messages NATS keeps: a stream has those that a worker holds, too."""
    import nats

    from catga_tasks.brokers.nats_settings import NatsSettings

    async def ask() -> int:
        client = await nats.connect(url)
        try:
            return int((await client.jetstream().stream_info(NatsSettings().stream(queue))).state.messages)
        finally:
            await client.close()

    return asyncio.run(ask())


def held_by_redis(url: str, queue: str) -> int:
    """Return how many messages Redis keeps, those that a worker holds among them."""
    import redis

    with redis.Redis.from_url(url) as client:
        return int(client.llen(queue)) + int(client.hlen("unacked"))
