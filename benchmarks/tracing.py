"""What does tracing cost a call? The same calls with an SDK that samples everything, and without."""

from __future__ import annotations

from contextlib import contextmanager

from sqlalchemy.orm import Session

from benchmarks.bench import Bench, Row, rounds, seconds

CALLS = 100  # in one transaction


@contextmanager
def sdk():
    """Configure tracing as an application does, for a block; the exporter drops what it is given."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, _spans):
            return SpanExportResult.SUCCESS

    provider, before = TracerProvider(), trace._TRACER_PROVIDER
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    trace._TRACER_PROVIDER = provider
    try:
        with provider.get_tracer("benchmarks").start_as_current_span("request"):
            yield
    finally:
        trace._TRACER_PROVIDER = before
        provider.shutdown()


def run(bench: Bench, *, quick: bool) -> list[Row]:
    times = 1 if quick else 20
    task = bench.ours.tasks["charge"]

    def joined():
        for _ in range(times):
            with Session(bench.engine) as session, session.begin(), bench.ours.outbox.join(session):
                for number in range(CALLS):
                    task.delay(number, "somebody@example.org", amount=100)

    def alone():
        for number in range(times * 10):
            task.delay(number, "somebody@example.org", amount=100)

    def one_each():
        for number in range(times * 10):
            with Session(bench.engine) as session, session.begin(), bench.ours.outbox.join(session):
                task.delay(number, "somebody@example.org", amount=100)

    found = []
    for name, work, calls in (
        ("delay() with tracing, 100 in a transaction", joined, times * CALLS),
        ("delay() with tracing, one in a transaction", one_each, times * 10),
        ("delay() with tracing, outside a transaction", alone, times * 10),
    ):

        def traced(work=work):
            with sdk():
                return seconds(work)

        on, off = rounds(1 if quick else 11, traced, lambda work=work: seconds(work))
        bench.empty()
        rate_on, rate_off = calls / on, calls / off
        found.append(
            Row(name, f"{rate_on:,.0f}/s", f"{rate_off:,.0f}/s untraced", f"{rate_on / rate_off:.2f}x", "> 0.9x",
                rate_on / rate_off > 0.9)
        )  # fmt: skip
    return found
