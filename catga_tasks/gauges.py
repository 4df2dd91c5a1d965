"""How does the outbox stand, for gauges that are read again and again?"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import admin, liveness
from catga_tasks.telemetry import QueueCounts, Snapshot

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

logger = logging.getLogger("catga_tasks")

#: A snapshot is as good as new for so many seconds ...
FRESH_SECONDS = 2.0
#: ... and longer where the table is large: counting takes no more than this part of the time.
SHARE = 0.02


class Gauges:
    """Snapshots of one database's outbox. For several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._fresh_until = 0.0
        self._found: Snapshot | None = None
        self._empty: dict[str, QueueCounts] = {}

    def read(self) -> Snapshot | None:
        """Return the outbox as it stands, or stood moments ago; None while the database can't be asked."""
        with self._lock:
            started = time.monotonic()
            if started < self._fresh_until:
                return self._found
            try:
                with self._engine.connect() as connection:
                    self._found = self._with_empty_queues(snapshot(connection))
            except SQLAlchemyError as error:
                logger.debug("No gauges of the outbox: %s", type(error).__name__)
                self._found = None
            ended = time.monotonic()
            self._fresh_until = ended + max(FRESH_SECONDS, (ended - started) / SHARE)
            return self._found

    def _with_empty_queues(self, found: Snapshot) -> Snapshot:
        """Add the queues that had messages once: a number that goes missing isn't a zero."""
        queues = {**self._empty, **{each.queue: each for each in found.queues}}
        self._empty.update((name, QueueCounts(name)) for name in queues)
        return replace(found, queues=list(queues.values()))


def snapshot(connection: Connection) -> Snapshot:
    """Count."""
    status = admin.status(connection)
    states = ("pending", "scheduled", "waiting", "retrying", "dead")
    queues: dict[str, dict[str, Any]] = {}
    for entry in status["tasks"]:
        counts = queues.setdefault(entry["queue"], dict.fromkeys(states, 0))
        for state in states:
            counts[state] += entry[state]
    return Snapshot(
        queues=[QueueCounts(queue, **counts) for queue, counts in sorted(queues.items())],
        oldest_age=status["oldest_age_seconds"] or 0.0,
        relays=len(status["relays"]),
        published=status["published"],
        duplicates={entry["task"]: entry["suppressed"] for entry in status["duplicates"]},
        tally=liveness.tally(connection),
    )
