"""Counters and histograms that add up, and that nothing in the database can break."""

from __future__ import annotations

import pytest

from catga_tasks import tallies
from catga_tasks.tallies import Tally
from catga_tasks.telemetry import PUBLISH, SENT, sending


def test_what_several_counted_is_one_of_the_same():
    """A tally that was stored and added to another has the sum of both, and knows its buckets again."""
    one, other = Tally(), Tally()
    one.add(sending("nats", {"celery": 3}, 0.004))
    other.add(sending("nats", {"celery": 2, "mails": 1}, 0.02))
    other.add(sending("nats", {"celery": 1}, 99.0))
    one.merge(Tally.load(other.dump()))
    sent = {labels["messaging.destination.name"]: numbers["count"] for labels, numbers in one.of(SENT)}
    assert sent == {"celery": 6, "mails": 1}
    seconds = {labels.get("messaging.destination.name"): dict(numbers) for labels, numbers in one.of(PUBLISH)}
    assert seconds == {
        "celery": {"0.005": 1, "+Inf": 1, "sum": pytest.approx(99.004)},
        None: {"0.025": 1, "sum": 0.02},
    }


@pytest.mark.parametrize("content", [None, "", "{", "7", "[1]", '[["a", {}, {"count": "x"}]]', '[["a", [], {}]]'])
def test_what_cannot_be_read_counts_nothing(content):
    """Whatever stands in the database, a relay's heartbeat doesn't fail at it."""
    assert Tally.load(content).dump() == "[]"


def test_a_name_for_each_customers_queue(monkeypatch):
    """Queues without number end in one series, which loses no message."""
    monkeypatch.setattr(tallies, "MOST_SERIES", 10)
    tally = Tally()
    for number in range(100):
        tally.add(sending("nats", {f"customer-{number}": 2}, 0.01))
    series = tally.of(SENT)
    assert len(series) < 10
    assert sum(numbers["count"] for _, numbers in series) == 200
