"""How users call us, checked by mypy: what should type-check does, and what shouldn't is marked so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from catga_tasks import Catga, CatgaError, ConfigurationError, MigrationRequired, current_session
from catga_tasks.enqueue import Outbox
from catga_tasks.relay import Relay

engine = create_engine("sqlite://")
sessions = sessionmaker(engine)

app = Catga("shop", broker="redis://127.0.0.1:6379/0", outbox="sqlite://")
by_engine = Catga("shop", outbox=engine)
by_sessions = Catga("shop", outbox=sessions)
wrong = Catga("shop", outbox=3)  # type: ignore[arg-type]

assert_type(app.outbox, Outbox)
assert_type(app.outbox.engine, Engine)
assert_type(app.relay(queues=["fast"], batch_size=100), Relay)


def joins(session: Session, asynchronous: AsyncSession, connection: Connection, other: AsyncConnection) -> None:
    """Four kinds of transaction can be joined."""
    with app.outbox.join(session), app.outbox.join(asynchronous), app.outbox.join(connection), app.outbox.join(other):
        pass
    with app.outbox.join(engine):  # type: ignore[arg-type]
        pass


def tracks(plain: sessionmaker[Session], scoped: scoped_session[Session], others: async_sessionmaker[Any]) -> None:
    """Three kinds of maker can be tracked."""
    app.outbox.track(plain)
    app.outbox.track(scoped)
    app.outbox.track(others)
    app.outbox.track(engine)  # type: ignore[arg-type]


@app.task(delivery="effectively_once")
def charge(order: int) -> int:
    """A task's own transaction is a session's."""
    assert_type(current_session(), Session)
    return order


def errors(error: CatgaError) -> Sequence[type[ConfigurationError]]:
    """A missing migration is a mistake of configuration."""
    assert_type(error, CatgaError)
    return [MigrationRequired]
