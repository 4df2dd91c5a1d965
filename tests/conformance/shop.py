"""The application of the workers in these tests; its broker comes from the environment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], backend="rpc://", outbox="sqlite://")
app.conf.update(
    broker_transport_options=json.loads(os.environ["OPTIONS"]),
    task_acks_late=True,
    task_delivery="at_most_once",
    worker_prefetch_multiplier=int(os.environ.get("PREFETCH", "4")),
    worker_hijack_root_logger=False,
)


def note(path, line):
    """Append a line in one write, whoever else does."""
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


@app.task(name="run")
def run(path, line, seconds=0):
    note(path, line)
    time.sleep(seconds)


@app.task(name="add")
def add(first, second):
    return first + second


@app.task(name="spread")
def spread(path, number):
    """Publish another task from the worker's child."""
    note(path, f"{number} {os.getpid()}")
    app.send_task("run", (f"{path}.spread", number), queue=os.environ["QUEUE"])
