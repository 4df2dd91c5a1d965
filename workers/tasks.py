"""The shop's tasks. Each may run more than once (at least once is what Celery gives), and takes effect once."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from workers.app import app
from workers.models import Delivery, Order, Payment, Receipt, Session, StockMovement, engine

insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert


@app.task
def charge(order_id: str) -> None:
    """Take the money; the payment and the two tasks that follow it commit together."""
    with Session.begin() as session, app.outbox.join(session):
        session.add(Delivery(task="charge", order_id=order_id))
        order = select(Order.id, Order.amount).where(Order.id == order_id)
        payment = insert(Payment).from_select(["order_id", "amount"], order).on_conflict_do_nothing()
        # Nothing comes back for an order that was paid before, or doesn't exist.
        if session.scalar(payment.returning(Payment.order_id)):
            send_receipt.delay(order_id)
            move_stock.delay(order_id)


@app.task
def send_receipt(order_id: str) -> None:
    """Write the receipt."""
    with Session.begin() as session:
        session.add(Delivery(task="send_receipt", order_id=order_id))
        session.execute(insert(Receipt).values(order_id=order_id).on_conflict_do_nothing())


@app.task
def move_stock(order_id: str) -> None:
    """Take the goods off the shelf."""
    with Session.begin() as session:
        session.add(Delivery(task="move_stock", order_id=order_id))
        session.execute(insert(StockMovement).values(order_id=order_id).on_conflict_do_nothing())
