"""The plugin for pytest: what is enqueued, and a worker in the test's own process."""

from __future__ import annotations

import contextvars
import logging
import uuid
from datetime import timedelta
from unittest.mock import ANY

import pytest
from celery import Celery, chain, chord, current_app
from celery.exceptions import Ignore, MaxRetriesExceededError, NotRegistered, Reject
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from catga_tasks import Catga, ConfigurationError, current_session
from catga_tasks.testing import outbox_of
from tests.conftest import fresh_database

NOWHERE = "redis://127.0.0.1:1/0"


def shop(engine):
    """An application with a task of each kind, whose servers aren't there."""
    app = Catga("shop", broker=NOWHERE, backend=NOWHERE, outbox=engine, set_as_current=False)
    app.Session = sessionmaker(engine)
    app.outbox.track(app.Session)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS payments (id INTEGER)"))
        connection.execute(text("DELETE FROM payments"))

    @app.task(name="add", shared=False)
    def add(*numbers, note=None):
        return sum(each if isinstance(each, int) else sum(each) for each in numbers)

    @app.task(name="ping", shared=False, delivery="at_most_once")
    def ping(value):
        return value

    @app.task(name="charge", shared=False, bind=True, delivery="effectively_once", max_retries=2)
    def charge(self, order, failures=0):
        current_session().execute(text("INSERT INTO payments VALUES (:id)"), {"id": order})
        ping.delay(order)
        add.delay(order, 1)
        if self.request.retries < failures:
            raise self.retry(countdown=100)
        return order

    @app.task(name="pay", shared=False)
    def pay(order):
        with app.Session.begin() as session:
            session.execute(text("INSERT INTO payments VALUES (:id)"), {"id": order})
            add.delay(order)

    @app.task(name="fail", shared=False)
    def fail(kind="ValueError"):
        raise {"ValueError": ValueError, "Ignore": Ignore, "Reject": Reject}[kind]("it fails")

    return app


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def engine(request, tmp_path_factory):
    """One database of each kind for all tests, as an application's own tests have it."""
    if request.param == "sqlite":
        engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('shop')}/catga.db")
        yield engine
        engine.dispose()
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture
def catga_app(engine):
    return shop(engine)


@pytest.fixture
def call(catga_app):
    """The application's tasks by name."""
    return catga_app.tasks


def payments(app):
    with app.outbox.engine.connect() as connection:
        return sorted(connection.execute(text("SELECT id FROM payments")).scalars())


def told(deliveries):
    return [(each.task, each.args, each.state, each.result) for each in deliveries]


def test_what_is_committed_is_enqueued(outbox, catga_app, call):
    with catga_app.Session.begin() as session:
        call["add"].delay(1, 2)
        outbox.assert_not_enqueued()
        outbox.assert_enqueued("add", within=session, count=1)
        with session.begin_nested() as savepoint:
            call["add"].delay(3)
            savepoint.rollback()
        assert [message.args for message in outbox.enqueued(within=session)] == [(1, 2)]
    with pytest.raises(ZeroDivisionError), catga_app.Session.begin():
        call["add"].delay(4)
        raise ZeroDivisionError
    assert [message.args for message in outbox.assert_enqueued(call["add"])] == [(1, 2)]
    outbox.assert_not_enqueued("add", args=(4,))


def test_a_message_is_seen_as_its_task_will_see_it(outbox, call):
    number = uuid.uuid4()
    call["add"].apply_async((number, (1, (2,))), {"note": {"a": (1,)}}, queue="slow", priority=7, headers={"shop": "x"})
    call["ping"].apply_async(("direct",), compression="gzip")
    (stored,) = outbox.assert_enqueued("add", args=(number, (1, (2,))), kwargs={"note": ANY}, queue="slow")
    assert (stored.priority, stored.headers["shop"], stored.eta) == (7, "x", None)
    assert stored.kwargs == {"note": {"a": [1]}}
    outbox.assert_enqueued("ping", args=["direct"], kwargs={}, queue="celery", count=1)


def test_an_eta_is_seen(outbox, catga_app, call):
    call["add"].apply_async((1,), countdown=60)
    call["ping"].apply_async((1,), countdown=60)
    with catga_app.Session.begin() as session:
        call["add"].apply_async((2,), countdown=60)
        found = [message.eta for message in outbox.enqueued(within=session)]
    assert len(found) == 3
    assert max(found) - min(found) < timedelta(seconds=30)
    assert outbox.drain() == []
    assert len(outbox.enqueued()) == 3


def test_a_failed_assertion_says_what_there_is(outbox, catga_app, call):
    call["add"].delay(1, note="x")
    call["ping"].delay(2)
    with catga_app.Session.begin(), pytest.raises(AssertionError) as failed:
        call["add"].delay(3)
        outbox.assert_enqueued("add", args=(2,), queue="slow")
    assert str(failed.value).splitlines() == [
        "add(2) in queue 'slow' is not enqueued.",
        "Enqueued for add:",
        "  add(1, note='x') in queue 'celery'",
        "Enqueued for other tasks:",
        "  ping(2) in queue 'celery'",
        "Not committed yet (commit first, or pass within=):",
        "  add(3) in queue 'celery'",
    ]
    with pytest.raises(AssertionError, match=r"^add is enqueued 2 times, not 1"):
        outbox.assert_enqueued("add", count=1)
    with pytest.raises(AssertionError, match=r"^A message is enqueued:\n  add"):
        outbox.assert_not_enqueued()


def test_a_drain_runs_everything_there_is(outbox, catga_app, call):
    """Tasks of each delivery, what they enqueue, and nothing that isn't due."""
    call["charge"].delay(5)
    call["pay"].delay(6)
    call["add"].apply_async((1,), countdown=1000)
    assert sorted(told(outbox.drain())) == [
        ("add", (5, 1), "SUCCESS", 6),
        ("add", (6,), "SUCCESS", 6),
        ("charge", (5,), "SUCCESS", 5),
        ("pay", (6,), "SUCCESS", None),
        ("ping", (5,), "SUCCESS", 5),
    ]
    assert payments(catga_app) == [5, 6]
    outbox.assert_enqueued("add", args=(1,), count=1)


def test_canvas_and_its_results(outbox, call):
    add = call["add"]
    result = chain(add.s(1), chord([add.s(2), add.s(3)], add.s()), add.s(5)).apply_async()
    assert len(outbox.drain()) == 5
    assert result.get(disable_sync_subtasks=False) == 12


def test_20_a_retry_waits_until_it_is_due(outbox, catga_app, call):
    """Scenario 20: what the failed attempts did is gone, and they come in the order of their time."""
    call["charge"].delay(1, failures=2)
    call["add"].apply_async((7,), countdown=150)
    assert [each.state for each in outbox.drain() if each.task == "charge"] == ["RETRY"]
    assert payments(catga_app) == []
    later = [each for each in outbox.drain(with_scheduled=True) if each.task == "charge" or each.args == (7,)]
    assert told(later)[-1] in (("add", (7,), "SUCCESS", 7), ("charge", (1,), "SUCCESS", 1))
    assert [each.state for each in later if each.task == "charge"] == ["RETRY", "SUCCESS"]
    assert payments(catga_app) == [1]
    outbox.assert_not_enqueued()


def test_what_a_worker_holds_comes_with_the_scheduled(outbox, call):
    """An at-most-once task with a countdown waits with the broker, not in the outbox."""
    call["ping"].apply_async((1,), countdown=1000)
    assert outbox.drain() == []
    assert told(outbox.drain(with_scheduled=True)) == [("ping", (1,), "SUCCESS", 1)]
    outbox.assert_not_enqueued()


def test_19_duplicates_prove_a_task_idempotent(outbox, catga_app, call):
    """Scenario 19: an effectively-once task's effects are there once, and an at-least-once task's twice."""
    call["charge"].delay(1)
    found = outbox.drain(duplicates=True)
    assert [each.ran for each in found if each.task == "charge"] == [True, False]
    assert [each.result for each in found if each.task == "charge"] == [1, 1]
    assert payments(catga_app) == [1]
    call["pay"].delay(2)
    assert [each.ran for each in outbox.drain(duplicates=True) if each.task == "pay"] == [True, True]
    assert payments(catga_app) == [1, 2, 2]


def test_a_message_that_goes_back_comes_again(outbox, catga_app):
    """Both deliveries of it do, where each is delivered twice."""
    ran = []

    @catga_app.task(name="busy", shared=False)
    def busy():
        ran.append(1)
        if len(ran) <= 2:
            raise Reject("later", requeue=True)

    busy.delay()
    assert [each.state for each in outbox.drain(duplicates=True)] == 2 * ["REJECTED"] + 4 * ["SUCCESS"]


def test_results_that_commit_with_the_task_stay_where_they_are(engine):
    """With the result backend `outbox://` nothing of the results is in memory."""
    app = Catga("shop", broker=NOWHERE, backend="outbox://", outbox=engine, set_as_current=False)

    @app.task(name="add", shared=False, delivery="effectively_once")
    def add(*numbers):
        return sum(each if isinstance(each, int) else sum(each) for each in numbers)

    with outbox_of(app) as outbox:
        result = chord([add.s(1), add.s(2)], add.s()).apply_async()
        assert len(outbox.drain(duplicates=True)) == 6
        assert result.get() == 3
        assert app.backend.url.startswith("outbox:")


def test_a_tasks_error_is_the_tests(outbox, call):
    call["fail"].delay()
    call["add"].delay(1)
    with pytest.raises(ValueError, match="it fails") as failed:
        outbox.drain()
    assert "fail()" in failed.value.__notes__[0]
    outbox.drain()
    call["fail"].apply_async(link_error=call["ping"].si("told"))
    first, second = outbox.drain(raise_errors=False)
    assert (first.state, str(first.error), second.result) == ("FAILURE", "it fails", "told")


def test_what_a_worker_refuses(outbox, catga_app, call, caplog):
    """Rejected, ignored, expired and unknown messages end as a worker's do."""
    caplog.set_level(logging.CRITICAL)
    call["fail"].delay("Reject")
    call["fail"].delay("Ignore")
    call["add"].apply_async((1,), expires=-1)
    assert [each.state for each in outbox.drain()] == ["REJECTED", "IGNORED", "REVOKED"]
    catga_app.send_task("who?")
    with pytest.raises(NotRegistered):
        outbox.drain()
    catga_app.send_task("who?")
    assert [(each.task, each.state) for each in outbox.drain(raise_errors=False)] == [("who?", "FAILURE")]
    assert outbox.drain() == []


def test_an_endless_task_is_an_error(outbox, catga_app):
    @catga_app.task(name="again", shared=False)
    def again():
        again.delay()

    again.delay()
    with pytest.raises(AssertionError, match=r"(?s)max_messages is reached after 5 deliveries.*task again\(\)"):
        outbox.drain(max_messages=5)
    with pytest.raises(AssertionError, match="The time is up"):
        outbox.drain(timeout=0.000001)


def test_retries_come_to_an_end(outbox, call):
    call["charge"].delay(1, failures=9)
    with pytest.raises(MaxRetriesExceededError):
        outbox.drain(with_scheduled=True)


def test_what_cant_be_published_is_an_error(outbox, catga_app, call):
    call["add"].delay(1)
    with catga_app.outbox.engine.begin() as connection:
        connection.execute(text("UPDATE catga_outbox SET headers = 'garbage'"))
    with pytest.raises(AssertionError, match=r"(?s)couldn't publish:.*add.*headers"):
        outbox.drain()
    catga_app.conf.outbox_max_attempts = 1
    del catga_app.catga_settings
    with catga_app.outbox.engine.begin() as connection:
        connection.execute(text("DELETE FROM catga_outbox"))
    call["add"].delay(1)
    with catga_app.outbox.engine.begin() as connection:
        connection.execute(text("UPDATE catga_outbox SET headers = 'garbage'"))
    with pytest.raises(AssertionError, match=r"(?s)couldn't publish:.*add.*headers"):
        outbox.drain()


def test_a_worker_knows_nothing_of_the_tests_context(outbox, catga_app):
    known = contextvars.ContextVar("known", default="nothing")
    known.set("the test's")

    @catga_app.task(name="ask", shared=False)
    def ask():
        return known.get()

    ask.delay()
    assert [each.result for each in outbox.drain()] == ["nothing"]


def test_what_isnt_an_error_of_the_task_ends_the_test(outbox, catga_app):
    @catga_app.task(name="stop", shared=False)
    def stop():
        pytest.fail("the task says so")

    stop.delay()
    with pytest.raises(pytest.fail.Exception, match="the task says so"):
        outbox.drain()


def test_everything_is_as_before(sqlite_url):
    """The broker, the results, the tasks and the current application; another application's memory isn't touched."""
    app = shop(create_engine(sqlite_url))
    other = Celery("other", broker="memory://", set_as_current=False)
    current = Celery("current")

    def seen():
        return (
            app.connection_for_write().as_uri(),
            app._idle_connection.as_uri(),
            app.backend,
            app.pool.connection.as_uri(),
            current_app._get_current_object() is current,
            app.tasks["add"].__trace__,
        )

    with other.connection_for_write() as connection:  # kombu's memory is one in a process: other tests left theirs.
        connection.default_channel.queue_purge("celery")
    other.send_task("elsewhere")
    before = seen()
    with outbox_of(app) as outbox:
        app.tasks["add"].delay(1)
        app.tasks["ping"].delay(1)
        assert app.connection_for_write().as_uri().startswith("memory:")
        assert len(outbox.drain()) == 2
        app.tasks["add"].delay(2)
        app.tasks["ping"].delay(2)
    assert seen() == before
    with outbox_of(app) as outbox:
        outbox.assert_not_enqueued()
    with other.connection_for_read() as connection:
        assert connection.default_channel.basic_get("celery").headers["task"] == "elsewhere"
    app.outbox.engine.dispose()


def test_named_brokers_are_in_memory_too(sqlite_url):
    app = shop(create_engine(sqlite_url))
    app.conf.outbox_brokers = {"mail": NOWHERE}
    del app.catga_settings
    with outbox_of(app) as outbox:
        app.tasks["add"].apply_async((1,), broker="mail")
        app.tasks["ping"].apply_async((1,), broker="mail")
        assert len(outbox.drain()) == 2
    app.outbox.engine.dispose()


def test_sqlite_in_memory():
    """One connection for everybody: a test that looks while its own transaction is open is told so."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    app = shop(engine)
    with outbox_of(app) as outbox:
        app.tasks["charge"].delay(1)
        assert len(outbox.drain(duplicates=True)) == 6
        assert payments(app) == [1]
        with app.Session.begin() as session:
            session.execute(text("INSERT INTO payments VALUES (2)"))
            app.tasks["add"].delay(1)
            outbox.assert_enqueued("add", args=(1,), within=session)
        with app.Session() as session:
            session.execute(text("INSERT INTO payments VALUES (3)"))
            with pytest.raises(AssertionError, match="a transaction is open on it"):
                outbox.enqueued()
    engine.dispose()


@pytest.mark.asyncio
async def test_in_an_asynchronous_test(outbox, catga_app, call):
    url = catga_app.outbox.engine.url
    driver = "sqlite+aiosqlite" if url.get_backend_name() == "sqlite" else "postgresql+asyncpg"
    engine = create_async_engine(url.set(drivername=driver))
    async with AsyncSession(engine) as session, session.begin():
        with catga_app.outbox.join(session):
            call["add"].delay(1)
        outbox.assert_enqueued("add", within=session)
        outbox.assert_not_enqueued()
    assert told(outbox.drain()) == [("add", (1,), "SUCCESS", 1)]
    await engine.dispose()


def test_a_database_that_isnt_the_tests_is_refused(postgres_url):
    """By rows under a name that doesn't say `test`, and by a relay at work."""
    app = shop(create_engine(postgres_url))
    with outbox_of(app):
        pass
    app.tasks["add"].delay(1)
    with pytest.raises(ConfigurationError, match=r"catga_outbox, and the database 'catga_.*' doesn't look"):
        outbox_of(app).__enter__()
    relay = app.relay()
    with app.outbox.engine.begin() as connection:
        assert connection.execute(text("DELETE FROM catga_outbox")).rowcount == 1
    relay.lanes[0]._housekeep()
    with pytest.raises(ConfigurationError, match="is at work on this database"):
        outbox_of(app).__enter__()
    relay.lanes[0]._end()
    with outbox_of(app):
        pass
    app.outbox.engine.dispose()


CONFTEST = """
import pytest
from sqlalchemy import create_engine
from catga_tasks import Catga

pytest_plugins = ["catga_tasks.testing"]

@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('database')}/shop.db")
    yield engine
    engine.dispose()

@pytest.fixture
def catga_app(engine):
    app = Catga("shop", outbox=engine)
    @app.task(name="add", shared=False)
    def add(*numbers):
        return sum(numbers)
    return app
"""

TESTS = """
import asyncio, pytest

@pytest.mark.parametrize("number", range(6))
def test_add(outbox, catga_app, number):
    outbox.assert_not_enqueued()
    catga_app.tasks["add"].delay(number)
    outbox.assert_enqueued("add", args=(number,), count=1)
    if number % 2:
        assert [each.result for each in outbox.drain()] == [number]

@pytest.mark.asyncio
async def test_in_a_thread(outbox, catga_app):
    catga_app.tasks["add"].delay(1)
    assert len(await asyncio.to_thread(outbox.drain)) == 1
"""


def test_a_project_with_xdist(pytester):
    """Tests side by side and one after another on one database leave nothing to each other."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-n", "2", "-W", "error", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=7)


def test_a_project_without_an_application(pytester):
    """The error says what to define."""
    pytester.makeconftest('pytest_plugins = ["catga_tasks.testing"]')
    pytester.makepyfile("def test_it(outbox): pass")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E*ConfigurationError: The fixture `outbox` needs your application: define*"])
