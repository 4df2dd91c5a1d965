"""The shop's tables, and one that only the audit reads: `rolled_back`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer, String, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from workers.app import DATABASE_URL

#: The shop's own engine: a transaction of it takes the tasks along, whichever engine the outbox has.
engine = create_engine(DATABASE_URL, pool_size=10, pool_pre_ping=True)
Session = sessionmaker(engine)

if engine.dialect.name == "sqlite":

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        """Check foreign keys, let readers and the writer not wait for one another, and writers wait their turn."""
        for pragma in ("foreign_keys = ON", "journal_mode = WAL", "busy_timeout = 30000"):
            connection.execute(f"PRAGMA {pragma}")


class Base(DeclarativeBase):
    """The shop's tables."""


class Voucher(Base):
    """A voucher that exists."""

    __tablename__ = "vouchers"
    code: Mapped[str] = mapped_column(String(20), primary_key=True)


class Order(Base):
    """An order; amounts are cents."""

    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    amount: Mapped[int]
    #: How many different goods it is of.
    items: Mapped[int]
    #: Whether the customer who wants points is a member; None for who doesn't ask.
    member: Mapped[bool | None]
    #: Whether it goes by mail, and needs a label.
    mailed: Mapped[bool]
    # Checked at COMMIT: an order can fail when everything is written, its tasks included.
    voucher: Mapped[str | None] = mapped_column(ForeignKey(Voucher.code, deferrable=True, initially="DEFERRED"))


class Effect:
    """What a task did for an order.

    Nothing is unique, and nothing refers to the order: a double, or a task of an order that doesn't exist, must show.
    """

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    order_id: Mapped[str] = mapped_column(String(36), index=True)


class Payment(Effect, Base):
    """What was paid for an order."""

    __tablename__ = "payments"
    amount: Mapped[int]


class Receipt(Effect, Base):
    """The receipt of a payment."""

    __tablename__ = "receipts"
    amount: Mapped[int]


class Pick(Effect, Base):
    """One of an order's goods, taken off the shelf."""

    __tablename__ = "picks"
    item: Mapped[int]


class StockMovement(Effect, Base):
    """What left the stock for an order, which is done then."""

    __tablename__ = "stock_movements"
    quantity: Mapped[int]


class LoyaltyEntry(Effect, Base):
    """What a customer got: "points" and "thanks", or an "invitation"."""

    __tablename__ = "loyalty"
    kind: Mapped[str] = mapped_column(String(20))


class Label(Effect, Base):
    """A label out of the printer, which no transaction can take back: one at least for an order that is mailed."""

    __tablename__ = "labels"


class RolledBack(Base):
    """An order whose transaction was rolled back, noted by another one."""

    __tablename__ = "rolled_back"
    order_id: Mapped[str] = mapped_column(String(36), primary_key=True)


def create_tables() -> None:
    """Create the tables that are missing."""
    Base.metadata.create_all(engine)
