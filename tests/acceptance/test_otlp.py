"""The how-to's set-up, in real processes, with a real OpenTelemetry collector (Rotel, of a wheel) at the other end."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from catga_tasks import migrate
from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import free_port

SHOP = """
import observed
from opentelemetry import trace
from catga_tasks import Catga

app = Catga("shop", broker={broker!r}, outbox={outbox!r})

@app.task(name="charge")
def charge(order):
    return order

if __name__ == "__main__":
    with trace.get_tracer("shop").start_as_current_span("POST /orders"):
        charge.delay("secret-order")
    observed.tracing.shutdown()
"""
SPAN = re.compile(
    r"Trace ID +: (\w+)\n +Parent ID +: (\w*)\n +ID +: (\w+)\n +Name +: ([^\n]+)\n(.*?)(?=\nSpan #|\nResourceSpans|\Z)",
    re.DOTALL,
)


@pytest.fixture
def collector(processes):
    """A collector that prints what it is sent, and its address."""
    if find_spec("rotel") is None:
        pytest.skip("There is no wheel of the collector rotel for this machine.")
    agent = Path(find_spec("rotel").origin).with_name("rotel-agent")
    http, grpc = free_port(), free_port()
    running = processes.start(
        str(agent), "start", "--otlp-http-endpoint", f"127.0.0.1:{http}", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc}",
        "--exporter", "blackhole", "--debug-log", "traces", "--debug-log", "metrics",
        "--debug-log-verbosity", "detailed",
    )  # fmt: skip
    wait_until(lambda: "Starting Rotel" in running.log(), what="the collector")
    return running, f"http://127.0.0.1:{http}"


def spans(log):
    """The spans in the collector's log by name: trace, parent, id and the rest of it."""
    return {name: (trace, parent, own, rest) for trace, parent, own, name, rest in SPAN.findall(log)}


def test_one_trace_across_processes(collector, processes, tmp_path, postgres_url, redis_url):
    """A request, its message's creation, the relay's publish and a forked worker's run arrive as one trace."""
    running, address = collector
    [block] = re.findall(
        r"^```python file=observed.py\n(.*?)^```",
        (ROOT / "docs/how-to/observe.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    (tmp_path / "observed.py").write_text(block)
    (tmp_path / "shop.py").write_text(SHOP.format(broker=redis_url, outbox=postgres_url))
    engine = create_engine(postgres_url)
    migrate.upgrade(engine)
    engine.dispose()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_SERVICE_NAME": "shop", "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
    }  # fmt: skip
    processes.celery("shop", "outbox", "relay", env=env, cwd=tmp_path)
    worker = processes.celery("shop", "worker", "-c", "1", "-l", "INFO", env=env, cwd=tmp_path)
    wait_until(lambda: "ready." in worker.log(), what="the worker")
    enqueue = processes.python("shop.py", env=env, cwd=tmp_path)
    assert enqueue.wait_exit(30) == 0, enqueue.log()
    names = {"POST /orders", "create celery", "send celery", "process celery"}
    found = wait_until(
        lambda: (arrived := spans(running.log())) and names <= arrived.keys() and arrived,
        what="the spans at the collector",
    )
    assert len({found[name][0] for name in names}) == 1
    assert found["create celery"][1] == found["POST /orders"][2]
    assert found["process celery"][1] == found["create celery"][2]
    assert f"-> ID: {found['create celery'][2]}" in found["send celery"][3]
    assert "catga.wait: Double(" in found["process celery"][3]
    measured = {
        "messaging.client.sent.messages", "messaging.client.consumed.messages", "messaging.process.duration",
        "catga.message.latency", "catga.outbox.oldest_age", "catga.outbox.relays",
    }  # fmt: skip
    wait_until(lambda: all(name in running.log() for name in measured), what="the metrics at the collector")
    assert "secret-order" not in running.log()
