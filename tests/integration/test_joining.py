"""A task call belongs to the transaction it is made in (scenarios 14 and 15)."""

from __future__ import annotations

import asyncio
import threading

import pytest
from celery import chord
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, func, insert, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from catga_tasks import Catga, ConfigurationError, MigrationRequired, OutboxUnavailable, TransactionRequired, migrate
from catga_tasks.tables import outbox

metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))


@pytest.fixture(autouse=True)
def tables(engine):
    metadata.create_all(engine)


@pytest.fixture
def app(engine):
    """An application whose broker is not there: nothing here needs one."""
    app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox=engine, set_as_current=False)

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    return app


@pytest.fixture
def charge(app):
    return app.tasks["charge"]


@pytest.fixture
def async_engine(engine, database_url):
    url = make_url(database_url)
    driver = "sqlite+aiosqlite" if url.drivername == "sqlite" else "postgresql+asyncpg"
    return create_async_engine(url.set(drivername=driver))


def stored(engine) -> list[int]:
    """The argument of every message in the outbox, in the order of their ids."""
    with engine.connect() as connection:
        found = connection.execute(select(outbox.c.body).order_by(outbox.c.id)).scalars()
        return [int(bytes(body).split(b"[[")[1].split(b"]")[0]) for body in found]


def count(engine, table) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


# Each kind of transaction


def test_a_session_commits_its_messages(app, charge, engine):
    with Session(engine) as session, session.begin():
        session.execute(insert(orders).values(id=1))
        with app.outbox.join(session):
            charge.delay(1)
            charge.delay(2)
        assert stored(engine) == []
    assert stored(engine) == [1, 2]


def test_a_connection_commits_its_messages(app, charge, engine):
    with engine.connect() as connection, app.outbox.join(connection):
        connection.execute(insert(orders).values(id=1))
        charge.delay(1)
        connection.commit()
        charge.delay(2)
        connection.rollback()
        charge.delay(3)
        connection.commit()
    assert stored(engine) == [1, 3]


async def async_session(app, charge, async_engine):
    async with AsyncSession(async_engine) as session:
        async with session.begin():
            await session.execute(insert(orders).values(id=1))
            with app.outbox.join(session):
                charge.delay(1)
            async with session.begin_nested() as savepoint:
                with app.outbox.join(session):
                    charge.delay(2)
                await savepoint.rollback()
        with app.outbox.join(session):
            charge.delay(3)
        await session.rollback()
    await async_engine.dispose()


def test_an_async_session_commits_its_messages(app, charge, engine, async_engine):
    asyncio.run(async_session(app, charge, async_engine))
    assert stored(engine) == [1]


async def async_connection(app, charge, async_engine):
    async with async_engine.connect() as connection:
        with app.outbox.join(connection):
            charge.delay(1)
            await connection.commit()
            charge.delay(2)
            await connection.rollback()
    await async_engine.dispose()


def test_an_async_connection_commits_its_messages(app, charge, engine, async_engine):
    asyncio.run(async_connection(app, charge, async_engine))
    assert stored(engine) == [1]


# 14: what doesn't commit isn't sent


class Boom(Exception):
    pass


def rollback(session):
    session.rollback()


def error(session):
    raise Boom


def close(session):
    session.close()


def forget(session):
    pass


@pytest.mark.parametrize("end", [rollback, error, close, forget])
def test_14_an_unfinished_transaction_sends_nothing(app, charge, engine, end):
    try:
        with Session(engine) as session:
            session.execute(insert(orders).values(id=1))
            with app.outbox.join(session):
                charge.delay(1)
                end(session)
    except Boom:
        pass
    assert (stored(engine), count(engine, orders)) == ([], 0)


def test_14_nothing_of_a_rolled_back_transaction_comes_with_the_next(app, charge, engine):
    with Session(engine) as session, app.outbox.join(session):
        charge.delay(1)
        session.rollback()
        charge.delay(2)
        session.commit()
        charge.delay(3)
    assert stored(engine) == [2]


def test_14_a_savepoint_takes_its_messages_along(app, charge, engine):
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        charge.delay(1)
        with session.begin_nested():
            charge.delay(2)
            with session.begin_nested() as inner:
                charge.delay(3)
                inner.rollback()
            with session.begin_nested():
                charge.delay(4)
        with session.begin_nested() as outer:
            with session.begin_nested():
                charge.delay(5)
            outer.rollback()
        charge.delay(6)
    assert stored(engine) == [1, 2, 4, 6]


def test_14_a_connections_savepoint_takes_its_messages_along(app, charge, engine):
    with engine.begin() as connection, app.outbox.join(connection):
        charge.delay(1)
        with connection.begin_nested():
            charge.delay(2)
            inner = connection.begin_nested()
            charge.delay(3)
            inner.rollback()
        outer = connection.begin_nested()
        with connection.begin_nested():
            charge.delay(4)
        outer.rollback()
        charge.delay(5)
    assert stored(engine) == [1, 2, 5]


def test_14_a_commit_that_fails_sends_nothing(app, charge, engine):
    """The row of an order that breaks a constraint at the flush before the commit."""
    with Session(engine) as session, session.begin():
        session.execute(insert(orders).values(id=1))
    with pytest.raises(Exception, match=r"(?i)unique"), Session(engine) as session, session.begin():
        with app.outbox.join(session):
            charge.delay(1)
        session.execute(insert(orders).values(id=1))
    assert stored(engine) == []


# 15: a retried transaction


def test_15_a_retried_transaction_sends_one_message(app, charge, engine):
    def attempt(session, *, fails):
        session.execute(insert(orders).values(id=1))
        with app.outbox.join(session):
            charge.delay(1)
        if fails:
            raise Boom

    for fails in (True, True, False):
        with Session(engine) as session:
            try:
                with session.begin():
                    attempt(session, fails=fails)
            except Boom:
                continue
    assert (stored(engine), count(engine, orders)) == ([1], 1)


def test_15_after_a_serialization_failure(app, charge, postgres_url):
    engine = create_engine(postgres_url, isolation_level="SERIALIZABLE")
    migrate.upgrade(engine)
    metadata.create_all(engine)
    failures = 0

    def attempt(number, meanwhile):
        with Session(engine) as session, session.begin():
            seen = session.execute(select(func.count()).select_from(orders)).scalar_one()
            with app.outbox.join(session):
                charge.delay(number)
            session.execute(insert(orders).values(id=10 * number + seen))
            meanwhile()

    def run(number, meanwhile):
        nonlocal failures
        while True:
            try:
                return attempt(number, meanwhile)
            except OperationalError as problem:
                if problem.orig.sqlstate != "40001":
                    raise
                failures += 1
                meanwhile = forget_it

    def forget_it():
        pass

    run(1, lambda: run(2, forget_it))
    assert failures == 1
    assert sorted(stored(engine)) == [1, 2]
    engine.dispose()


# Sessions that are tracked


def test_a_tracked_sessionmaker_needs_no_word(app, charge, engine):
    sessions = sessionmaker(engine)
    app.outbox.track(sessions)
    with sessions.begin() as session:
        session.execute(insert(orders).values(id=1))
        charge.delay(1)
        assert stored(engine) == []
    with sessions() as session:
        session.execute(insert(orders).values(id=2))
        charge.delay(2)
        session.rollback()
    charge.delay(3)
    assert stored(engine) == [1, 3]


def test_other_sessions_are_not_tracked(app, charge, engine):
    app.outbox.track(sessionmaker(engine))
    with Session(engine) as session:
        session.connection()
        charge.delay(1)
        session.rollback()
    assert stored(engine) == [1]


def test_a_tracked_scoped_session(app, charge, engine):
    sessions = scoped_session(sessionmaker(engine))
    app.outbox.track(sessions)
    sessions.execute(insert(orders).values(id=1))
    charge.delay(1)
    sessions.commit()
    sessions.execute(insert(orders).values(id=2))
    charge.delay(2)
    sessions.rollback()
    sessions.remove()
    charge.delay(3)
    assert stored(engine) == [1, 3]


def test_a_tracked_async_sessionmaker(app, charge, engine, async_engine):
    sessions = async_sessionmaker(async_engine)
    app.outbox.track(sessions)

    async def work():
        async with sessions.begin() as session:
            await session.execute(insert(orders).values(id=1))
            charge.delay(1)
        async with sessions() as session:
            await session.execute(insert(orders).values(id=2))
            charge.delay(2)
            await session.rollback()
        await async_engine.dispose()

    asyncio.run(work())
    assert stored(engine) == [1]


def test_asyncio_tasks_dont_share_a_transaction(app, charge, engine, async_engine):
    """Two tasks interleave: one commits, the other rolls back."""
    sessions = async_sessionmaker(async_engine)
    app.outbox.track(sessions)

    async def one(number, mine, theirs, *, commit):
        async with sessions() as session:
            await session.begin()
            charge.delay(number)
            theirs.set()
            await mine.wait()
            charge.delay(number + 1)
            await (session.commit() if commit else session.rollback())

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(one(1, first, second, commit=True), one(3, second, first, commit=False))
        await async_engine.dispose()

    asyncio.run(both())
    assert stored(engine) == [1, 2]


def test_threads_dont_share_a_transaction(app, charge, engine):
    sessions = sessionmaker(engine)
    app.outbox.track(sessions)
    barrier = threading.Barrier(2, timeout=20)

    def work(number, *, commit):
        with sessions() as session:
            session.begin()
            charge.delay(number)
            barrier.wait()
            charge.delay(number + 1)
            barrier.wait()
            if commit:
                session.commit()

    threads = [threading.Thread(target=work, args=(n,), kwargs={"commit": n == 1}) for n in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(engine) == [1, 2]


# Nested joins


def test_the_inner_join_wins(app, charge, engine):
    with Session(engine) as outer, Session(engine) as inner:
        with app.outbox.join(outer):
            charge.delay(1)
            with app.outbox.join(inner):
                charge.delay(2)
            charge.delay(3)
        inner.commit()
        assert stored(engine) == [2]
        outer.rollback()
    assert stored(engine) == [2]


def test_one_session_joined_twice_writes_once(app, charge, engine):
    with Session(engine) as session, session.begin(), app.outbox.join(session), app.outbox.join(session):
        charge.delay(1)
    assert stored(engine) == [1]


# Outside any transaction, and mistakes


def test_outside_a_transaction_it_is_durable_at_once(charge, engine):
    result = charge.delay(1)
    assert stored(engine) == [1]
    assert result.id


def test_a_transaction_may_be_required(engine):
    app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox=engine, set_as_current=False)
    app.conf.outbox_require_transaction = True

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    with pytest.raises(TransactionRequired, match=r"charge .* app\.outbox\.join"):
        charge.delay(1)
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        charge.delay(2)
    assert stored(engine) == [2]


@pytest.mark.parametrize("wrong", [None, "session", sessionmaker(), object()])
def test_only_transactions_can_be_joined(app, wrong):
    with pytest.raises(ConfigurationError, match="takes a Session, AsyncSession, Connection"), app.outbox.join(wrong):
        pass


def test_only_makers_can_be_tracked(app, engine):
    with Session(engine) as session, pytest.raises(ConfigurationError, match="takes a sessionmaker"):
        app.outbox.track(session)


def test_a_closed_connection_is_no_transaction(app, charge, engine):
    connection = engine.connect()
    with app.outbox.join(connection):
        connection.close()
        with pytest.raises(ConfigurationError, match="joined connection is closed"):
            charge.delay(1)
    assert stored(engine) == []


def test_25_without_the_tables_the_command_is_named(app, charge, engine):
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE catga_outbox"))
    with pytest.raises(MigrationRequired, match="outbox migrate"):
        charge.delay(1)
    with pytest.raises(MigrationRequired, match="outbox migrate"), Session(engine) as session, session.begin():
        with app.outbox.join(session):
            charge.delay(1)
        session.execute(insert(orders).values(id=1))
    assert count(engine, orders) == 0


def test_16_without_a_database_it_fails_at_once():
    app = Catga(
        "shop",
        broker="redis://127.0.0.1:1/0",
        outbox="postgresql+psycopg://x:geheim@127.0.0.1:1/x",
        set_as_current=False,
    )

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    with pytest.raises(OutboxUnavailable, match="nothing was enqueued") as raised:
        charge.delay(1)
    assert "geheim" not in str(raised.value)


def test_16_without_broker_and_result_backend_it_returns_at_once(engine):
    app = Catga(
        "shop", broker="redis://127.0.0.1:1/0", backend="redis://127.0.0.1:1/1", outbox=engine, set_as_current=False
    )

    @app.task(name="charge", shared=False)
    def charge(order):
        return order

    result = charge.delay(1)
    charge.apply_async((2,), link=charge.si(3))
    (charge.si(4) | charge.si(5)).delay()
    chord([charge.si(6), charge.si(7)], charge.si(8)).delay()
    charge.delay_many([(9,), (10,)])
    assert result.id
    assert len(stored(engine)) == 7


def test_16_a_locked_sqlite_file_is_waited_for_and_named(sqlite_url):
    """The usual mistake with one writer: a task is enqueued beside the transaction that writes, not in it."""
    patient = Catga("shop", outbox=sqlite_url, set_as_current=False).outbox.engine
    metadata.create_all(patient)
    with patient.connect() as connection:
        assert connection.execute(text("PRAGMA busy_timeout")).scalar_one() == 20_000
    migrate.upgrade(patient)
    app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox=f"{sqlite_url}?timeout=0.1", set_as_current=False)
    with patient.begin() as connection:
        connection.execute(insert(orders).values(id=1))
        with pytest.raises(OutboxUnavailable, match=r"locked by another transaction.*app\.outbox\.join"):
            app.send_task("charge", args=(1,))
        with app.outbox.join(connection):
            app.send_task("charge", args=(1,))
    with patient.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(outbox)) == 1
    for engine in (patient, app.outbox.engine):
        engine.dispose()
