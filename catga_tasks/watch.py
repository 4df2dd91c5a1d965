"""How can many look at the outbox, once a second, without costing the relays anything?

What is cheap is asked once a second at most, whoever asks. Counting rows takes at most a hundredth of the time: with a
million of them the numbers are some seconds old, and say so. Counters are sampled for the rates of the last minutes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from catga_tasks import browse

if TYPE_CHECKING:
    from sqlalchemy import Connection

SAMPLE_SECONDS = 5.0
#: How far back the rates go, in seconds.
PAST_SECONDS = 600.0
#: A rate is taken over so many samples: relays say every 5 seconds how much they have published.
_WINDOW = 6
_LIVE_SECONDS = 0.9
#: Counting may take one part in so many of the time.
_COUNT_SHARE = 100


class Sample(NamedTuple):
    """The counters at a moment of the database's clock."""

    at: float
    enqueued: int
    published: int


class Watch:
    """What is known of one outbox. Its methods may be called by several threads."""

    def __init__(self) -> None:
        self._asking, self._counting = threading.Lock(), threading.Lock()
        self._live: dict[str, Any] = {}
        self._live_until = 0.0
        self._counts: list[dict[str, Any]] | None = None
        self._counted_at = 0.0
        self._next_count = 0.0
        self._samples: deque[Sample] = deque(maxlen=int(PAST_SECONDS / SAMPLE_SECONDS) + 1)

    def live(self, connection: Connection) -> dict[str, Any]:
        """Return `browse.live`, up to a second old."""
        with self._asking:
            if time.monotonic() >= self._live_until:
                self._live = browse.live(connection)
                self._live_until = time.monotonic() + _LIVE_SECONDS
            return self._live

    def sample(self, connection: Connection) -> None:
        """Take down the counters; to be called every `SAMPLE_SECONDS`."""
        live = self.live(connection)
        self._samples.append(Sample(live["at"], live["enqueued"], live["published"]))

    def count(self, connection: Connection) -> None:
        """Count the rows, unless it is too early or somebody is at it."""
        if time.monotonic() < self._next_count or not self._counting.acquire(blocking=False):
            return
        try:
            started = time.monotonic()
            self._counts = browse.counts(connection)
            self._counted_at = time.monotonic()
            self._next_count = self._counted_at + max(_LIVE_SECONDS, _COUNT_SHARE * (self._counted_at - started))
        finally:
            self._counting.release()

    def changed(self) -> None:
        """Ask afresh next time: somebody changed something by hand and wants to see it."""
        self._live_until = self._next_count = 0.0

    def counted(self) -> dict[str, Any]:
        """Return the counts by queue and in all, and how old they are in seconds; None before the first count."""
        queues = self._counts
        if queues is None:
            return {**dict.fromkeys(browse.STATES), "queues": [], "counted_seconds_ago": None}
        totals = {state: sum(queue[state] for queue in queues) for state in browse.STATES}
        return {**totals, "queues": queues, "counted_seconds_ago": round(time.monotonic() - self._counted_at, 1)}

    def rates(self) -> list[dict[str, float]]:
        """Return messages a second, enqueued and published, at each moment of the last minutes."""
        samples = list(self._samples)
        found = []
        for place in range(1, len(samples)):
            now, then = samples[place], samples[max(0, place - _WINDOW)]
            if (passed := now.at - then.at) > 0:
                enqueued, published = (max(0, new - old) / passed for new, old in zip(now[1:], then[1:], strict=True))
                found.append({"at": now.at, "enqueued": round(enqueued, 2), "published": round(published, 2)})
        return found
