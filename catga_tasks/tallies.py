"""How are counters and histograms kept where no SDK keeps them: in a relay, in its row of the database, in Flower?

As numbers that add up: what several relays counted is one more of the same.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

from catga_tasks.telemetry import DESTINATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from catga_tasks.telemetry import Measure, Measurement

#: So many series are kept apart by their queues; a name for each customer's queue must not grow a row without end.
MOST_SERIES = 2000
#: What a series' numbers are called: a counter's, a histogram's sum and its last bucket. Others have their bound.
COUNT, SUM, REST = "count", "sum", "+Inf"

Labels = tuple[tuple[str, str], ...]


class Tally:
    """What was measured so far: for each measure and set of labels its numbers. Not for several threads."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, Labels], dict[str, float]] = {}

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Count the measurements."""
        for measure, attributes, value in measurements:
            numbers = self._numbers(measure.name, attributes)
            if measure.bounds:
                numbers[_bucket(measure, value)] += 1
                numbers[SUM] += value
            else:
                numbers[COUNT] += value

    def merge(self, other: Tally) -> None:
        """Add what another one has counted."""
        for (name, labels), numbers in other._series.items():
            mine = self._numbers(name, dict(labels))
            for part, number in numbers.items():
                mine[part] += number

    def of(self, measure: Measure) -> list[tuple[dict[str, str], dict[str, float]]]:
        """Return the measure's series: their labels and numbers."""
        return [(dict(labels), numbers) for (name, labels), numbers in self._series.items() if name == measure.name]

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps([[name, dict(labels), numbers] for (name, labels), numbers in self._series.items()])

    @classmethod
    def load(cls, content: str | None) -> Tally:
        """Return what `dump` wrote; nothing was counted where it can't be read, for no relay may fail at it."""
        found = cls()
        try:
            for name, labels, numbers in json.loads(content or "[]"):
                if not {COUNT, SUM}.isdisjoint(numbers):
                    found._numbers(name, labels).update({part: float(number) for part, number in numbers.items()})
        except (ValueError, TypeError, AttributeError):
            return cls()
        return found

    def _numbers(self, name: str, attributes: Mapping[str, str]) -> dict[str, float]:
        key = (name, tuple(sorted(attributes.items())))
        if key not in self._series and len(self._series) >= MOST_SERIES:
            key = (name, tuple(label for label in key[1] if label[0] != DESTINATION))
        return self._series.setdefault(key, defaultdict(float))


def _bucket(measure: Measure, value: float) -> str:
    place = bisect_left(measure.bounds, value)
    return str(measure.bounds[place]) if place < len(measure.bounds) else REST
