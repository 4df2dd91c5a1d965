"""Relays that are killed, stopped and run side by side: nothing is lost, and only what was in hand is doubled."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest
from sqlalchemy import text

from tests.integration.relay_children import CLAIM, PUBLISH, REST, SETTLE, background, tell
from tests.waiting import wait_until

KILLS = 120
PHASES = {CLAIM: "claim", PUBLISH: "publish", SETTLE: "settle", REST: "rest"}


class Ledger:
    """What was committed and rolled back, against what the broker has."""

    def __init__(self, site):
        self._site = site
        self.committed: set[str] = set()
        self.rolled_back: set[str] = set()

    def produce(self, stopping, *, draw=None):
        draw = draw or random.Random(7)
        while not stopping.is_set():
            if draw.random() < 0.3:
                self.rolled_back.update(self._site.enqueue(draw.randint(1, 8), rollback=True))
            else:
                self.committed.update(self._site.enqueue(draw.randint(1, 12)))
            stopping.wait(0.005)

    def check(self) -> Counter:
        times = Counter(self._site.delivered())
        counts = Counter(
            committed=len(self.committed), delivered=len(times), rolled_back=len(self.rolled_back),
            doubled=sum(count - 1 for count in times.values()), lost=len(self.committed - set(times)),
            rolled_back_sent=len(self.rolled_back & set(times)), unknown=len(set(times) - self.committed),
            dead=len(self._site.dead()),
        )  # fmt: skip
        tell(dict(counts))
        assert counts["lost"] == counts["rolled_back_sent"] == counts["unknown"] == counts["dead"] == 0, counts
        assert self._site.pending() == 0
        return counts


def test_01_random_kills(site):
    """SIGKILLs at random points while enqueues are committed and rolled back."""
    draw, phases = random.Random(1), Counter()
    ledger = Ledger(site)
    file = site.directory / "phases"
    file.write_bytes(REST)
    settings = {"outbox_batch_size": 5, "outbox_max_attempts": 1000}
    with background(ledger.produce):
        for _ in range(KILLS):
            # One phase of its first batch is stretched, for the short ones would hardly ever be hit.
            point = draw.choice(("before_claim", "before_publish", "after_publish"))
            stretch = {"point": point, "do": "sleep", "seconds": draw.uniform(0, 0.04)}
            relay = site.relay(settings=settings, phases=str(file), at=stretch)
            fate = draw.random()
            if fate < 0.2:
                # The shortest phase, which a random moment hardly ever hits.
                wait_until(lambda: file.read_bytes() == SETTLE, what="the relay to settle", every=0)
            elif fate < 0.8:
                # From its first claim on; the others die while they start.
                wait_until(lambda: file.read_bytes() != REST, what="the relay to claim", every=0.001)
            time.sleep(0 if fate < 0.2 else draw.uniform(0, 0.06))
            relay.kill()
            phases[PHASES[file.read_bytes()]] += 1
            assert relay.code == -signal.SIGKILL
            file.write_bytes(REST)
    site.relay(settings=settings)
    site.drained()
    tell(dict(phases))
    counts = ledger.check()
    assert counts["committed"] > KILLS
    assert counts["rolled_back"] > KILLS
    assert counts["doubled"] <= KILLS * settings["outbox_batch_size"]
    assert set(phases) >= {"claim", "publish", "settle"}, phases


@pytest.mark.parametrize(
    ("point", "doubled"), [("before_claim", 0), ("before_publish", 0), ("after_publish", 20)], ids=lambda part: part
)
def test_01_kill_in_each_phase(site, point, doubled):
    """A relay that dies at a known point doubles its one batch if the broker had it, and nothing else."""
    ledger = Ledger(site)
    ledger.committed.update(site.enqueue(50))
    ledger.rolled_back.update(site.enqueue(10, rollback=True))
    relay = site.relay(at={"point": point, "do": "SIGKILL"})
    assert relay.wait() == -signal.SIGKILL
    assert len(site.delivered()) == doubled
    assert site.pending() == 50
    site.relay()
    site.drained()
    assert ledger.check()["doubled"] == doubled
    assert site.execute("SELECT row_ids FROM catga_outbox_journal") == []


def test_01_kills_in_each_phase_under_load(site):
    """Relay after relay dies at the same point; each one's batch is doubled at most once."""
    ledger = Ledger(site)
    settings = {"outbox_batch_size": 5, "outbox_max_attempts": 1000}
    deaths = 0
    with background(ledger.produce):
        for round_ in range(12):
            point = ("before_claim", "before_publish", "after_publish")[round_ % 3]
            relay = site.relay(settings=settings, at={"point": point, "do": "SIGKILL"})
            assert relay.wait() == -signal.SIGKILL
            deaths += point == "after_publish"
    site.relay(settings=settings)
    site.drained()
    assert ledger.check()["doubled"] <= deaths * settings["outbox_batch_size"]


@pytest.mark.parametrize("relays", [2, 3])
def test_07_side_by_side(site, relays):
    """Fresh, retried, suspected and long-claimed rows: each is published once."""
    ledger = Ledger(site)
    ledger.committed.update(site.insert(300))
    ledger.committed.update(site.insert(200, attempts=4, history='[{"attempt": 4, "at": "", "error": "was out"}]'))
    ledger.committed.update(site.insert(40, suspect=True))
    long_claimed = site.insert(30)
    ledger.committed.update(long_claimed)
    with site.engine.connect() as claim:
        claim.execute(text("SELECT id FROM catga_outbox WHERE task_id = ANY(:ids) FOR UPDATE"), {"ids": long_claimed})
        children = [site.relay(settings={"outbox_batch_size": 10}) for _ in range(relays)]
        with background(ledger.produce):
            wait_until(lambda: set(site.delivered()) >= ledger.committed - set(long_claimed), what="the free rows")
            wait_until(lambda: len(ledger.committed) > 900, what="fresh rows")
        assert set(site.delivered()).isdisjoint(long_claimed)
    site.drained()
    counts = ledger.check()
    assert counts["doubled"] == 0
    shares = [sum(event["rows"] for event in child.events("settled")) for child in children]
    tell(shares)
    assert sum(shares) == counts["committed"]
    assert all(shares), shares


def test_07_retried_by_two(site):
    """Rows that fail and come back are tried by one relay at a time: the attempts add up."""
    site.redis.set("wrong", "not a list")
    bad = site.insert(20, queue="wrong", routing_key="wrong")
    good = site.insert(100)
    for _ in range(2):
        site.relay(settings={"outbox_batch_size": 10, "outbox_max_attempts": 5})
    site.drained()
    assert sorted(site.delivered()) == sorted(good)
    assert {row.task_id: row.attempts for row in site.dead().values()} == dict.fromkeys(bad, 5)


@pytest.mark.parametrize("point", ["before_publish", "after_publish"])
def test_07_stopped_past_the_time_out(site, point):
    """SIGSTOP past the lease, SIGCONT: the late writes are refused, its one batch is doubled and nothing is lost."""
    ledger = Ledger(site)
    ledger.committed.update(site.enqueue(60))
    settings = {"outbox_lease_timeout": 1.0, "outbox_publish_timeout": 0.8, "outbox_batch_size": 20}
    stopped = site.relay(settings=settings, at={"point": point, "do": "SIGSTOP"})
    wait_until(stopped.stopped, what="the relay to stop itself")
    other = site.relay(settings=settings)
    wait_until(lambda: set(site.delivered()) == ledger.committed and site.pending() == 0, what="the other to deliver")
    stopped.signal(signal.SIGCONT)
    wait_until(lambda: "the database is out" in stopped.log(), what="the late write to be refused")
    assert stopped.events("settled") == []
    other.kill()
    ledger.committed.update(site.enqueue(30))
    site.drained()
    wait_until(lambda: stopped.events("settled"), what="the continued relay to work again")
    assert ledger.check()["doubled"] == 20


def test_12_sigterm_in_mid_batch(site):
    """The batch in hand is finished, the rest is left, and the exit code is 0."""
    ids = site.enqueue(50)
    relay = site.relay(at={"point": "after_publish", "do": "sleep", "seconds": 0.5})
    wait_until(lambda: relay.events("reached"), what="the batch to be in the broker")
    relay.signal(signal.SIGTERM)
    assert relay.wait(5) == 0
    assert len(site.delivered()) == 20
    assert site.pending() == 30
    assert site.execute("SELECT id FROM catga_relays WHERE id <> 'retired'") == []
    assert site.execute("SELECT id FROM catga_outbox_journal") == []
    site.relay()
    site.drained()
    assert sorted(site.delivered()) == sorted(ids)


def test_12_sigterm_while_the_broker_hangs(site, own_redis):
    """The batch is released within the publish time-out, unharmed."""
    broker = own_redis()
    site.broker_url = broker.url
    broker.pause()
    site.enqueue(5)
    relay = site.relay(settings={"outbox_publish_timeout": 1.0})
    wait_until(lambda: site.execute("SELECT id FROM catga_outbox_journal"), what="the batch to be in flight")
    relay.signal(signal.SIGTERM)
    started = time.monotonic()
    assert relay.wait(10) == 0
    assert time.monotonic() - started < 5
    assert site.execute("SELECT attempts, suspect FROM catga_outbox") == [(0, False)] * 5
    assert site.execute("SELECT id FROM catga_outbox_journal") == []


def test_12_sigterm_while_idle(site):
    """A relay that waits ends at once."""
    relay = site.relay(settings={"outbox_poll_interval_max": 30.0})
    wait_until(lambda: site.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"), what="the LISTEN")
    relay.signal(signal.SIGTERM)
    started = time.monotonic()
    assert relay.wait(5) == 0
    assert time.monotonic() - started < 2


def test_12_second_sigterm(site):
    """The second one doesn't wait for the batch, and loses nothing of it."""
    ids = site.enqueue(10)
    relay = site.relay(at={"point": "before_publish", "do": "sleep", "seconds": 30})
    wait_until(lambda: relay.events("reached"), what="the batch to be in hand")
    relay.signal(signal.SIGTERM)
    wait_until(lambda: _caught(relay.pid) == 0, what="the first SIGTERM to be taken")
    relay.signal(signal.SIGTERM)
    started = time.monotonic()
    assert relay.wait(5) == -signal.SIGTERM
    assert time.monotonic() - started < 2
    site.relay()
    site.drained()
    assert sorted(site.delivered()) == sorted(ids)


def _caught(pid: int) -> int:
    """Return whether the process has a handler for SIGTERM."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        mask = next(line for line in status if line.startswith("SigCgt")).split()[1]
    return int(mask, 16) >> (signal.SIGTERM - 1) & 1
