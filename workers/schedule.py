"""What goes wrong, to whom and when? Drawn from the seed alone: the same seed gives the same schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass

#: What may go wrong, and how often beside the others. A restart is a SIGKILL (PostgreSQL's own is SIGQUIT, its
#: "immediate shutdown") and a start on the same data.
KINDS = {
    "SIGKILL to a pool child": 24,
    "SIGTERM to a pool child": 6,
    "SIGSTOP to a pool child": 10,
    "SIGKILL to a worker": 5,
    "SIGKILL to a worker and its pool": 5,
    "SIGTERM to a worker": 6,
    "SIGSTOP to a worker": 5,
    "SIGSTOP to a worker and its pool": 4,
    "SIGKILL to a relay": 7,
    "SIGTERM to a relay": 4,
    "SIGSTOP to a relay": 6,
    "cut: workers from the database": 4,
    "cut: relays from the database": 4,
    "cut: all from the broker": 4,
    "restart of the broker": 3,
    "restart of the database": 3,
}
#: Deliveries from one fault to the next.
GAPS = (1, 24)
#: Seconds that somebody is stopped: up to three times the time after which others get the work.
STOPS = (0.5, 7.0)
#: Seconds that a server is away.
AWAY = (0.0, 2.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: it comes `after` so many deliveries since the one before."""

    kind: str
    after: int
    #: Who of those that live then: the one at this number, counted round.
    whom: int
    #: How long it lasts, if it does.
    seconds: float


def schedule(seed: int, faults: int) -> list[Fault]:
    """Return so many faults, each kind about as often as its weight says, and each at least once if there is room."""
    lots = random.Random(seed)
    kinds = list(KINDS)
    chosen = kinds[:faults] + lots.choices(kinds, list(KINDS.values()), k=max(0, faults - len(kinds)))
    lots.shuffle(chosen)
    return [_draw(kind, lots) for kind in chosen]


def _draw(kind: str, lots: random.Random) -> Fault:
    span = AWAY if kind.startswith("restart") else STOPS
    return Fault(kind, after=lots.randint(*GAPS), whom=lots.randrange(1000), seconds=round(lots.uniform(*span), 2))
