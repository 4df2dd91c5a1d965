"""The shop's tasks. Whatever is killed, each takes effect once: its writes commit with its entry in the inbox.

Some fail at first, after they have written: what they wrote must be gone when they come again.
"""

from __future__ import annotations

import zlib
from typing import Any

from sqlalchemy.exc import DBAPIError

from catga_tasks import current_session
from workers.app import app
from workers.models import Label, LoyaltyEntry, Payment, Pick, Receipt, Session, StockMovement

#: Seconds until a task that failed comes again.
AGAIN = 0.2


class NetworkDownError(Exception):
    """The bank doesn't answer."""


class NoMemberError(Exception):
    """The customer can't have points."""


def fails_at_first(task: Any, order_id: str) -> bool:
    """Return whether this is the first attempt of a task that is to fail once: one of four, always the same."""
    return task.request.retries == 0 and zlib.crc32(f"{task.name} {order_id}".encode()) % 4 == 0


@app.task(bind=True, delivery="effectively_once", autoretry_for=(NetworkDownError,), retry_kwargs={"countdown": AGAIN})
def charge(self: Any, order_id: str, amount: int) -> int:
    """Take the money; return how much."""
    self.session.add(Payment(order_id=order_id, amount=amount))
    self.session.flush()
    if fails_at_first(self, order_id):
        raise NetworkDownError
    return amount


@app.task(bind=True, delivery="effectively_once")
def send_receipt(self: Any, amount: int, order_id: str) -> None:
    """Write the receipt of what was charged."""
    self.session.add(Receipt(order_id=order_id, amount=amount))
    self.session.flush()
    if fails_at_first(self, order_id):
        raise self.retry(countdown=AGAIN)


@app.task(bind=True, delivery="effectively_once", autoretry_for=(NetworkDownError,), retry_kwargs={"countdown": AGAIN})
def pick(self: Any, order_id: str, item: int) -> int:
    """Take one of the goods off the shelf; return how many pieces."""
    self.session.add(Pick(order_id=order_id, item=item))
    self.session.flush()
    if item == 0 and fails_at_first(self, order_id):
        raise NetworkDownError
    return 1


@app.task(delivery="effectively_once")
def move_stock(pieces: list[int], order_id: str) -> None:
    """Book what was picked, all of it: the order is done."""
    current_session().add(StockMovement(order_id=order_id, quantity=sum(pieces)))


@app.task(delivery="effectively_once")
def award_points(order_id: str, *, member: bool) -> None:
    """Give points to a member."""
    session = current_session()
    session.add(LoyaltyEntry(order_id=order_id, kind="points"))
    session.flush()
    if not member:
        raise NoMemberError


@app.task(delivery="effectively_once")
def write_to_customer(order_id: str, kind: str) -> None:
    """Thank a member, or invite who isn't one."""
    current_session().add(LoyaltyEntry(order_id=order_id, kind=kind))


# Nobody gives back what such a task was at when its database went away: it has to ask for that itself.
@app.task(
    delivery="at_least_once", deduplicate=True, autoretry_for=(DBAPIError,), max_retries=None,
    retry_kwargs={"countdown": AGAIN},
)  # fmt: skip
def print_label(order_id: str) -> None:
    """Print a label: an effect outside the worker's transaction, here one of its own."""
    with Session.begin() as session:
        session.add(Label(order_id=order_id))
