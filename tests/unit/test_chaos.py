"""`make chaos`: its faults are drawn from the seed alone, and anything but zeros at the end fails it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from workers.schedule import KINDS, schedule
from workers.trial import Outcome


def test_the_same_seed_gives_the_same_schedule():
    assert schedule(7, 1000) == schedule(7, 1000)
    assert schedule(7, 1000) != schedule(8, 1000)


def test_a_short_schedule_has_every_kind():
    plan = schedule(7, len(KINDS))
    assert Counter(fault.kind for fault in plan) == dict.fromkeys(KINDS, 1)


def test_a_long_schedule_keeps_to_the_weights():
    found = Counter(fault.kind for fault in schedule(7, 1000))
    assert found.total() == 1000
    assert all(0.5 * weight <= found[kind] / 10 <= 2 * weight for kind, weight in KINDS.items())


def test_anything_but_zeros_fails():
    """A trial fails by a number of its verdict, and by a problem that ended it."""
    good = Outcome("nats", faults={}, counts={"Faults": 0}, verdict={"Lost": 0, "Doubled": 0}, missing={})
    assert not good.failed
    assert replace(good, verdict={"Lost": 0, "Doubled": 1}).failed
    assert replace(good, problem="nothing was delivered").failed
