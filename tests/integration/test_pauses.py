"""A paused queue waits in the outbox, and no other queue waits for it."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from catga_tasks import Catga, pauses
from catga_tasks.claims import Claims
from catga_tasks.config import Settings
from tests.waiting import wait_until


def test_a_running_relay_leaves_a_paused_queue_alone(site):
    """A relay that runs takes up a pause and a resume by itself; the rows of other queues go out meanwhile."""
    relay = site.relay()
    wait_until(lambda: site.execute("SELECT 1 FROM catga_relays WHERE id <> 'retired'"), what="the relay's heartbeat")
    with site.engine.begin() as connection:
        assert pauses.pause(connection, "", "mails", "alice")

    def waits():
        """A relay that hasn't looked yet sends both; one that has, the second alone."""
        sent = site.enqueue(1, queue="mails")
        marker = site.enqueue(1)
        wait_until(lambda: marker[0] in site.delivered(), what="the queue that goes on")
        return sent[0] not in site.delivered("mails")

    wait_until(waits, deadline=10, what="the pause")
    before = len(site.delivered("mails"))
    site.enqueue(3, queue="mails")
    others = site.enqueue(20, queue="other")
    wait_until(lambda: sorted(site.delivered("other")) == sorted(others), what="the other queue")
    assert site.pending() == 4
    assert len(site.delivered("mails")) == before
    with site.engine.begin() as connection:
        assert pauses.resume(connection, "", "mails")
    site.app.outbox.wake()
    site.drained()
    assert len(site.delivered("mails")) == before + 4
    assert not relay.exited()


@pytest.fixture
def shop(engine):
    app = Catga("shop", broker="memory://", outbox=engine, set_as_current=False)

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    return charge


def taken(claims):
    """The queues of everything that can be claimed, in the order of the batches."""
    found = []
    while rows := claims.take():
        found.append(sorted({row.envelope.queue for row in rows}))
        claims.settle(rows, [])
    return found


def test_queues_take_turns_while_one_is_paused(engine, shop):
    """With a pause each queue is claimed from by itself, in turns, suspects too; what is paused isn't due either."""
    for queue in ("a", "b", "c"):
        for order in range(4):
            shop.apply_async((order,), queue=queue)
    with engine.begin() as connection:
        pauses.pause(connection, "", "b", "alice")
        pauses.pause(connection, "elsewhere", "a", "alice")
        connection.execute(text("UPDATE catga_outbox SET suspect = :yes WHERE id IN (1, 5)"), {"yes": True})
    claims = Claims(engine, Settings(outbox_batch_size=2), relay="test")
    found = taken(claims)
    assert {queue for batch in found for queue in batch} == {"a", "c"}
    assert found[0] != found[1]
    assert [queue for batch in found for queue in batch].count("a") == 3  # a suspect, and two batches of the rest
    assert claims.next_due() is None
    claims.farewell()
    named = Claims(engine, Settings(), relay="other", queues=["b"])
    assert taken(named) == []
    with engine.begin() as connection:
        assert pauses.resume(connection, "", "b")
        assert not pauses.resume(connection, "", "b")
    named.farewell()
    assert {queue for batch in taken(Claims(engine, Settings(), relay="third")) for queue in batch} == {"b"}
