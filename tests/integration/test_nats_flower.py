"""Flower over NATS: its Broker page has the queues, and a server that is gone costs no more than a moment."""

from __future__ import annotations

import os
import re
import time
import urllib.request

import pytest

from catga_tasks import Catga
from tests.waiting import wait_until
from workers.servers import NatsServer, free_port

APP = """
import os, time
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox="sqlite:///shop.db")
app.conf.worker_prefetch_multiplier = 1

@app.task(name="nap")
def nap(seconds):
    time.sleep(seconds)
"""


def page(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return answer.read().decode()


def cells(html, queue):
    """The numbers of a queue's row: messages, unacknowledged, ready."""
    row = re.search(rf'<tr id="{queue}">(.*?)</tr>', html, re.DOTALL)
    return re.findall(r"<td[^>]*>\s*(.*?)\s*</td>", row[1], re.DOTALL)[1:4] if row else None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", [("outbox", "flower"), ("flower",)], ids=["outbox-flower", "flowerconfig"])
def test_37_the_broker_page(processes, tmp_path, command):
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "flowerconfig.py").write_text("from catga_tasks import flower; flower.install()\n")
    with NatsServer() as server:
        env = {"BROKER": server.url}
        worker = processes.celery(
            "shop", "worker", "-P", "threads", "-c", "1", "-l", "INFO", "-E", "-n", "one@test", env=env, cwd=tmp_path
        )
        wait_until(lambda: "one@test ready." in worker.log(), deadline=30)
        app = Catga("shop", broker=server.url, outbox="sqlite://", set_as_current=False)
        app.conf.task_delivery = "at_most_once"
        for _ in range(4):
            app.send_task("nap", (60,))
        port = free_port()
        flower = processes.celery(
            "shop", *command, f"--port={port}", "--address=127.0.0.1", env={**os.environ, **env}, cwd=tmp_path
        )
        wait_until(lambda: "Visit me" in flower.log() or not flower.alive(), deadline=30)
        assert flower.alive(), flower.log()
        wait_until(lambda: cells(page(port, "/broker"), "celery") is not None, deadline=20)
        # One runs, one was prefetched at most; the others are ready.
        total, unacknowledged, ready = map(int, cells(page(port, "/broker"), "celery"))
        assert total == unacknowledged + ready == 4
        assert 1 <= unacknowledged <= 2
        wait_until(lambda: "one@test" in page(port, "/workers"), deadline=20)
        server.kill()
        started = time.monotonic()
        assert "No queue data is available" in page(port, "/broker")
        assert time.monotonic() - started < 15
        assert "Traceback" not in worker.log()
