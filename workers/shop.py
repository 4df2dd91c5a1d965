"""The shop's front: an order and the tasks that it needs, in one transaction.

`python -m workers.shop 100` creates the shop's tables and places orders, for example under Docker Compose.
"""

from __future__ import annotations

import random
import sys
import uuid
from typing import TYPE_CHECKING, NoReturn

from celery import chain, chord
from sqlalchemy.exc import IntegrityError

from workers.app import app
from workers.models import Order, RolledBack, Session, create_tables
from workers.tasks import award_points, charge, move_stock, pick, print_label, send_receipt, write_to_customer

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as OrmSession

#: The share of orders that are rolled back: by the shop, by the database at COMMIT, and in a savepoint.
FAILING = 0.15
#: As many effects do the tasks of an order have, about, those that fail among them.
EFFECTS = 5.5
#: The fewest and the most goods of an order.
ITEMS = (2, 3)


class OutOfStockError(Exception):
    """The shop finds out after it wrote the order and enqueued its tasks."""


def draw_order(lots: random.Random) -> Order:
    """Return an order, the same for the same lots."""
    return Order(
        id=str(uuid.UUID(int=lots.getrandbits(128), version=4)),
        amount=lots.randint(100, 20_000),
        items=lots.randint(*ITEMS),
        member=lots.choice((True, False, None, None, None, None)),
        mailed=lots.random() < 1 / 4,
    )


def place_order(session: OrmSession, order: Order) -> None:
    """Add an order and enqueue its tasks; all of that happens when the caller commits, or nothing of it."""
    session.add(order)
    with app.outbox.join(session):
        chain(charge.s(order.id, order.amount), send_receipt.s(order.id)).delay()
        chord([pick.s(order.id, item) for item in range(order.items)], move_stock.s(order.id)).delay()
        if order.member is not None:
            award_points.apply_async(
                (order.id,),
                {"member": order.member},
                link=write_to_customer.si(order.id, "thanks"),
                link_error=write_to_customer.si(order.id, "invitation"),
            )
        if order.mailed:
            print_label.delay(order.id)


def place_or_fail(lots: random.Random) -> bool:
    """Place an order that fails at times; return whether it was committed. A failed one is noted by its id."""
    order, fate = draw_order(lots), lots.random()
    order_id = order.id
    try:
        with Session.begin() as session:
            if fate < FAILING / 3:
                # The database itself refuses this one, at COMMIT: its messages are in the outbox by then.
                order.voucher = "NO-SUCH"
            place_order(session, order)
            session.flush()
            if FAILING / 3 <= fate < 2 * FAILING / 3:
                _take_off_the_shelf(order_id)
            if 2 * FAILING / 3 <= fate < FAILING:
                _fail_in_a_savepoint(session, draw_order(lots))
    except (OutOfStockError, IntegrityError):
        with Session.begin() as session:
            session.add(RolledBack(order_id=order_id))
        return False
    return True


def _fail_in_a_savepoint(session: OrmSession, other: Order) -> None:
    """Take back a second order of the same customer, and keep the first."""
    order_id = other.id
    savepoint = session.begin_nested()
    place_order(session, other)
    savepoint.rollback()
    session.add(RolledBack(order_id=order_id))


def _take_off_the_shelf(order_id: str) -> NoReturn:
    raise OutOfStockError(order_id)


if __name__ == "__main__":
    create_tables()
    luck = random.Random()
    print(sum(place_or_fail(luck) for _ in range(int(sys.argv[1]))), "orders placed")
