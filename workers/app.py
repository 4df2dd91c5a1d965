"""The shop's Celery application. Its addresses come from the environment, as in docker-compose.yml.

Without any it is a file in the current folder and a NATS server of this machine: `celery -A workers.app outbox dev`.
"""

from __future__ import annotations

import os
from typing import Any

from catga_tasks import Catga
from workers import deliveries

DATABASE_URL = os.environ.get("SHOP_DATABASE_URL", "sqlite:///shop.db")
BROKER_URL = os.environ.get("SHOP_BROKER_URL", "nats://127.0.0.1:4222")


def transport_options(broker: str) -> dict[str, Any]:
    """Return the options that say when a dead worker's messages go to another one."""
    if broker.startswith("nats"):
        # A living worker says a word for each message it holds, so this may be shorter than a task.
        return {"ack_wait": float(os.environ.get("SHOP_ACK_WAIT", "30"))}
    return {
        # Nobody says a word here: longer than any task of the shop runs.
        "visibility_timeout": int(os.environ.get("SHOP_VISIBILITY_TIMEOUT", "60")),
        # kombu looks for messages of dead workers every 10 s and skips nine looks of ten: 100 s.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        # A worker that is killed while it looks keeps the others from looking for this long, else for 5 minutes.
        "unacked_mutex_expire": 5,
    }


app = Catga("shop", broker=BROKER_URL, outbox=DATABASE_URL, include=["workers.tasks"])
app.conf.update(
    # The tables hold the results. The parts of chords are counted in the same database.
    task_ignore_result=True,
    result_backend="outbox://",
    broker_connection_retry_on_startup=True,
    broker_transport_options=transport_options(BROKER_URL),
    # On SQLite the relay that stands by takes over this long after the one that works was killed.
    outbox_lease_timeout=float(os.environ.get("SHOP_LEASE_TIMEOUT", "30")),
    outbox_publish_timeout=float(os.environ.get("SHOP_PUBLISH_TIMEOUT", "10")),
    # After this long without a word from its worker, a label is printed by another one.
    inbox_lease=float(os.environ.get("SHOP_INBOX_LEASE", "30")),
)
if path := os.environ.get("SHOP_DELIVERIES"):
    deliveries.note(path)
