"""Did every committed task take effect once, and none of a transaction that was rolled back? Counted by the database.

`python -m workers.audit` asks the database of SHOP_DATABASE_URL, and ends with status 1 if that isn't so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import String, and_, cast, func, literal, or_, select, union_all

from workers.models import Label, LoyaltyEntry, Order, Payment, Pick, Receipt, RolledBack, Session, StockMovement

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select, Subquery
    from sqlalchemy.orm import Session as OrmSession

#: The goods of the largest order.
MOST_ITEMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the database says. Tasks are counted by their effects, except for `orders`, `rolled_back` and `sent`."""

    orders: int
    committed: int
    delivered: int
    #: Effects beyond the first.
    doubled: int
    #: Effects that no task should have had: a wrong amount, a failed task's writes.
    wrong: int
    #: Labels beyond the first. They are printed at least once, and that is all that can be promised of a printer.
    reprinted: int
    rolled_back: int
    #: Orders without a right to a task that had an effect all the same.
    sent: int
    #: Tasks that were committed and had no effect, by their names.
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Tasks that were committed and had no effect."""
        return self.committed - self.delivered

    @property
    def line(self) -> str:
        """The verdict in one line."""
        return (
            f"{self.committed} committed, {self.delivered} delivered, {self.lost} lost, "
            f"{self.rolled_back} rolled back, {self.sent} of them sent, {self.doubled} doubled"
        )

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self.lost or self.sent or self.doubled or self.wrong else 0


def audit(session: OrmSession) -> Audit:
    """Count, in one statement for all numbers: on PostgreSQL that is one moment, while tasks go on."""
    due, done = _due().subquery(), _done().subquery()
    rows = func.count().label("rows")
    least, most = func.min(done.c.value).label("least"), func.max(done.c.value).label("most")
    kinds = select(done.c.effect, done.c.order_id, rows, least, most).group_by(done.c.effect, done.c.order_id)
    each = kinds.subquery()
    same = and_(due.c.effect == each.c.effect, due.c.order_id == each.c.order_id)
    met = due.outerjoin(each, same)
    is_label = each.c.effect == "label"
    known = Order.id == each.c.order_id
    odd = or_(each.c.least != due.c.value, each.c.most != due.c.value)
    numbers = {
        "orders": select(func.count()).select_from(Order),
        "committed": select(func.count()).select_from(due),
        "delivered": select(func.count(each.c.rows)).select_from(met),
        "doubled": select(func.coalesce(func.sum(each.c.rows - 1), 0)).where(~is_label),
        "reprinted": select(func.coalesce(func.sum(each.c.rows - 1), 0)).where(is_label),
        "wrong": select(func.count())
        .select_from(each.join(Order, known).outerjoin(due, same))
        .where(or_(due.c.effect.is_(None), odd)),
        "rolled_back": select(func.count()).select_from(RolledBack),
        "sent": _sent(each),
    }
    row = session.execute(select(*(number.scalar_subquery().label(name) for name, number in numbers.items()))).one()
    missing = select(due.c.effect, func.count()).select_from(met).where(each.c.rows.is_(None)).group_by(due.c.effect)
    found = {effect: int(count) for effect, count in session.execute(missing)}
    return Audit(**{name: int(value) for name, value in row._mapping.items()}, missing=found)


def _due() -> Any:
    """Return the effects that a committed order has to have: effect, order and value."""
    wanted: list[Select[Any]] = [
        _effect("payment", Order.id, Order.amount),
        _effect("receipt", Order.id, Order.amount),
        _effect("stock movement", Order.id, Order.items),
        *(_effect(f"pick {item}", Order.id, literal(item)).where(Order.items > item) for item in range(MOST_ITEMS)),
        *(_effect(kind, Order.id, literal(0)).where(Order.member.is_(True)) for kind in ("points", "thanks")),
        _effect("invitation", Order.id, literal(0)).where(Order.member.is_(False)),
        _effect("label", Order.id, literal(0)).where(Order.mailed),
    ]
    return union_all(*wanted)


def _done() -> Any:
    """Return the effects that there are, in the same form."""
    return union_all(
        _effect("payment", Payment.order_id, Payment.amount),
        _effect("receipt", Receipt.order_id, Receipt.amount),
        _effect("stock movement", StockMovement.order_id, StockMovement.quantity),
        _effect(literal("pick ") + cast(Pick.item, String), Pick.order_id, Pick.item),
        _effect(LoyaltyEntry.kind, LoyaltyEntry.order_id, literal(0)),
        _effect("label", Label.order_id, literal(0)),
    )


def _effect(effect: Any, order_id: Any, value: Any) -> Select[Any]:
    named: ColumnElement[str] = cast(literal(effect) if isinstance(effect, str) else effect, String)
    return select(named.label("effect"), order_id.label("order_id"), value.label("value"))


def _sent(each: Subquery) -> Select[Any]:
    return (
        select(func.count(each.c.order_id.distinct()))
        .select_from(
            each.outerjoin(Order, Order.id == each.c.order_id).outerjoin(
                RolledBack, RolledBack.order_id == each.c.order_id
            )
        )
        .where(or_(Order.id.is_(None), RolledBack.order_id.is_not(None)))
    )


if __name__ == "__main__":
    with Session() as shop:
        count = audit(shop)
    for name, number in sorted(count.missing.items()):
        print(f"{name}: {number} missing")
    print(count.line)
    sys.exit(count.status)
