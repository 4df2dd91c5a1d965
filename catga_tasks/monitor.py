"""What does Flower tell machines of us? Health at `/outbox/health`, and the outbox's metrics at `/metrics`."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from flower.views import BaseHandler
from flower.views.monitor import Metrics
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from tornado.web import url

from catga_tasks import health, telemetry
from catga_tasks.gauges import Gauges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from catga_tasks.telemetry import Gauge, Snapshot

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
    """A collector of Prometheus: the outbox's gauges by the names that OpenTelemetry's exporter gives them."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """Yield the metrics; while the database is out, only that it is."""
        up = GaugeMetricFamily("catga_outbox_up", "Whether the outbox's database could be asked.")
        up.add_metric([], float(self._snapshot is not None))
        yield up
        if self._snapshot is None:
            return
        for kinds, family in ((telemetry.GAUGES, GaugeMetricFamily), (telemetry.COUNTERS, CounterMetricFamily)):
            for gauge in kinds:
                yield self._family(gauge, family)

    def _family(self, gauge: Gauge, family: Any) -> Any:
        name, unit, description, values = gauge
        measured = list(values(self._snapshot)) if self._snapshot else []
        labels = sorted({label for _, attributes in measured for label in attributes})
        prometheus = name.replace(".", "_") + ("_seconds" if unit == "s" else "")
        found = family(prometheus, description, labels=[label.replace(".", "_") for label in labels])
        for value, attributes in measured:
            found.add_metric([attributes[label] for label in labels], value)
        return found


def extend_metrics() -> None:
    """Add the outbox's metrics to what Flower's `/metrics` answers; a database that is slow doesn't hold Flower up."""
    original = Metrics.get
    gauges: dict[int, Gauges] = {}

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
        registry.register(Outbox(snapshot))
        self.write(generate_latest(registry))

    Metrics.get = get


HANDLERS = [
    url(r"/outbox/health", HealthPage, name="outbox-health"),
]
