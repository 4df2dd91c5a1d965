"""What is measured, and by which names? OpenTelemetry's messaging conventions, and what only an outbox has.

Only its API is used (extra `otel`), and only once the application has imported it, to configure an SDK. Until then
nothing is imported or recorded, and no message differs from Celery's.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

    from catga_tasks.brokers.contract import Receipt
    from catga_tasks.envelope import Envelope, Row
    from catga_tasks.tallies import Tally

NAME = "catga_tasks"
#: The header in which a relay tells the worker since when the message could have run: seconds since 1970 by the
#: database's clock. Only where somebody asks; a plain Celery worker takes it for a header of the application's.
READY_AT = "catga_ready_at"
#: The header with the number of the message's row in the outbox, of the same kind.
MESSAGE_ID = "catga_message_id"
#: Bounds of the histograms in seconds, as the conventions advise; waiting may take longer than working.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
WAIT_BOUNDS = (0.001, 0.0025, *BOUNDS, 30, 60, 300, 1800, 3600)

SYSTEM, DESTINATION = "messaging.system", "messaging.destination.name"
OPERATION, OPERATION_TYPE = "messaging.operation.name", "messaging.operation.type"
ERROR_TYPE, TASK = "error.type", "catga.task.name"


#: A trace's context as it stands in a row's headers.
TRACEPARENT = re.compile(r'"traceparent": "([0-9a-f-]{55})"')


@dataclass(frozen=True)
class QueueCounts:
    """How many messages of one queue are in the outbox, by their state."""

    queue: str
    pending: int = 0
    scheduled: int = 0
    waiting: int = 0
    retrying: int = 0
    dead: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The outbox at one moment, and what relays have counted until then.

    `oldest_age` is in seconds; `duplicates` were suppressed by the inbox, by task.
    """

    tally: Tally
    queues: Sequence[QueueCounts] = ()
    oldest_age: float = 0.0
    relays: int = 0
    published: int = 0
    duplicates: dict[str, int] = field(default_factory=dict)


#: Name, unit, description, and the values of a snapshot with their attributes: what is the same in all processes.
Gauge = tuple[str, str, str, "Callable[[Snapshot], Iterable[tuple[float, dict[str, str]]]]"]


def _by_queue(state: str) -> Callable[[Snapshot], Iterable[tuple[float, dict[str, str]]]]:
    return lambda snapshot: [(getattr(each, state), {DESTINATION: each.queue}) for each in snapshot.queues]


GAUGES: tuple[Gauge, ...] = (
    ("catga.outbox.pending", "{message}", "Messages that are due and untried.", _by_queue("pending")),
    ("catga.outbox.scheduled", "{message}", "Messages that wait for their ETA.", _by_queue("scheduled")),
    ("catga.outbox.waiting", "{message}", "Messages that wait for the one before them.", _by_queue("waiting")),
    ("catga.outbox.retrying", "{message}", "Messages that failed at least once.", _by_queue("retrying")),
    ("catga.outbox.dead", "{message}", "Dead letters.", _by_queue("dead")),
    ("catga.outbox.oldest_age", "s", "How long the longest due message has been due.", lambda s: [(s.oldest_age, {})]),
    ("catga.outbox.relays", "{relay}", "Relays with a recent heartbeat.", lambda s: [(s.relays, {})]),
)
COUNTERS: tuple[Gauge, ...] = (
    ("catga.outbox.published", "{message}", "Messages that brokers confirmed.", lambda s: [(s.published, {})]),
    (
        "catga.inbox.duplicates",
        "{message}",
        "Duplicates that the inbox suppressed.",
        lambda s: [(count, {TASK: task}) for task, count in s.duplicates.items()],
    ),
)

#: Where snapshots come from: the relays of this process.
_sources: list[Callable[[], Snapshot | None]] = []


@dataclass(frozen=True)
class Measure:
    """What is measured as it happens: a counter, or with `bounds` a histogram."""

    name: str
    unit: str
    description: str
    bounds: tuple[float, ...] = ()


SENT = Measure("messaging.client.sent.messages", "{message}", "Messages that a relay tried to send.")
CONSUMED = Measure("messaging.client.consumed.messages", "{message}", "Messages that a worker ran.")
ATTEMPTS = Measure("catga.outbox.attempts", "{attempt}", "Attempts at a message that failed.")
PUBLISH = Measure("messaging.client.operation.duration", "s", "Publishing a batch.", BOUNDS)
PROCESS = Measure("messaging.process.duration", "s", "Running a task.", BOUNDS)
LATENCY = Measure("catga.message.latency", "s", "From the commit, or the ETA, to the start.", WAIT_BOUNDS)
MEASURES = (SENT, CONSUMED, ATTEMPTS, PUBLISH, PROCESS, LATENCY)

#: A number of a measure, with its attributes.
Measurement = tuple[Measure, dict[str, str], float]


class Instruments:
    """The instruments of one meter provider."""

    def __init__(self, meter: Any) -> None:
        self.record: dict[Measure, Callable[[float, dict[str, str], Any], None]] = {}
        for each in MEASURES:
            about = {"unit": each.unit, "description": each.description}
            if each.bounds:
                histogram = meter.create_histogram(each.name, explicit_bucket_boundaries_advisory=each.bounds, **about)
                self.record[each] = histogram.record
            else:
                self.record[each] = meter.create_counter(each.name, **about).add
        for name, unit, description, values in GAUGES:
            meter.create_observable_gauge(name, [_observing(values)], unit=unit, description=description)
        for name, unit, description, values in COUNTERS:
            meter.create_observable_counter(name, [_observing(values)], unit=unit, description=description)


def _observing(values: Callable[[Snapshot], Iterable[tuple[float, dict[str, str]]]]) -> Callable[[Any], Any]:
    def observe(_options: Any) -> Iterator[Any]:
        from opentelemetry.metrics import Observation

        # Several relays see one database.
        snapshot = next((found for found in (read() for read in list(_sources)) if found is not None), None)
        if snapshot is not None:
            for value, attributes in values(snapshot):
                yield Observation(value, attributes)

    return observe


class _Known:
    """The providers that were asked last: an SDK may be configured late, and after a fork."""

    tracer_provider: Any = None
    tracer: Tracer | None = None
    meter_provider: Any = None
    instruments: Instruments | None = None


def tracer() -> Tracer | None:
    """Return our tracer, or None while the application has configured no tracing."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if provider is not _Known.tracer_provider:
        _Known.tracer = trace.get_tracer(NAME, tracer_provider=provider) if _configured(provider) else None
        _Known.tracer_provider = provider
    return _Known.tracer


def instruments() -> Instruments | None:
    """Return our instruments, or None while the application has configured no metrics."""
    if "opentelemetry.metrics" not in sys.modules:
        return None
    from opentelemetry import metrics

    provider = metrics.get_meter_provider()
    if provider is not _Known.meter_provider:
        _Known.instruments = Instruments(provider.get_meter(NAME)) if _configured(provider) else None
        _Known.meter_provider = provider
    return _Known.instruments


def on() -> bool:
    """Return whether anybody listens."""
    return tracer() is not None or instruments() is not None


def _configured(provider: object) -> bool:
    """Return whether this is an SDK's provider: the API's own stand in for one that isn't there yet."""
    return not type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


def observe(source: Callable[[], Snapshot | None]) -> None:
    """Let the gauges read here, at each collection, until `forget`."""
    _sources.append(source)
    instruments()


def forget(source: Callable[[], Snapshot | None]) -> None:
    """Read here no longer."""
    _sources.remove(source)


def record(measurements: Iterable[Measurement], context: Context | None = None) -> None:
    """Hand the measurements to the application's SDK, if it has one; exemplars lead to the span in `context`."""
    found = instruments()
    if found is not None:
        for measure, attributes, value in measurements:
            found.record[measure](value, attributes, context)


def sending(
    system: str, queues: Mapping[str, int], seconds: float, *, error: str | None = None
) -> Iterator[Measurement]:
    """Measure a publish that took so many seconds: how many messages for which queue were sent, or refused."""
    labels = {SYSTEM: system, OPERATION: "send", **({ERROR_TYPE: error} if error else {})}
    for queue, count in queues.items():
        yield SENT, {**labels, DESTINATION: queue}, count
    where = {DESTINATION: next(iter(queues))} if len(queues) == 1 else {}
    yield PUBLISH, {**labels, **where, OPERATION_TYPE: "send"}, seconds


def publishing(system: str, receipt: Receipt, seconds: float) -> Iterator[Measurement]:
    """Measure a batch that took so many seconds, by what became of its messages."""
    if receipt.confirmed:
        yield from sending(system, Counter([row.envelope.queue for row in receipt.confirmed]), seconds)
    if receipt.rejected:
        refused = Counter([row.envelope.queue for row, _ in receipt.rejected])
        yield from sending(system, refused, seconds, error="rejected")
        for queue, count in refused.items():
            yield ATTEMPTS, {DESTINATION: queue}, count
    if receipt.outage is not None:
        yield from sending(system, {}, seconds, error="outage")


def running(
    system: str, queue: str, task: str, seconds: float, *, waited: float | None, error: str | None
) -> Iterator[Measurement]:
    """Measure a run of a task: its seconds, and those that the message had waited for it."""
    labels = {SYSTEM: system, DESTINATION: queue, OPERATION: "process", TASK: task}
    yield CONSUMED, labels, 1
    yield PROCESS, {**labels, **({ERROR_TYPE: error} if error else {})}, seconds
    if waited is not None:
        yield LATENCY, {DESTINATION: queue, TASK: task}, waited


def stamped(row: Row) -> Row:
    """Return the row with what the worker is told of its time in the outbox, beside its other headers."""
    headers = row.envelope.headers
    if row.ready_at is None or not (headers.startswith("{") and headers.endswith("}") and len(headers) > len("{}")):
        return row
    told = f', "{READY_AT}": {row.ready_at!r}, "{MESSAGE_ID}": {row.id}}}'
    return row._replace(envelope=row.envelope._replace(headers=headers[:-1] + told))


def stored(envelopes: Sequence[Envelope], admitted: Sequence[Envelope]) -> None:
    """End the creations of messages: those that were inserted, and others, whose unique key another message has."""
    sent: dict[Any, list[str]] = {envelope.creation: [] for envelope in envelopes if envelope.creation is not None}
    if not sent:
        return
    for envelope in admitted:
        if envelope.creation is not None:
            sent[envelope.creation].append(envelope.task_id)
    every = Counter(envelope.creation for envelope in envelopes)
    for creation, ids in sent.items():
        creation.end(ids, refused=every[creation] - len(ids))


def trace_id(headers: str | None = None) -> str | None:
    """Return the current trace's id, or that in a row's headers, in hexadecimal; None if there is none."""
    if headers is not None:
        found = TRACEPARENT.search(headers)
        return found[1][3:35] if found else None
    if tracer() is None:
        return None
    from opentelemetry import trace

    current = trace.get_current_span().get_span_context()
    return f"{current.trace_id:032x}" if current.is_valid else None
