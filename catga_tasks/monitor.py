"""What does Flower tell machines of us? Health at `/outbox/health`, and the outbox's metrics at `/metrics`."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from flower.events import EventsState
from flower.views import BaseHandler
from flower.views.monitor import Metrics
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString
from tornado.web import url

from catga_tasks import health, sightings, tallies, telemetry
from catga_tasks.gauges import Gauges
from catga_tasks.tallies import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from catga_tasks.telemetry import Measure, Snapshot

#: An answer is given again for so long, in seconds: everybody may ask, and the broker has other things to do.
HEALTH_SECONDS = 2.0
#: `/metrics` waits no longer than this for the database, in seconds.
METRICS_SECONDS = 3.0


class HealthPage(BaseHandler):
    """`/outbox/health`: like Flower's own `/healthcheck` without a login, for probes have none."""

    async def get(self) -> None:
        """Answer 200 or 503, with the checks as JSON."""
        try:
            max_age = float(self.get_argument("max_age", str(health.MAX_AGE)))
        except ValueError:
            self.set_status(400)
            self.write({"error": "max_age must be a number of seconds."})
            return
        found = await asyncio.get_running_loop().run_in_executor(None, _last.ask, self.capp, max_age)
        self.set_status(200 if found.status == health.HEALTHY else 503)
        self.write(found.as_dict())


class _Last:
    """The last answer: who asks meanwhile gets the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._key: tuple[int, float] | None = None
        self._found: health.Health | None = None

    def ask(self, app: Any, max_age: float) -> health.Health:
        with self._lock:
            if self._found is None or self._key != (id(app), max_age) or time.monotonic() > self._until:
                self._found, self._key = health.check(app, max_age=max_age), (id(app), max_age)
                self._until = time.monotonic() + HEALTH_SECONDS
            return self._found


_last = _Last()


class Outbox:
    """A collector of Prometheus: the outbox, its relays and the runs, by the names of OpenTelemetry's exporter."""

    def __init__(self, snapshot: Snapshot | None, runs: Tally) -> None:
        self._snapshot = snapshot
        self._runs = runs

    def collect(self) -> Iterator[Any]:
        """Yield the metrics; while the database is out, only that it is, and the runs."""
        up = GaugeMetricFamily("catga_outbox_up", "Whether the outbox's database could be asked.")
        up.add_metric([], float(self._snapshot is not None))
        yield up
        if self._snapshot is not None:
            for kinds, family in ((telemetry.GAUGES, GaugeMetricFamily), (telemetry.COUNTERS, CounterMetricFamily)):
                for name, unit, description, values in kinds:
                    samples = [(attributes, (value,)) for value, attributes in values(self._snapshot)]
                    yield _family(family, name, unit, description, samples)
            yield from _tallied(self._snapshot.tally)
        yield from _tallied(self._runs)


def _tallied(tally: Tally) -> Iterator[Any]:
    for measure in telemetry.MEASURES:
        series = tally.of(measure)
        if not series:
            continue
        kind, values = (HistogramMetricFamily, _histogram) if measure.bounds else (CounterMetricFamily, _count)
        samples = [(labels, values(measure, numbers)) for labels, numbers in series]
        yield _family(kind, measure.name, measure.unit, measure.description, samples)


def _count(_measure: Measure, numbers: Mapping[str, float]) -> tuple[float]:
    return (numbers[tallies.COUNT],)


def _histogram(measure: Measure, numbers: Mapping[str, float]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum; another release may have counted by other bounds."""
    counts = {float(part): number for part, number in numbers.items() if part != tallies.SUM}
    bounds = sorted({*map(float, measure.bounds), math.inf, *counts})
    totals = accumulate(counts.get(bound, 0) for bound in bounds)
    return list(zip(map(floatToGoString, bounds), totals, strict=True)), numbers[tallies.SUM]


def _family(
    kind: Any, name: str, unit: str, description: str, samples: Sequence[tuple[Mapping[str, str], tuple[Any, ...]]]
) -> Any:
    labels = sorted({label for attributes, _ in samples for label in attributes})
    prometheus = name.replace(".", "_") + ("_seconds" if unit == "s" else "")
    found = kind(prometheus, description, labels=[label.replace(".", "_") for label in labels])
    for attributes, values in samples:
        # An empty label is none.
        found.add_metric([attributes.get(label, "") for label in labels], *values)
    return found


def extend_metrics() -> None:
    """Add ours to what Flower's `/metrics` answers; a database that is slow doesn't hold Flower up."""
    original = Metrics.get
    gauges: dict[int, Gauges] = {}
    runs = _follow_runs()

    def read(app: Any) -> Snapshot | None:
        try:
            return gauges.setdefault(id(app), Gauges(app.outbox.engine)).read()
        except Exception:  # noqa: BLE001 - a wrong setting, or no outbox: Flower's own metrics go on
            return None

    async def get(self: Any) -> None:
        await original(self)
        asked = asyncio.get_running_loop().run_in_executor(None, read, self.capp)
        try:
            snapshot = await asyncio.wait_for(asyncio.shield(asked), METRICS_SECONDS)
        except TimeoutError:
            snapshot = None
        registry = CollectorRegistry()
        registry.register(Outbox(snapshot, runs))
        self.write(generate_latest(registry))

    Metrics.get = get


def _follow_runs() -> Tally:
    """Count the runs that workers tell of, from now on; in the loop's thread, like all that Flower does with events."""
    runs = Tally()
    original = EventsState.event

    def event(self: Any, told: Any) -> None:
        original(self, told)
        runs.add(sightings.measured(told))

    EventsState.event = event
    return runs


HANDLERS = [
    url(r"/outbox/health", HealthPage, name="outbox-health"),
]
