"""The Grafana dashboard asks for what is there: by OpenTelemetry's Prometheus exporter, and at Flower's `/metrics`."""

from __future__ import annotations

import json
import re
import threading

import pytest
from celery.contrib.testing.worker import start_worker
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, text

from catga_tasks import Catga, liveness, migrate
from catga_tasks.tallies import Tally
from catga_tasks.telemetry import sending
from tests.flowers import APP, oldest_flower, start_flower
from tests.integration.telemetry import sdk
from tests.processes import ROOT
from tests.waiting import wait_until

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


@pytest.mark.timeout(180)
def test_flower_tells_machines(processes, tmp_path, redis_url, own_postgres):
    """`/outbox/health` is 200 or 503, `/metrics` has the outbox's beside Flower's; both know a database that is out."""
    server = own_postgres()
    engine = create_engine(server.url)
    migrate.upgrade(engine)
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.send_task("charge", (1,))
    flower = start_flower(processes, tmp_path, redis_url, server.url)

    answer = flower.get("/outbox/health")
    assert answer.status == 503
    assert [check["name"] for check in answer.json["checks"] if not check["ok"]] == ["relay"]
    assert 'catga_outbox_pending{messaging_destination_name="celery"} 1.0' in flower.get("/metrics").text
    relay = app.relay()
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        wait_until(lambda: flower.get("/outbox/health").status == 200, what="health")
        nothing = 'catga_outbox_pending{messaging_destination_name="celery"} 0.0'
        wait_until(lambda: nothing in flower.get("/metrics").text, what="an empty queue")
        exported = names(flower.get("/metrics").text)
    finally:
        relay.stop()
        thread.join(30)
    assert {f"catga_outbox_{name}" for name in OUTBOX} <= exported
    assert "python_info" in exported, "Flower's own"
    assert flower.get("/outbox/health?max_age=soon").status == 400

    engine.dispose()
    server.stop()
    answer = flower.get("/outbox/health?max_age=1")
    assert answer.status == 503
    assert "database" in [check["name"] for check in answer.json["checks"] if not check["ok"]]
    assert "127.0.0.1" not in answer.text
    wait_until(lambda: "catga_outbox_up 0.0" in flower.get("/metrics").text, what="metrics without a database")
    healthy = flower.get("/healthcheck")
    assert (healthy.status, healthy.text) == (200, "OK")


def measured(exposition, *prefixes):
    """The samples of these metrics, without the labels that only OpenTelemetry's exporter adds."""
    found = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name.startswith(prefixes) and not sample.name.endswith("_created"):
                labels = {name: value for name, value in sample.labels.items() if value and "otel_" not in name}
                if "le" in labels:
                    labels["le"] = str(float(labels["le"]))
                found[sample.name, *sorted(labels.items())] = sample.value
    return found


def total(found, name, **labels):
    """The sum of a metric's samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for (each, *those), value in found.items() if each == name and wanted <= set(those))


def receipt(order):
    """A task that asks the inbox, as its caller knows it."""


RELAYS = ("messaging_client_sent_", "messaging_client_operation_", "catga_outbox_attempts_")
RUNS = ("messaging_client_consumed_", "messaging_process_", "catga_message_latency_")


def test_flower_counts_what_opentelemetry_counts(processes, tmp_path, redis_url, postgres_url):
    """Flower, 2.1 too, has what relays counted until they ended, number by number, and what a real worker runs.

    Latency needs a moment: relays tell it where the application sends events, and the caller for tasks with an inbox.
    """
    engine = create_engine(postgres_url)
    migrate.upgrade(engine)
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.conf.worker_send_task_events = True
    folders = [tmp_path / "new", tmp_path / "old"]
    for folder in folders:
        folder.mkdir()
        (folder / "shop.py").write_text(APP)
    env = {"BROKER": redis_url, "OUTBOX": postgres_url}
    processes.celery("shop", "worker", "-c", "1", "-n", "w@test", env=env, cwd=folders[0])
    flowers = [
        start_flower(processes, folder, redis_url, postgres_url, **env)
        for folder, env in zip(folders, ({}, oldest_flower(folders[1])), strict=True)
    ]
    for flower in flowers:
        wait_until(
            lambda flower=flower: 'online{worker="w@test"} 1.0' in flower.get("/metrics").text, what="the worker"
        )

    def execute(statement):
        with engine.begin() as connection:
            connection.execute(text(statement))

    execute("INSERT INTO catga_inbox_counts (task, suppressed, too_old) VALUES ('t', 1, 0)")
    with sdk(PrometheusMetricReader()):
        app.send_task("shop.charge", (0,), queue="slow")
        execute("UPDATE catga_outbox SET properties = '[]'")
        for args in ((1,), ()):
            app.send_task("shop.charge", args)
            app.relay().run_once()
        told = measured(generate_latest(REGISTRY).decode(), *RELAYS)
    assert total(told, "messaging_client_sent_messages_total", messaging_destination_name="celery") == 2
    assert total(told, "catga_outbox_attempts_total", messaging_destination_name="slow") == 1
    for flower in flowers:
        wait_until(
            lambda flower=flower: measured(flower.get("/metrics").text, *RELAYS) == pytest.approx(told),
            what=f"{told} in {flower.get('/metrics').text}",
        )
    execute("DELETE FROM catga_outbox")
    app.send_task("shop.charge", (2,))
    app.relay().run_once()
    app.conf.worker_send_task_events = False
    app.send_task("shop.charge", (3,))
    app.task(name="shop.receipt", shared=False, delivery="effectively_once")(receipt).delay(3)
    app.relay().run_once()
    run = {"messaging_system": "redis", "messaging_operation_name": "process", "messaging_destination_name": "celery"}
    charge = {"catga_task_name": "shop.charge"}
    for flower in flowers:

        def runs(flower=flower):
            found = measured(flower.get("/metrics").text, *RUNS)
            return total(found, "messaging_client_consumed_messages_total") == 5 and found

        found = wait_until(runs, what="the runs")
        assert total(found, "messaging_client_consumed_messages_total", **run, **charge) == 4
        assert total(found, "messaging_process_duration_seconds_count", **run, **charge) == 4
        assert total(found, "messaging_process_duration_seconds_count", error_type="TypeError") == 1
        assert total(found, "catga_message_latency_seconds_bucket", le="inf", **charge) == 3
        assert total(found, "catga_message_latency_seconds_count", catga_task_name="shop.receipt") == 1
        assert 0 < total(found, "catga_message_latency_seconds_sum") < 180
        exported = names(flower.get("/metrics").text)
        assert queried() <= exported, queried() - exported
    engine.dispose()


def test_two_relays_find_a_silent_one(postgres_url):
    """What it has published and counted is added up once, though both look at the same time."""
    engine = create_engine(postgres_url)
    migrate.upgrade(engine)
    counted = Tally()
    counted.add(sending("redis", {"celery": 5}, 0.1))
    about = {"hostname": "h", "pid": 1, "broker": "", "queues": (), "published": 5, "tally": counted}

    def retire():
        with engine.begin() as connection:
            liveness.retire(connection)

    second = threading.Thread(target=retire)
    with engine.begin() as connection:
        liveness.heartbeat(connection, "silent", **about)
        connection.execute(text("UPDATE catga_relays SET heartbeat_at = heartbeat_at - interval '2 days'"))
    with engine.begin() as connection:
        liveness.retire(connection)
        second.start()
        with engine.connect() as watching:
            waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            wait_until(lambda: watching.execute(waits).scalar(), what="the second relay waits for the first")
    second.join(30)
    with engine.connect() as connection:
        assert liveness.published(connection) == 5
        assert liveness.tally(connection).dump() == counted.dump()
    engine.dispose()
