"""The shop's front: an order and the task that charges it, in one transaction.

`python -m workers.shop 100` creates the shop's tables and places orders, for example under Docker Compose.
"""

from __future__ import annotations

import random
import sys
import uuid
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy.exc import IntegrityError

from workers.app import app
from workers.models import Order, RolledBack, Session, create_tables
from workers.tasks import charge

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as OrmSession

#: The share of orders that are rolled back.
FAILING = 0.1


class OutOfStockError(Exception):
    """The shop finds out after it wrote the order and enqueued its task."""


def place_order(session: OrmSession, order_id: str, amount: int, voucher: str | None = None) -> Order:
    """Add an order and enqueue its task; both happen when the caller commits, or neither does."""
    order = Order(id=order_id, amount=amount, voucher=voucher)
    session.add(order)
    with app.outbox.join(session):
        charge.delay(order.id)
    return order


def place_or_fail(lots: random.Random) -> bool:
    """Place an order that fails at times; return whether it was committed. A failed one is noted by its id."""
    order_id = str(uuid.UUID(int=lots.getrandbits(128), version=4))
    fate = lots.random()
    try:
        with Session.begin() as session:
            if fate < FAILING / 2:
                place_order(session, order_id, lots.randint(100, 20_000))
                session.flush()
                _take_off_the_shelf(order_id)
            # The database itself refuses this one, at COMMIT: its message is in the outbox by then.
            voucher = "NO-SUCH" if fate < FAILING else None
            place_order(session, order_id, lots.randint(100, 20_000), voucher)
    except (OutOfStockError, IntegrityError):
        with Session.begin() as session:
            session.add(RolledBack(order_id=order_id))
        return False
    return True


def _take_off_the_shelf(order_id: str) -> NoReturn:
    raise OutOfStockError(order_id)


if __name__ == "__main__":
    create_tables()
    luck = random.Random()
    print(sum(place_or_fail(luck) for _ in range(int(sys.argv[1]))), "orders placed")
