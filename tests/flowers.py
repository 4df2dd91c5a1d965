"""Flower, run for tests: a real process, and requests to it as a browser or a program makes them."""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import free_port

if TYPE_CHECKING:
    from tests.processes import Process, Processes

APP = """
import os
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(outbox_max_attempts=2, outbox_retry_backoff=0.01, worker_send_task_events=True,
                outbox_mask_arguments=bool(os.environ.get("MASK")))

@app.task(name="shop.charge")
def charge(order, **details):
    print(f"charged order {order}")

@app.task(name="shop.receipt")
def receipt(order):
    print(f"receipt of order {order}")
"""


@dataclass
class Answer:
    status: int
    text: str
    headers: Any

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Flower:
    """One Flower. Requests are from its own pages unless their headers say otherwise."""

    process: Process
    url: str
    user: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask(path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask(path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def ask(self, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if self.user:
            sent.setdefault("Authorization", f"Basic {base64.b64encode(self.user.encode()).decode()}")
        request = urllib.request.Request(self.url + path, body, sent)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, answer.read().decode(), answer.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode(), error.headers)


def start_flower(
    processes: Processes, folder: Path, broker: str, database: str, *options: str, user: str | None = None, **env: str
) -> Flower:
    """Start Flower on the application in the folder, and wait until it answers."""
    (folder / "shop.py").write_text(APP)
    port = free_port()
    auth = [f"--basic-auth={user}"] if user else []
    command = ["outbox", "flower", f"--port={port}", "--address=127.0.0.1", *auth, *options]
    process = processes.celery("shop", *command, env={"BROKER": broker, "OUTBOX": database, **env}, cwd=folder)
    wait_until(lambda: "Visit me" in process.log() or not process.alive(), deadline=60, what="Flower")
    assert process.alive(), process.log()
    return Flower(process, f"http://127.0.0.1:{port}", user)


def oldest_flower(folder: Path) -> dict[str, str]:
    """The environment in which Flower 2.1 is what is imported."""
    old = Path(sys.prefix) / "flower-2.1"
    if not old.exists():
        pytest.fail("make test installs it") if os.environ.get("CI") else pytest.skip(
            "Flower 2.1 is missing: make test"
        )
    return {"PYTHONPATH": os.pathsep.join(map(str, (old, folder, ROOT)))}
