"""The faults of `make chaos` are drawn from the seed alone."""

from __future__ import annotations

from collections import Counter

from workers.schedule import KINDS, schedule


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
