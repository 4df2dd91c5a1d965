"""The shop's Celery application. Its addresses come from the environment, as in docker-compose.yml."""

from __future__ import annotations

import os

from catga_tasks import Catga

DATABASE_URL = os.environ.get("SHOP_DATABASE_URL", "postgresql+psycopg://shop:shop@127.0.0.1/shop")
BROKER_URL = os.environ.get("SHOP_BROKER_URL", "redis://127.0.0.1:6379/0")
#: Seconds after which the work of a process that doesn't answer goes to another one. With Redis, longer than any task
#: of the shop runs.
DEAD_AFTER = int(os.environ.get("SHOP_DEAD_AFTER", "60"))
REDIS = {
    "visibility_timeout": DEAD_AFTER,
    # kombu looks for messages of dead workers every 10 s and skips nine looks of ten: 100 s.
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    # A worker that is killed while it looks keeps the others from looking for this long, else for 5 minutes.
    "unacked_mutex_expire": 5,
}
NATS = {"ack_wait": DEAD_AFTER}

app = Catga("shop", broker=BROKER_URL, outbox=DATABASE_URL, include=["workers.tasks"])
app.conf.update(
    # The tables hold the results.
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options=REDIS if BROKER_URL.startswith("redis") else NATS,
    outbox_publish_timeout=DEAD_AFTER / 2,
    outbox_lease_timeout=DEAD_AFTER,
)
