"""Back-off: exponential, capped, with full jitter."""

from __future__ import annotations

from catga_tasks import retry


def test_the_ceiling_doubles_up_to_its_cap():
    waits = [retry.ceiling(attempt, base=1.5, maximum=20) for attempt in (1, 2, 3, 4, 5, 6)]
    assert waits == [1.5, 3.0, 6.0, 12.0, 20, 20]


def test_thousands_of_attempts_do_not_overflow():
    assert retry.ceiling(100_000, base=1.0, maximum=600.0) == 600.0


def test_without_jitter_the_wait_is_the_ceiling():
    assert retry.delay(3, base=1, maximum=600, jitter=False) == 4


def test_jitter_fills_the_whole_range():
    waits = sorted(retry.delay(4, base=1, maximum=600) for _ in range(2000))
    assert waits[0] >= 0
    assert waits[-1] <= 8
    assert waits[100] < 1
    assert waits[-100] > 7
    assert 3.5 < sum(waits) / len(waits) < 4.5
