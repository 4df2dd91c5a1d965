"""The shop's audit counts what is lost, doubled, wrong or sent without a right, and its status says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sqlalchemy import create_engine, delete, update
from sqlalchemy.orm import Session

from tests.processes import ROOT
from workers.audit import audit
from workers.models import (
    Base,
    Label,
    LoyaltyEntry,
    Order,
    Payment,
    Pick,
    Receipt,
    RolledBack,
    StockMovement,
)

EFFECTS = (Payment, Receipt, Pick, StockMovement, LoyaltyEntry, Label)
GOOD = "21 committed, 21 delivered, 0 lost, 1 rolled back, 0 of them sent, 0 doubled"


@pytest.fixture
def engine(database_url):
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine):
    """A shop with three orders, whose tasks have all run, and one that was rolled back."""
    with Session(engine) as session:
        for order_id, member in (("one", True), ("two", False), ("three", None)):
            session.add(Order(id=order_id, amount=100, items=2, member=member, mailed=True))
            session.add_all([Payment(order_id=order_id, amount=100), Receipt(order_id=order_id, amount=100)])
            session.add_all(Pick(order_id=order_id, item=item) for item in range(2))
            session.add_all([StockMovement(order_id=order_id, quantity=2), Label(order_id=order_id)])
        kinds = (("one", "points"), ("one", "thanks"), ("two", "invitation"))
        session.add_all(LoyaltyEntry(order_id=order_id, kind=kind) for order_id, kind in kinds)
        session.add(RolledBack(order_id="bad"))
        session.commit()
        yield session


def test_a_good_shop(session):
    """Three orders with all their effects are good."""
    count = audit(session)
    assert (count.line, count.status, count.missing) == (GOOD, 0, {})


def lose(kind):
    def spoil(session):
        """One effect is gone, and a second one of another order doesn't make up for it."""
        some = session.query(kind).filter_by(order_id="two").first()
        session.execute(delete(kind).where(kind.id == some.id))
        session.add(Payment(order_id="one", amount=100))

    return spoil


def add(effect, order_id, **values):
    return lambda session: session.add(effect(order_id=order_id, **values))


def change(kind, **values):
    return lambda session: session.execute(update(kind).where(kind.order_id == "one").values(**values))


#: What is done to the good shop, and the numbers that must show it, besides status 1.
SPOILED = [
    *((lose(kind), {"lost": 1, "delivered": 20, "doubled": 1}) for kind in EFFECTS),
    (add(Payment, "one", amount=100), {"doubled": 1, "lost": 0}),
    (add(Receipt, "one", amount=100), {"doubled": 1, "lost": 0}),
    (add(Pick, "one", item=1), {"doubled": 1, "lost": 0}),
    (add(StockMovement, "one", quantity=2), {"doubled": 1, "lost": 0}),
    (add(LoyaltyEntry, "one", kind="thanks"), {"doubled": 1, "lost": 0}),
    # Effects of tasks that had no right to run.
    (add(Payment, "bad", amount=100), {"sent": 1, "lost": 0}),
    (add(Payment, "unheard-of", amount=100), {"sent": 1, "lost": 0}),
    # What a task should not have written.
    (change(Receipt, amount=99), {"wrong": 1, "lost": 0}),
    (change(StockMovement, quantity=3), {"wrong": 1, "lost": 0}),
    (add(LoyaltyEntry, "two", kind="points"), {"wrong": 1, "doubled": 0}),
    (add(Pick, "two", item=2), {"wrong": 1, "doubled": 0}),
]


def test_whatever_is_wrong_is_seen(session):
    """Each loss, double, wrong value and task without a right shows in its number and in the status."""
    for number, (spoil, expected) in enumerate(SPOILED):
        with session.begin_nested() as savepoint:
            spoil(session)
            session.flush()
            count = audit(session)
            savepoint.rollback()
        assert {name: getattr(count, name) for name in expected} == expected, number
        assert count.status == 1, number
    assert audit(session).line == GOOD


def test_a_label_may_be_printed_again(session):
    """At least once is all that a printer can be promised."""
    session.add_all(Label(order_id="one") for _ in range(2))
    count = audit(session)
    assert (count.reprinted, count.doubled, count.status) == (2, 0, 0)


def test_the_command_ends_with_status_1(session, engine):
    """`python -m workers.audit` says what is missing, and fails."""
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "workers.audit"]
    environment = {**os.environ, "SHOP_DATABASE_URL": url}

    def run():
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    good = run()
    assert (good.returncode, good.stdout) == (0, GOOD + "\n"), good.stderr
    session.execute(delete(StockMovement).where(StockMovement.order_id == "two"))
    session.commit()
    bad = run()
    assert bad.returncode == 1, bad.stderr
    assert bad.stdout.startswith("stock movement: 1 missing\n21 committed, 20 delivered, 1 lost")
