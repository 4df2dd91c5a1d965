"""The Grafana dashboard asks for what is there: by OpenTelemetry's Prometheus exporter, and at Flower's `/metrics`."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request

import pytest
from celery.contrib.testing.worker import start_worker
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, text

from catga_tasks import Catga, migrate
from tests.integration.telemetry import sdk
from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import free_port

DASHBOARD = json.loads((ROOT / "docs/grafana/catga-tasks.json").read_text())
#: A metric's name in PromQL: a word before a selector, a range or a bracket, with an underscore in it.
NAME = re.compile(r"\b((?:catga|messaging)_\w+)(?=[{\[)]|$)")
OUTBOX = ("pending", "scheduled", "retrying", "dead", "oldest_age_seconds", "relays", "published_total")


def queried():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    grouped = {"messaging_destination_name", "messaging_system", "catga_task_name"}
    found = {name for expression in expressions for name in NAME.findall(expression)} - grouped
    assert all(any(name in expression for name in found) for expression in expressions)
    return found


def names(exposition):
    """The names of samples in Prometheus' text format."""
    return {sample.name for family in text_string_to_metric_families(exposition) for sample in family.samples}


def test_opentelemetry_exports_what_the_dashboard_asks_for(redis_url, engine):
    """After one message that ran, one that failed, one that no broker takes and a duplicate, every name is there."""
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)

    @app.task(name="charge", shared=False)
    def charge(order):
        raise ValueError(order)

    with sdk(PrometheusMetricReader()) as seen:
        charge.delay(1)
        with engine.begin() as connection:
            connection.execute(
                text("INSERT INTO catga_inbox_counts (task, suppressed, too_old) VALUES ('charge', 1, 0)")
            )
        app.relay().run_once()
        charge.apply_async((2,), queue="slow")
        with engine.begin() as connection:
            connection.execute(text("UPDATE catga_outbox SET properties = '[]'"))
        relay = app.relay()
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30):
                wait_until(lambda: seen.spans("process"))
            wait_until(lambda: "catga_outbox_attempts_total" in names(generate_latest(REGISTRY).decode()))
            exported = names(generate_latest(REGISTRY).decode())
        finally:
            relay.stop()
            thread.join(30)
    assert queried() <= exported, queried() - exported


class Flower:
    """A Flower of the application, by its own command."""

    def __init__(self, processes, folder, broker, outbox):
        (folder / "shop.py").write_text(
            f"from catga_tasks import Catga\napp = Catga('shop', broker={broker!r}, outbox={outbox!r})\n"
        )
        self.port = free_port()
        command = ("shop", "outbox", "flower", f"--port={self.port}", "--address=127.0.0.1")
        self.process = processes.celery(*command, cwd=folder)
        wait_until(lambda: "Visit me" in self.process.log() or not self.process.alive(), deadline=60)
        assert self.process.alive(), self.process.log()

    def get(self, path):
        """The status and the text of an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.mark.timeout(180)
def test_flower_tells_machines(processes, tmp_path, redis_url, own_postgres):
    """`/outbox/health` is 200 or 503, `/metrics` has the outbox's beside Flower's; both know a database that is out."""
    server = own_postgres()
    engine = create_engine(server.url)
    migrate.upgrade(engine)
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.send_task("charge", (1,))
    flower = Flower(processes, tmp_path, redis_url, server.url)

    status, answer = flower.get("/outbox/health")
    assert status == 503
    assert [check["name"] for check in json.loads(answer)["checks"] if not check["ok"]] == ["relay"]
    assert 'catga_outbox_pending{messaging_destination_name="celery"} 1.0' in flower.get("/metrics")[1]
    relay = app.relay()
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        wait_until(lambda: flower.get("/outbox/health")[0] == 200, what="health")
        nothing = 'catga_outbox_pending{messaging_destination_name="celery"} 0.0'
        wait_until(lambda: nothing in flower.get("/metrics")[1], what="an empty queue")
        exported = names(flower.get("/metrics")[1])
    finally:
        relay.stop()
        thread.join(30)
    assert {f"catga_outbox_{name}" for name in OUTBOX} <= exported
    assert {name for name in queried() if name.startswith("catga_outbox_")} <= exported | {
        "catga_outbox_attempts_total"
    }
    assert "python_info" in exported, "Flower's own"
    assert flower.get("/outbox/health?max_age=soon")[0] == 400

    engine.dispose()
    server.stop()
    status, answer = flower.get("/outbox/health?max_age=1")
    assert status == 503
    assert "database" in [check["name"] for check in json.loads(answer)["checks"] if not check["ok"]]
    assert "127.0.0.1" not in answer
    wait_until(lambda: "catga_outbox_up 0.0" in flower.get("/metrics")[1], what="metrics without a database")
    assert flower.get("/healthcheck") == (200, "OK")
