"""The shop's tables, and two that only the demo's audit reads: `deliveries` and `rolled_back`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from workers.app import DATABASE_URL

#: The shop's own engine: a transaction of it takes the tasks along, whichever engine the outbox has.
engine = create_engine(DATABASE_URL, pool_size=10)
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
    # Checked at COMMIT: an order can fail when everything is written, its task included.
    voucher: Mapped[str | None] = mapped_column(ForeignKey(Voucher.code, deferrable=True, initially="DEFERRED"))


class Payment(Base):
    """What was paid for an order: once, however often its task runs."""

    __tablename__ = "payments"
    order_id: Mapped[str] = mapped_column(ForeignKey(Order.id), primary_key=True)
    amount: Mapped[int]


class Receipt(Base):
    """The receipt of an order."""

    __tablename__ = "receipts"
    order_id: Mapped[str] = mapped_column(ForeignKey(Order.id), primary_key=True)


class StockMovement(Base):
    """What left the stock for an order."""

    __tablename__ = "stock_movements"
    order_id: Mapped[str] = mapped_column(ForeignKey(Order.id), primary_key=True)


class Delivery(Base):
    """One run of one task. No foreign key: a run for an order that doesn't exist must be seen."""

    __tablename__ = "deliveries"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    task: Mapped[str] = mapped_column(String(40))
    order_id: Mapped[str] = mapped_column(String(36))
    __table_args__ = (Index("deliveries_by_order", "order_id", "task"),)


class RolledBack(Base):
    """An order whose transaction was rolled back, noted by another one."""

    __tablename__ = "rolled_back"
    order_id: Mapped[str] = mapped_column(String(36), primary_key=True)


def create_tables() -> None:
    """Create the tables that are missing."""
    Base.metadata.create_all(engine)
