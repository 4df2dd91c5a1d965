"""What tests of telemetry look at: an SDK that keeps spans and metrics in memory, for one test."""

from __future__ import annotations

from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.metrics import _internal as metrics_globals
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Seen:
    """The spans and metrics so far."""

    def __init__(self, *readers):
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracing = TracerProvider()
        self.tracing.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.metering = MeterProvider([self.reader, *readers])
        self.tracer = self.tracing.get_tracer("the application")

    def spans(self, start=""):
        """Finished spans whose name starts so, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(start)]

    def span(self, start):
        [found] = self.spans(start)
        return found

    def metrics(self):
        """All metrics: the data points by name."""
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


@contextmanager
def sdk(*readers):
    """Configure an SDK as an application does, and take it away again: OpenTelemetry has one a process."""
    seen = Seen(*readers)
    before = trace._TRACER_PROVIDER, metrics_globals._METER_PROVIDER
    trace._TRACER_PROVIDER, metrics_globals._METER_PROVIDER = seen.tracing, seen.metering
    assert trace.get_tracer_provider() is seen.tracing
    assert metrics.get_meter_provider() is seen.metering
    try:
        yield seen
    finally:
        trace._TRACER_PROVIDER, metrics_globals._METER_PROVIDER = before
        seen.tracing.shutdown()
        seen.metering.shutdown()
