"""Did every committed task run, and none of a transaction that was rolled back? Counted by the database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import exists, func, literal, or_, select, union_all

from workers.models import Delivery, Order, Payment, RolledBack

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the database says. Tasks are counted, except for `orders` and `rolled_back`."""

    orders: int
    committed: int
    delivered: int
    runs: int
    duplicates: int
    rolled_back: int
    #: Orders without a right to a task whose task ran all the same.
    sent: int

    @property
    def lost(self) -> int:
        """Tasks that were committed and never ran."""
        return self.committed - self.delivered

    @property
    def line(self) -> str:
        """The verdict in one line."""
        return (
            f"{self.committed} committed, {self.delivered} delivered, {self.lost} lost, "
            f"{self.rolled_back} rolled back, {self.sent} of them sent"
        )

    @property
    def status(self) -> int:
        """The demo's exit status."""
        return 1 if self.lost or self.sent else 0


def audit(session: Session) -> Audit:
    """Count, in one statement: on PostgreSQL that is one moment, while tasks go on."""
    # An order commits with its charge, a payment with the two tasks that follow it.
    committed = union_all(
        select(literal("charge").label("task"), Order.id.label("order_id")),
        select(literal("send_receipt"), Payment.order_id),
        select(literal("move_stock"), Payment.order_id),
    ).subquery()
    ran = exists().where(Delivery.task == committed.c.task, Delivery.order_id == committed.c.order_id)
    runs = select(func.count().label("runs")).select_from(Delivery).group_by(Delivery.task, Delivery.order_id)
    each = runs.subquery()
    unknown = ~exists().where(Order.id == Delivery.order_id)
    rolled_back = exists().where(RolledBack.order_id == Delivery.order_id)
    row = session.execute(
        select(
            select(func.count()).select_from(Order).scalar_subquery().label("orders"),
            select(func.count()).select_from(committed).scalar_subquery().label("committed"),
            select(func.count()).select_from(committed).where(ran).scalar_subquery().label("delivered"),
            select(func.count()).select_from(Delivery).scalar_subquery().label("runs"),
            select(func.coalesce(func.sum(each.c.runs - 1), 0)).scalar_subquery().label("duplicates"),
            select(func.count()).select_from(RolledBack).scalar_subquery().label("rolled_back"),
            select(func.count(Delivery.order_id.distinct()))
            .where(or_(unknown, rolled_back))
            .scalar_subquery()
            .label("sent"),
        )
    ).one()
    return Audit(**{name: int(value) for name, value in row._mapping.items()})
