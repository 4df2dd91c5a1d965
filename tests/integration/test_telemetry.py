"""One message is one story: its creation, its publish and its run, in one trace; and what is counted on the way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import text
from sqlalchemy.orm import Session

from catga_tasks import Catga
from tests.integration.telemetry import sdk
from tests.processes import ROOT
from tests.waiting import wait_until


@pytest.fixture
def seen():
    with sdk() as seen:
        yield seen


@pytest.fixture
def shop(redis_url, engine):
    """An application with tasks, a worker and a relay for a block."""
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.conf.worker_hijack_root_logger = False
    done = []

    @app.task(name="charge", shared=False)
    def charge(order, card="card-4111"):
        done.append(order)

    @app.task(name="fails", shared=False)
    def fails(order):
        done.append(order)
        raise ValueError("card-4111 refused")

    @app.task(name="again", shared=False, bind=True, max_retries=1)
    def again(self, order):
        done.append(order)
        if not self.request.retries:
            raise self.retry(countdown=0, exc=ValueError("out of stock"))

    @app.task(name="straight", shared=False, delivery="at_most_once")
    def straight(order):
        done.append(order)

    return SimpleNamespace(
        app=app, engine=engine, done=done, charge=charge, fails=fails, again=again, straight=straight
    )


@contextlib.contextmanager
def working(app, relay=True):
    running = app.relay() if relay else None
    thread = threading.Thread(target=running.run) if running else None
    if thread:
        thread.start()
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30):
            yield
    finally:
        if thread:
            running.stop()
            thread.join(30)


def headers(engine):
    with engine.connect() as connection:
        return [
            json.loads(each)
            for each in connection.execute(text("SELECT headers FROM catga_outbox ORDER BY id")).scalars()
        ]


def test_one_story(shop, seen):
    """Creation, publish and run are in the trace of the request that enqueued, with the waiting time on the run."""
    with working(shop.app), seen.tracer.start_as_current_span("POST /orders") as request:
        with Session(shop.engine) as session, session.begin(), shop.app.outbox.join(session):
            result = shop.charge.delay(7)
        wait_until(lambda: seen.spans("process"), what="the run's span")
    create, send, process = seen.span("create"), seen.span("send"), seen.span("process")
    assert {span.context.trace_id for span in (create, send, process)} == {request.get_span_context().trace_id}
    assert create.parent.span_id == request.get_span_context().span_id
    assert process.parent.span_id == create.context.span_id
    assert [link.context.span_id for link in send.links] == [create.context.span_id]
    assert (create.kind, send.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CLIENT, SpanKind.CONSUMER)
    assert (create.name, send.name, process.name) == ("create celery", "send celery", "process celery")
    assert dict(create.attributes) == {
        "messaging.system": "redis", "messaging.operation.name": "create", "messaging.operation.type": "create",
        "messaging.destination.name": "celery", "catga.task.name": "charge", "messaging.message.id": result.id,
    }  # fmt: skip
    assert 0 <= process.attributes["catga.wait"] < 60
    assert process.attributes["catga.outbox.message_id"] == send.links[0].attributes["catga.outbox.message_id"]
    assert process.status.status_code is StatusCode.UNSET


def test_a_batch_is_linked_to_each_of_its_rows(shop, seen):
    """Each publish has links to its rows' creations, also where a batch is larger than an SDK's limit of links."""
    for number in range(300):
        shop.charge.delay(number)
    assert shop.app.relay().run_once() == 300
    created = {span.context.span_id for span in seen.spans("create")}
    sends = seen.spans("send")
    assert len(created) == 300
    assert {link.context.span_id for span in sends for link in span.links} == created
    assert [span.attributes["messaging.batch.message_count"] for span in sends] == [128, 128, 44]


def test_calls_of_one_task_in_a_transaction_share_their_creation(shop, seen):
    """It says how many they are; another task, another transaction and another request have their own."""
    for _ in range(2):
        with Session(shop.engine) as session, session.begin(), shop.app.outbox.join(session):
            for number in range(3):
                shop.charge.delay(number)
            shop.fails.delay(1)
    shop.charge.delay_many([(1,), (2,)])
    found = [
        (span.attributes["catga.task.name"], span.attributes.get("messaging.batch.message_count"))
        for span in seen.spans("create")
    ]
    assert sorted(found, key=str) == [("charge", 2), ("charge", 3), ("charge", 3), ("fails", None), ("fails", None)]
    contexts = [each["traceparent"] for each in headers(shop.engine)]
    assert len(contexts) == 10
    assert len(set(contexts)) == 5


def test_a_rollback_leaves_no_creation(shop, seen):
    """What was never enqueued isn't in the trace."""
    with (
        contextlib.suppress(ZeroDivisionError),
        Session(shop.engine) as session,
        session.begin(),
        shop.app.outbox.join(session),
    ):
        shop.charge.delay(1)
        raise ZeroDivisionError
    with Session(shop.engine) as session, session.begin(), shop.app.outbox.join(session):
        shop.charge.delay(2)
    assert len(seen.spans("create")) == 1


def test_a_call_that_is_refused_is_in_the_trace(shop, seen):
    """A creation says how many were not sent for their unique key; each one that was has its own message's id."""

    @shop.app.task(name="close", shared=False, unique=True)
    def close(day):
        pass

    with Session(shop.engine) as session, session.begin(), shop.app.outbox.join(session):
        sent = [close.delay(1).id, shop.charge.delay(1).id]
        for _ in range(2):
            close.delay(1)
    close.delay(1)
    found = [
        tuple(span.attributes.get(name) for name in (
            "catga.task.name", "messaging.message.id", "messaging.batch.message_count", "catga.unique.refused"
        ))
        for span in seen.spans("create")
    ]  # fmt: skip
    assert sorted(found, key=str) == sorted([
        ("close", sent[0], None, None), ("charge", sent[1], None, None), ("close", None, 0, 2), ("close", None, 0, 1),
    ], key=str)  # fmt: skip


def test_without_an_sdk_nothing_changes(shop):
    """No header of ours is in the row until the application configures OpenTelemetry."""
    shop.charge.delay(1)
    [found] = headers(shop.engine)
    assert not {"traceparent", "tracestate", "catga_ready_at"} & found.keys()


def test_26_arguments_and_words_of_errors_are_in_no_span(shop, seen):
    """Scenario 26: a failed run has the error's kind."""
    with working(shop.app):
        shop.charge.delay("secret-order", card="secret-card")
        shop.fails.delay("secret-order")
        wait_until(lambda: len(seen.spans("process")) == 2)
    failed = next(span for span in seen.spans("process") if span.attributes["catga.task.name"] == "fails")
    assert failed.attributes["error.type"] == "ValueError"
    assert failed.status.status_code is StatusCode.ERROR
    told = "".join(span.to_json() for span in seen.spans())
    assert "secret" not in told
    assert "card-4111" not in told


def test_a_retry_goes_on_in_its_trace(shop, seen):
    """The second run's message was created in the first run, and its waiting time is its own."""
    with working(shop.app):
        shop.again.delay(1)
        wait_until(lambda: len(seen.spans("process")) == 2)
    first, second = seen.spans("process")
    created, again = seen.spans("create")
    assert again.parent.span_id == first.context.span_id
    assert second.parent.span_id == again.context.span_id
    assert created.context.trace_id == second.context.trace_id
    assert second.attributes["catga.outbox.message_id"] != first.attributes["catga.outbox.message_id"]
    assert first.status.status_code is StatusCode.UNSET


def test_at_most_once_is_sent_in_its_trace(shop, seen):
    """A message that goes straight to the broker has a span of its sending."""
    with working(shop.app, relay=False):
        shop.straight.delay(1)
        wait_until(lambda: seen.spans("process"))
    send, process = seen.span("send"), seen.span("process")
    assert process.parent.span_id == send.context.span_id
    assert send.kind is SpanKind.PRODUCER


def test_a_plain_celery_worker_sees_headers_and_nothing_else(shop, seen, redis_url):
    """Without our package the trace's and our headers are headers of the application's; its retry takes them along."""
    plain = Celery("plain", broker=redis_url, set_as_current=False)
    plain.conf.worker_hijack_root_logger = False
    got = []

    @plain.task(name="charge", shared=False, bind=True)
    def charge(self, order, card=None):
        got.append((order, dict(self.request.headers or {}), getattr(self.request, "traceparent", None)))

    shop.charge.delay(5)
    shop.app.relay().run_once()
    with start_worker(plain, perform_ping_check=False, pool="solo", shutdown_timeout=30):
        wait_until(lambda: got)
    [(order, custom, parent)] = got
    assert order == 5
    assert set(custom) == {"traceparent", "catga_ready_at", "catga_message_id"}
    assert parent == custom["traceparent"]


def test_beside_the_instrumentation_of_celery(shop, seen):
    """opentelemetry-instrumentation-celery keeps its spans, none is doubled, and the publish is linked to its own."""
    from opentelemetry.instrumentation.celery import CeleryInstrumentor

    CeleryInstrumentor().instrument(tracer_provider=seen.tracing, meter_provider=seen.metering)
    try:
        with working(shop.app):
            shop.charge.delay(1)
            wait_until(lambda: seen.spans("run/"), what="the instrumentation's span")
    finally:
        CeleryInstrumentor().uninstrument()
    assert sorted(span.name for span in seen.spans()) == ["apply_async/charge", "run/charge", "send celery"]
    applied, run, send = seen.span("apply_async"), seen.span("run/"), seen.span("send")
    assert run.parent.span_id == applied.context.span_id
    assert send.links[0].context.span_id == applied.context.span_id
    assert run.attributes["catga.wait"] >= 0


def test_what_is_counted(shop, seen):
    """Sent, consumed, durations and latency, with exemplars that lead to their traces."""
    with working(shop.app):
        shop.charge.delay(1)
        shop.fails.delay(1)
        wait_until(lambda: len(seen.spans("process")) == 2)
        found = wait_until(lambda: (all_of := seen.metrics()).get("catga.outbox.relays") and all_of)

    def total(name, **labels):
        wanted = {key.replace("__", "."): value for key, value in labels.items()}.items()
        points = [point for point in found[name] if wanted <= dict(point.attributes).items()]
        return sum(getattr(point, "count", None) or getattr(point, "value", 0) for point in points)

    queue = {"messaging__system": "redis", "messaging__destination__name": "celery"}
    assert total("messaging.client.sent.messages", messaging__operation__name="send", **queue) == 2
    assert total("messaging.client.operation.duration", messaging__operation__name="send", **queue) >= 1
    assert total("messaging.client.consumed.messages", messaging__operation__name="process", **queue) == 2
    assert total("messaging.process.duration", catga__task__name="fails", error__type="ValueError", **queue) == 1
    assert total("catga.message.latency", catga__task__name="charge") == 1
    assert total("catga.outbox.relays") == 1
    traces = {span.context.trace_id for span in seen.spans("process")}
    for name in ("messaging.process.duration", "catga.message.latency"):
        assert {each.trace_id for point in found[name] for each in point.exemplars} <= traces
        assert all(point.exemplars for point in found[name])
    assert all(point.exemplars for point in found["messaging.client.operation.duration"])


def test_how_the_outbox_stands(shop, seen):
    """Gauges by queue: pending, scheduled, dead, the oldest's age; and what the inbox suppressed."""
    shop.charge.delay(1)
    shop.charge.apply_async((1,), countdown=3600, queue="slow")
    with shop.engine.begin() as connection:
        connection.execute(text("INSERT INTO catga_inbox_counts (task, suppressed, too_old) VALUES ('charge', 3, 0)"))
    relay = shop.app.relay(queues=["none"])
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        # The first look may come amid the first sample.
        wanted = {"catga.outbox.pending", "catga.outbox.scheduled", "catga.outbox.oldest_age", "catga.inbox.duplicates"}
        found = wait_until(lambda: wanted <= (all_of := seen.metrics()).keys() and all_of)
    finally:
        relay.stop()
        thread.join(30)

    def by_queue(name):
        return {point.attributes["messaging.destination.name"]: point.value for point in found[name]}

    assert by_queue("catga.outbox.pending") == {"celery": 1, "slow": 0}
    assert by_queue("catga.outbox.scheduled") == {"celery": 0, "slow": 1}
    assert [point.value for point in found["catga.inbox.duplicates"]] == [3]
    assert found["catga.outbox.oldest_age"][0].value >= 0
    assert "catga.outbox.pending" not in seen.metrics(), "a relay that has ended reports nothing"


def test_the_package_works_without_opentelemetry():
    """Where it isn't installed nothing of it is imported, and messages are enqueued all the same."""
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def others(name, *args): return None if name.startswith('opentelemetry') else find(name, *args)\n"
        "PathFinder.find_spec = others\n"
        "from catga_tasks import Catga, migrate\n"
        "app = Catga('shop', broker='memory://', outbox='sqlite://')\n"
        "from sqlalchemy import create_engine, pool\n"
        "engine = create_engine('sqlite://', poolclass=pool.StaticPool)\n"
        "migrate.upgrade(engine)\n"
        "app = Catga('shop', broker='memory://', outbox=engine)\n"
        "app.send_task('charge', (1,))\n"
        "print(app.relay().run_once(), any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["1", "False"]
