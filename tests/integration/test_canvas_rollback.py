"""Canvas and retries in a transaction: nothing is left of what rolled back, and a retry survives it (18 and 20)."""

from __future__ import annotations

import threading

import pytest
from celery import chain, chord, group
from celery.contrib.testing.worker import start_worker
from sqlalchemy import Column, Integer, MetaData, Table, func, insert, select, text
from sqlalchemy.orm import Session

from catga_tasks import Catga
from catga_tasks.testing import outbox_of
from tests.waiting import wait_until

metadata = MetaData()
payments = Table("payments", metadata, Column("id", Integer, primary_key=True), Column("attempt", Integer))


@pytest.fixture(autouse=True)
def tables(engine):
    metadata.create_all(engine)


@pytest.fixture
def app(engine, redis_url):
    app = Catga("shop", broker=redis_url, backend=redis_url, outbox=engine, set_as_current=False)

    @app.task(name="add", shared=False)
    def add(*numbers):
        return sum(each if isinstance(each, int) else sum(each) for each in numbers)

    return app


def waiting(engine):
    with engine.connect() as connection:
        return connection.execute(text("SELECT count(*) FROM catga_outbox")).scalar_one()


CANVAS = {
    "chain": lambda add: chain(add.s(1), add.s(2), add.s(3)),
    "group": lambda add: group(add.s(1), add.s(2)),
    "chord": lambda add: chord([add.s(1), add.s(2)], add.s()),
    "nested": lambda add: chain(add.s(1), chord([add.s(2), group(add.s(3), add.s(4))], add.s()), add.s(5)),
    "chord of groups": lambda add: chord([group(add.s(1), add.s(2)), add.s(3)], add.s()),
}


@pytest.mark.parametrize("canvas", CANVAS)
def test_18_a_rolled_back_canvas_leaves_nothing(app, engine, broker, canvas):
    with Session(engine) as session, app.outbox.join(session):
        CANVAS[canvas](app.tasks["add"]).apply_async()
        session.rollback()
    assert (waiting(engine), broker.dbsize()) == (0, 0)


@pytest.mark.parametrize("canvas", CANVAS)
def test_18_a_canvas_in_a_rolled_back_savepoint_leaves_nothing(app, engine, broker, canvas):
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        app.tasks["add"].delay(7)
        with session.begin_nested() as savepoint:
            CANVAS[canvas](app.tasks["add"]).apply_async()
            savepoint.rollback()
    assert (waiting(engine), broker.dbsize()) == (1, 0)


class Running:
    """A worker and a relay in this process."""

    def __init__(self, app):
        self._relay = app.relay()
        self._thread = threading.Thread(target=self._relay.run)
        self._worker = start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30)

    def __enter__(self):
        self._thread.start()
        return self._worker.__enter__()

    def __exit__(self, *error):
        try:
            self._worker.__exit__(*error)
        finally:
            self._relay.stop()
            self._thread.join(30)


@pytest.mark.parametrize(
    ("canvas", "result"), [("chain", 6), ("group", [1, 2]), ("chord", 3), ("nested", 15), ("chord of groups", 6)]
)
def test_18_a_committed_canvas_runs(app, engine, canvas, result):
    """Chords too, whose size the relay writes to the result backend."""
    if canvas == "nested":
        result = 1 + 2 + 1 + 3 + 1 + 4 + 5
    with Running(app):
        with Session(engine) as session, session.begin(), app.outbox.join(session):
            found = CANVAS[canvas](app.tasks["add"]).apply_async()
        assert found.get(timeout=30, disable_sync_subtasks=False) == result


def test_18_a_saved_group_is_celerys(app, engine, broker):
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        CANVAS["chord of groups"](app.tasks["add"]).apply_async()
    assert broker.keys("celery-taskset-meta-*") == []
    app.relay().run_once()
    assert len(broker.keys("celery-taskset-meta-*")) >= 1


@pytest.mark.parametrize("how", ["self.retry", "autoretry_for"])
def test_20_a_retry_survives_the_rollback(app, engine, how):
    """The payment of the failed attempt is gone, and the task runs again."""

    @app.task(name="charge", shared=False, bind=True, max_retries=3, default_retry_delay=0,
              autoretry_for=(ValueError,) if how == "autoretry_for" else ())  # fmt: skip
    def charge(self, order):
        with Session(engine) as session, session.begin(), app.outbox.join(session):
            session.execute(insert(payments).values(id=self.request.retries, attempt=self.request.retries))
            app.tasks["add"].delay(1)
            if self.request.retries < 2:
                error = ValueError("the bank is closed")
                raise self.retry(exc=error) if how == "self.retry" else error

    with outbox_of(app) as outbox:
        charge.delay(1)
        ran = [each.state for each in outbox.drain(with_scheduled=True) if each.task == "charge"]
        outbox.assert_not_enqueued()
    assert ran == ["RETRY", "RETRY", "SUCCESS"]
    with engine.connect() as connection:
        assert connection.execute(select(payments.c.attempt)).scalars().all() == [2]
        assert connection.execute(select(func.count()).select_from(payments)).scalar_one() == 1


def test_20_a_retry_that_cant_be_stored_goes_back_to_the_broker(app, engine, broker):
    """Plain Celery rejects such a message for good, which loses it."""
    ran = []

    @app.task(name="charge", shared=False, bind=True, max_retries=3, default_retry_delay=0)
    def charge(self):
        with engine.begin() as connection:
            if len(ran) == 0:
                connection.execute(text("ALTER TABLE catga_outbox RENAME TO away"))
            elif len(ran) == 1:
                connection.execute(text("ALTER TABLE away RENAME TO catga_outbox"))
        ran.append(self.request.retries)
        if len(ran) < 3:
            raise self.retry()

    charge.delay()
    assert app.relay().run_once() == 1
    with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30):
        wait_until(lambda: len(ran) == 2 and waiting(engine) == 1)
    # The first run's message came again, as it was; the second run's retry was stored.
    assert ran == [0, 0]
    assert (broker.llen("celery"), broker.hlen("unacked")) == (0, 0)
