"""How does the outbox stand, for gauges that are read again and again?"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import admin
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

    def read(self) -> Snapshot | None:
        """Return the outbox as it stands, or stood moments ago; None while the database can't be asked."""
        with self._lock:
            started = time.monotonic()
            if started < self._fresh_until:
                return self._found
            try:
                with self._engine.connect() as connection:
                    self._found = snapshot(connection)
            except SQLAlchemyError as error:
                logger.debug("No gauges of the outbox: %s", type(error).__name__)
                self._found = None
            ended = time.monotonic()
            self._fresh_until = ended + max(FRESH_SECONDS, (ended - started) / SHARE)
            return self._found


def snapshot(connection: Connection) -> Snapshot:
    """Count."""
    status = admin.status(connection)
    states = ("pending", "scheduled", "retrying", "dead")
    queues: dict[str, dict[str, Any]] = {}
    for entry in status["tasks"]:
        counts = queues.setdefault(entry["queue"], dict.fromkeys(states, 0))
        for state in states:
            counts[state] += entry[state]
    suppressed = text("SELECT task, suppressed FROM catga_inbox_counts ORDER BY task")
    return Snapshot(
        queues=[QueueCounts(queue, **counts) for queue, counts in sorted(queues.items())],
        oldest_age=status["oldest_age_seconds"] or 0.0,
        relays=len(status["relays"]),
        published=status["published"],
        duplicates={row.task: int(row.suppressed) for row in connection.execute(suppressed)},
    )
