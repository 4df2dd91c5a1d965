"""A line of ours says which message it speaks of: as fields for structured logs, and in its words for people."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog
from celery.contrib.testing.worker import start_worker
from pythonjsonlogger.json import JsonFormatter
from sqlalchemy import text

from catga_tasks import Catga
from tests.integration.telemetry import sdk
from tests.waiting import wait_until


@pytest.fixture
def lines():
    """What applications with structured logs, by python-json-logger and by structlog, and one without see of us."""
    outputs = io.StringIO(), io.StringIO(), io.StringIO()
    handlers = [logging.StreamHandler(output) for output in outputs]
    handlers[0].setFormatter(JsonFormatter("%(levelname)s %(message)s"))
    handlers[1].setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logger = logging.getLogger("catga_tasks")
    for handler in handlers:
        logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)  # workers of other tests raise the root's

    def read():
        *structured, plain = (output.getvalue() for output in outputs)
        return [[json.loads(line) for line in text.splitlines()] for text in structured], plain

    yield read
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def app(redis_url, engine):
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.conf.worker_hijack_root_logger = False
    return app


def test_a_message_that_failed(app, engine, lines):
    """The relay's line has the task's id and name, the row's number and the trace's id."""
    with sdk() as seen, seen.tracer.start_as_current_span("request") as span:
        result = app.send_task("charge", (1,))
    with engine.begin() as connection:
        connection.execute(text("UPDATE catga_outbox SET properties = '[]'"))
        number = connection.execute(text("SELECT id FROM catga_outbox")).scalar_one()
    app.relay().run_once()
    libraries, plain = lines()
    trace_id = f"{span.get_span_context().trace_id:032x}"
    wanted = {"task_id": result.id, "task_name": "charge", "message_id": number, "trace_id": trace_id}
    for structured in libraries:
        [line] = [line for line in structured if "failed" in line["message"]]
        assert wanted.items() <= line.items()
    assert f"id {result.id}) failed" in plain
    assert f"[trace_id={trace_id}]" in plain


def test_a_line_from_within_a_task(app, engine, lines):
    """What we say while a task runs is of that task, its message and its trace; percent signs are no trouble."""

    @app.task(name="tells", shared=False)
    def tells():
        logging.getLogger("catga_tasks.worker").warning("100 %%: %s", "done")
        logging.getLogger("catga_tasks.worker").warning("50 %")

    with sdk() as seen:
        result = tells.delay()
        app.relay().run_once()
        with start_worker(app, perform_ping_check=False, pool="solo", loglevel="INFO"):
            wait_until(lambda: seen.spans("process"))
        process = seen.span("process")
    libraries, plain = lines()
    trace_id = f"{process.context.trace_id:032x}"
    number = process.attributes["catga.outbox.message_id"]
    for structured in libraries:
        told = [line for line in structured if line.get("task_name") == "tells"]
        assert len(told) == 2
        for line in told:
            assert {"task_id": result.id, "message_id": number, "trace_id": trace_id}.items() <= line.items()
    assert f"100 %: done [task_id={result.id}, " in plain
    assert f"50 % [task_id={result.id}, message_id={number}, trace_id={trace_id}]" in plain
