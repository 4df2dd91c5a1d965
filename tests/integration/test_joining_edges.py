"""Where a transaction's commit is least plain: flushes, listeners, open savepoints, failures (scenarios 14 and 15)."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import nullcontext, suppress

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, func, insert, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session, registry, sessionmaker

from catga_tasks import Catga, MigrationRequired
from catga_tasks.tables import outbox

metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))


class Order:
    """What the application's own code maps to a table."""

    def __init__(self, id: int) -> None:  # noqa: A002 - the column's name
        self.id = id


registry().map_imperatively(Order, orders)


@pytest.fixture
def app(engine):
    metadata.create_all(engine)
    app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox=engine, set_as_current=False)

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    @app.task(name="ship", shared=False, key="parcels")
    def ship(order):
        return order

    app.finalize()
    return app


def stored(engine) -> list[int]:
    """The argument of every message in the outbox, in the order of their ids."""
    with engine.connect() as connection:
        found = connection.execute(select(outbox.c.body).order_by(outbox.c.id)).scalars()
        return [int(bytes(body).split(b"[[")[1].split(b"]")[0]) for body in found]


def count(engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(orders)).scalar_one()


@pytest.mark.parametrize("name", ["charge", "ship"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_flush_of_the_commit_may_enqueue(app, engine, name, earlier):
    """What a mapper's event enqueues in the last flush commits, whether or not something was enqueued before."""

    def enqueue(_mapper, _connection, order):
        app.tasks[name].delay(order.id)

    event.listen(Order, "after_insert", enqueue)
    try:
        with Session(engine) as session, app.outbox.join(session):
            if earlier:
                app.tasks["charge"].delay(1)
            session.add(Order(2))
            session.commit()
    finally:
        event.remove(Order, "after_insert", enqueue)
    assert stored(engine) == ([1, 2] if earlier else [2])


def test_a_listener_of_the_commit_may_enqueue(app, engine):
    """A listener before the commit enqueues in the transaction, one after it by itself; neither is lost."""
    charge, seen = app.tasks["charge"], []
    sessions = sessionmaker(engine)
    event.listen(sessions, "before_commit", lambda session: charge.delay(1))
    event.listen(sessions, "after_commit", lambda session: (seen.append(stored(engine)), charge.delay(2)))
    with sessions() as session, app.outbox.join(session):
        session.execute(insert(orders).values(id=1))
        session.commit()
        session.execute(insert(orders).values(id=2))
        session.rollback()
    assert seen == [[1]]
    assert stored(engine) == [1, 2]


def test_14_a_savepoint_that_is_left_open_commits_with_the_rest(app, engine):
    """SQLAlchemy releases open savepoints at the commit; their messages, and those before them, are not lost."""
    charge = app.tasks["charge"]
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        charge.delay(1)
        session.begin_nested()
        session.add(Order(1))
        charge.delay(2)
        with session.begin_nested() as inner:
            charge.delay(3)
            inner.rollback()
        session.begin_nested()
    assert stored(engine) == [1, 2]
    assert count(engine) == 1


@pytest.mark.parametrize("kind", ["session", "connection", "block"])
def test_15_a_commit_without_its_messages_cant_be_repeated(app, engine, kind):
    """If the messages can't be written, a second commit doesn't go through without them, nor does the pool's next."""
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE catga_outbox RENAME TO away"))
    if kind == "block":
        with pytest.raises(MigrationRequired), engine.begin() as connection, app.outbox.join(connection):
            connection.execute(insert(orders).values(id=1))
            app.tasks["charge"].delay(1)
    else:
        with Session(engine) if kind == "session" else engine.connect() as joined, app.outbox.join(joined):
            joined.execute(insert(orders).values(id=1))
            app.tasks["charge"].delay(1)
            with pytest.raises(MigrationRequired):
                joined.commit()
            with pytest.raises(PendingRollbackError, match="roll"):
                joined.commit()
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO catga_outbox"))
    assert (count(engine), stored(engine)) == (0, [])
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        app.tasks["charge"].delay(2)
    assert stored(engine) == [2]


@pytest.mark.parametrize("kind", [Session, None], ids=["session", "connection"])
def test_what_began_in_a_block_enqueues_by_itself_after_it(app, engine, kind):
    """An asyncio task that outlives the block it was started in doesn't enqueue in a transaction that is over."""
    charge = app.tasks["charge"]

    async def main(joined):
        over = asyncio.Event()

        async def later():
            await over.wait()
            charge.delay(2)

        with app.outbox.join(joined):
            running = asyncio.create_task(later())
            await asyncio.sleep(0)
            charge.delay(1)
        joined.commit()
        over.set()
        await running

    with kind(engine) if kind else engine.connect() as joined:
        asyncio.run(main(joined))
    assert stored(engine) == [1, 2]


def test_a_forgotten_session_takes_no_messages(app, engine):
    """A tracked session that nobody closes goes, with its connection: later tasks aren't enqueued in it for ever."""
    charge, sessions = app.tasks["charge"], sessionmaker(engine)
    app.outbox.track(sessions)

    def forget():
        session = sessions()
        session.execute(text("SELECT 1"))
        charge.delay(1)
        assert stored(engine) == []

    forget()
    gc.collect()
    charge.delay(2)
    assert stored(engine) == [2]


@pytest.mark.parametrize("tracked", [False, True], ids=["joined", "tracked"])
def test_14_after_a_flush_that_failed_nothing_is_sent(app, engine, tracked):
    """Who catches the error of a flush goes on in a transaction that can't commit: its messages go with it."""
    charge, sessions = app.tasks["charge"], sessionmaker(engine)
    if tracked:
        app.outbox.track(sessions)
    with (
        pytest.raises(PendingRollbackError),
        sessions() as session,
        nullcontext() if tracked else app.outbox.join(session),
    ):
        session.execute(insert(orders).values(id=1))
        session.add(Order(1))
        with suppress(IntegrityError):
            session.flush()
        charge.delay(1)
        session.commit()
    assert stored(engine) == []


def test_a_transaction_of_another_thread_has_to_be_joined(app, engine):
    """A session that was begun in another thread, as a web framework may do, isn't tracked here; `join` says so."""
    charge, sessions = app.tasks["charge"], sessionmaker(engine)
    app.outbox.track(sessions)
    session = sessions()
    thread = threading.Thread(target=session.begin)
    thread.start()
    thread.join()
    with session:
        with app.outbox.join(session):
            charge.delay(1)
        assert stored(engine) == []
        charge.delay(2)
        assert stored(engine) == [2]
        session.commit()
    assert stored(engine) == [2, 1]


def test_14_two_phases(app):
    """A two-phase transaction that is committed without having been prepared, or rolled back, does so as a whole."""
    charge, engine = app.tasks["charge"], app.outbox.engine
    if engine.dialect.name == "sqlite":
        # It has no two-phase commit.
        return
    with engine.connect() as connection, app.outbox.join(connection):
        transaction = connection.begin_twophase()
        charge.delay(1)
        transaction.commit()
        transaction = connection.begin_twophase()
        charge.delay(2)
        transaction.rollback()
        connection.execute(insert(orders).values(id=1))
        connection.commit()
    assert stored(engine) == [1]
