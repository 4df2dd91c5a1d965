"""How is the story of a message told in one trace? Spans of its creation, its publish and its run.

The creation's context travels in the message's headers (W3C `traceparent` and `tracestate`), so it is stored with the
row. Arguments, results and the words of errors are in no span. It is imported by who knows that somebody listens.
"""

from __future__ import annotations

import json
import sys
import time
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from catga_tasks import telemetry
from catga_tasks.telemetry import DESTINATION, ERROR_TYPE, OPERATION, OPERATION_TYPE, SYSTEM, TASK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.trace import Span

    from catga_tasks.brokers.contract import Receipt
    from catga_tasks.envelope import Row

MESSAGE, COUNT, ROW, WAIT = (
    "messaging.message.id", "messaging.batch.message_count", "catga.outbox.message_id", "catga.wait",
)  # fmt: skip
#: How many messages of a creation weren't sent, because another one has their unique key.
REFUSED = "catga.unique.refused"
CARRIED = ("traceparent", "tracestate")
#: Links that an SDK keeps of a span unless it is told otherwise; a larger batch has several spans.
MOST_LINKS = 128

_w3c = TraceContextTextMapPropagator()
_last: ContextVar[Creation | None] = ContextVar("catga_last_creation", default=None)


class Creation:
    """The span in which messages were created, and the headers that carry its context.

    Calls of one task that follow each other in one transaction and under one span share it: a span of its own for each
    of a thousand calls would cost more than enqueuing them. The insert ends it; a rollback leaves none behind.
    """

    def __init__(self, span: Span, key: tuple[Any, ...], target: object | None) -> None:
        self.span = span
        self.key = key
        self.open = True
        self.target = None if target is None else weakref.ref(target)
        self.headers: dict[str, str] = {}
        _w3c.inject(self.headers, trace.set_span_in_context(span))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.fail(error)

    def shared(self, target: object | None) -> bool:
        """Return whether more messages of this transaction may be of this creation."""
        return self.open and target is not None and self.target is not None and self.target() is target

    def end(self, messages: Sequence[str], *, refused: int = 0) -> None:
        """End the span: these messages were created, and so many were not, because another has their unique key."""
        if self.open:
            self.open = False
            if self.span.is_recording():
                one = len(messages) == 1
                self.span.set_attribute(*((MESSAGE, messages[0]) if one else (COUNT, len(messages))))
                if refused:
                    self.span.set_attribute(REFUSED, refused)
            self.span.end()

    def fail(self, error: BaseException) -> None:
        """End the span with the error's kind."""
        if self.open:
            self.open = False
            _blame(self.span, type(error).__name__)
            self.span.end()


def create(
    operation: str, task: str, queue: str, *, system: str, carried: Mapping[str, Any], target: object | None
) -> Creation | None:
    """Return the creation of a message, new or shared; None without tracing, or if another instrumentation traces.

    `operation` is "create" into the outbox or "send" straight to the broker; `carried` are the headers that the caller
    gave; `target` is the transaction, None outside one.
    """
    tracer = telemetry.tracer()
    if tracer is None or celery_is_instrumented():
        return None
    parent = trace.get_current_span().get_span_context()
    key = (parent.trace_id, parent.span_id, operation, task, queue)
    last = _last.get()
    if last is not None and last.key == key and last.shared(target):
        return last
    span = tracer.start_span(
        f"{operation} {queue}",
        None if parent.is_valid else _w3c.extract(carried),
        trace.SpanKind.PRODUCER,
        {SYSTEM: system, OPERATION: operation, OPERATION_TYPE: operation, DESTINATION: queue, TASK: task},
    )
    creation = Creation(span, key, target)
    _last.set(creation)
    return creation


class Publishing:
    """The spans of one batch on its way, with a link to the creation of each row."""

    def __init__(self, rows: Sequence[Row], system: str) -> None:
        self._spans = _publishing_spans(rows, system)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            # Nobody foresaw it.
            self._end(type(error).__name__)

    def done(self, receipt: Receipt) -> Any:
        """Tell what became of the batch; return the context that the exemplars of its measurements lead to."""
        where = trace.set_span_in_context(self._spans[0]) if self._spans else None
        self._end("outage" if receipt.outage is not None else "rejected" if receipt.rejected else None)
        return where

    def _end(self, error: str | None) -> None:
        spans, self._spans = self._spans, []
        for span in spans:
            if error:
                _blame(span, error)
            span.end()


def _publishing_spans(rows: Sequence[Row], system: str) -> list[Span]:
    tracer = telemetry.tracer()
    if tracer is None:
        return []
    links = []
    for row in rows:
        made = context_of(row.envelope.headers)
        if made is not None and made.is_valid:
            labels: dict[str, Any] = {MESSAGE: row.envelope.task_id, ROW: row.id, WAIT: round(row.age, 6)}
            links.append((trace.Link(made, labels), row))
    spans = []
    for start in range(0, len(links), MOST_LINKS):
        some = links[start : start + MOST_LINKS]
        queues = {_queue(row) for _, row in some}
        queue = {DESTINATION: next(iter(queues))} if len(queues) == 1 else {}
        # A message by itself has its publish in its own trace; a batch's has no single one to be in.
        made = some[0][0].context
        parent = trace.set_span_in_context(trace.NonRecordingSpan(made)) if len(rows) == 1 else None
        about: dict[str, Any] = {SYSTEM: system, OPERATION: "send", OPERATION_TYPE: "send", COUNT: len(some), **queue}
        name = f"send {next(iter(queues))}" if queue else "send"
        spans.append(tracer.start_span(name, parent, trace.SpanKind.CLIENT, about, [link for link, _ in some]))
    return spans


class Run:
    """A task's run, from its start to its end, in the trace of its message."""

    def __init__(
        self, task: str, task_id: str, queue: str, *, system: str, headers: Mapping[str, Any], waited: float | None
    ) -> None:
        self._task, self._queue, self._system, self._waited = task, queue, system, waited
        self._started = time.perf_counter()
        self._span: Span | None = None
        self._token: Any = None
        told = {WAIT: waited, ROW: headers.get(telemetry.MESSAGE_ID)}
        self._told = {name: value for name, value in told.items() if value is not None}
        tracer = telemetry.tracer()
        if tracer is None or celery_is_instrumented():
            self._tell()
            return
        labels = {SYSTEM: system, OPERATION: "process", OPERATION_TYPE: "process", DESTINATION: queue, TASK: task}
        parent = _w3c.extract({name: headers[name] for name in CARRIED if headers.get(name)})
        self._span = tracer.start_span(
            f"process {queue}", parent, trace.SpanKind.CONSUMER, {**labels, MESSAGE: task_id, **self._told}
        )
        self._token = context.attach(trace.set_span_in_context(self._span, parent))

    def end(self, error: str | None) -> None:
        """End it, with the kind of the error if there was one."""
        seconds = time.perf_counter() - self._started
        where = context.get_current()
        if self._span is None:
            self._tell()
        measured = telemetry.running(self._system, self._queue, self._task, seconds, waited=self._waited, error=error)
        telemetry.record(measured, where)
        if self._span is not None:
            if error:
                _blame(self._span, error)
            self._span.end()
            context.detach(self._token)

    def _tell(self) -> None:
        """Add the waiting time to another instrumentation's span, which may begin later than this and end earlier."""
        if (span := trace.get_current_span()).is_recording():
            span.set_attributes(self._told)


def celery_is_instrumented() -> bool:
    """Return whether opentelemetry-instrumentation-celery makes spans of creations and runs: they aren't doubled."""
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    return module is not None and bool(module.CeleryInstrumentor().is_instrumented_by_opentelemetry)


def context_of(headers: str) -> Any:
    """Return the span context in a row's headers, or None."""
    found = telemetry.TRACEPARENT.search(headers)
    if found is None:
        return None
    carrier = {"traceparent": found[1]}
    if '"tracestate"' in headers:
        try:
            carrier["tracestate"] = str(json.loads(headers).get("tracestate") or "")
        except (ValueError, AttributeError):
            return None
    return trace.get_current_span(_w3c.extract(carrier, context.Context())).get_span_context()


def _blame(span: Span, error: str) -> None:
    """Mark the span as failed by the error's kind: its words may hold what is nobody's business."""
    span.set_attribute(ERROR_TYPE, error)
    span.set_status(trace.Status(trace.StatusCode.ERROR))


def _queue(row: Row) -> str:
    return row.envelope.queue
