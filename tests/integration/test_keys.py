"""Unique tasks and ordered ones: what is enqueued, what holds a key, and when it lets go (scenarios 14 to 16)."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from contextlib import nullcontext

import pytest
import sqlalchemy as sa
from celery import chain, group
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from catga_tasks import Catga, ConfigurationError, admin, claims, current_session, migrate, tables
from catga_tasks.selection import Selection
from catga_tasks.tallies import Tally
from tests.conftest import fresh_database
from tests.waiting import wait_until


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def database(request, tmp_path_factory):
    """The engine of a migrated database of each kind, for all tests of this module."""
    if request.param == "sqlite":
        opened = nullcontext(f"sqlite:///{tmp_path_factory.mktemp('keys') / 'catga.db'}")
    else:
        opened = fresh_database(request.getfixturevalue("postgres_server"))
    with opened as url:
        engine = sa.create_engine(url)
        migrate.upgrade(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def engine(database):
    yield database
    with database.begin() as connection:
        for table in tables.metadata.sorted_tables:
            connection.execute(sa.delete(table))


@pytest.fixture
def app(engine):
    app = Catga("shop", broker="memory://", outbox=engine, set_as_current=False)
    yield app
    app.close()


def nothing(*_, **__):
    """Do nothing."""


def task(app, function=nothing, **options):
    """Register a task that can be called, and that `deliver` runs."""
    function.__name__ = "call"
    options = {"name": f"task-{uuid.uuid4().hex[:6]}", "bind": True, **options}
    found = app.task(shared=False, **options)(function)
    app.finalize()
    found.__trace__ = build_tracer(found.name, found, app.loader, "here", app=app)
    return found


def rows(app, statement, **parameters):
    with app.outbox.engine.begin() as connection:
        found = connection.execute(sa.text(statement), parameters)
        return [tuple(row) for row in found] if found.returns_rows else []


def sent(app):
    """The task ids of the messages that are due, which are at the broker from now on."""
    with app.outbox.engine.begin() as connection:
        due = connection.execute(
            sa.text("SELECT task_id FROM catga_outbox WHERE available_at < '9999-01-01' ORDER BY available_at, id")
        ).scalars()
        found = list(due)
        connection.execute(sa.text("DELETE FROM catga_outbox WHERE available_at < '9999-01-01'"))
        return found


def message(app, task_id):
    """Take a message out of the outbox, as the worker that gets it sees it."""
    found = rows(app, "SELECT headers, body FROM catga_outbox WHERE task_id = :id ORDER BY id", id=task_id)
    headers, body = found[0]
    rows(app, "DELETE FROM catga_outbox WHERE task_id = :id AND available_at < '9999-01-01'", id=task_id)
    args, kwargs, embed = json.loads(bytes(body))
    return args, kwargs, {**json.loads(headers), **embed, "delivery_info": {}}


def deliver(task, task_id, taken=None):
    """Let a worker run a message; return the tracer's answer."""
    args, kwargs, request = taken or message(task.app, task_id)
    return task.__trace__(task_id, args, kwargs, request)


def kept(app):
    """The unique keys that are held, by whom; and whose turn it is for each ordering key."""
    return (
        dict(rows(app, "SELECT key, task_id FROM catga_unique_keys")),
        dict(rows(app, "SELECT key, task_id FROM catga_turns")),
    )


# Unique tasks, and who is sent


def test_a_held_key_keeps_a_second_message_from_being_sent(app):
    """The second call of a unique task enqueues nothing; its result is the first one's."""
    refresh = task(app, unique=True)
    first = refresh.delay(1)
    second, other = refresh.delay(1), refresh.delay(2)
    assert second.id == first.id != other.id
    assert sent(app) == [first.id, other.id]


def test_the_same_arguments_are_the_same_however_they_are_passed(app):
    """By arguments means what the task gets: by position, by name or by default."""
    refresh = task(app, lambda self, a, b=2: (a, b), unique=True)
    ids = {refresh.delay(1).id, refresh.delay(a=1).id, refresh.delay(1, 2).id, refresh.delay(b=2, a=1).id}
    assert len(ids) == 1
    assert refresh.delay(1, 3).id not in ids


def test_what_a_key_is_made_of(app):
    """By task, by a function of the arguments, by a given key; of one task, and only if it is wished."""
    one = task(app, unique={"by": "task"})
    assert one.delay(1).id == one.delay(2).id
    assert one.apply_async((3,), unique=False).id != one.delay(3).id
    customer = task(app, unique={"by": lambda order, customer: f"customer-{customer}"})
    assert customer.delay(1, customer=7).id == customer.delay(2, customer=7).id
    assert customer.delay(1, customer=7).id != customer.delay(1, customer=8).id
    plain, other = task(app), task(app)
    first = plain.apply_async((1,), unique_key="a")
    assert plain.apply_async((2,), unique_key="a").id == first.id
    assert other.apply_async((1,), unique_key="a").id != first.id
    assert app.send_task("elsewhere", unique_key="a").id == app.send_task("elsewhere", unique_key="a").id


def test_a_transaction_takes_a_key_when_it_commits(app, engine):
    """Scenario 14: what rolls back, whole or to a savepoint, has taken nothing; what commits keeps others out."""
    refresh = task(app, unique=True)
    with Session(engine) as session, app.outbox.join(session):
        refresh.delay(1)
        session.rollback()
        assert kept(app) == ({}, {})
        with session.begin_nested() as savepoint:
            refresh.delay(1)
            savepoint.rollback()
        first, again = refresh.delay(1), refresh.delay(1)
        session.commit()
    assert sent(app) == [first.id]
    assert again.id == first.id
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        late = refresh.delay(1)
        assert late.id != first.id
    assert late.id == first.id
    assert sent(app) == []


def test_eight_threads_enqueue_one_message(app, engine):
    """Transactions that take the same key at the same time: one message is sent, and all results are its."""
    refresh = task(app, unique=True)
    barrier, results = threading.Barrier(8), []

    def call(number):
        with Session(engine) as session, session.begin(), app.outbox.join(session):
            results.append(refresh.delay("report"))
            barrier.wait(20)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ids = sent(app)
    assert len(ids) == 1
    assert {result.id for result in results} == set(ids)
    assert len(results) == 8


def test_the_second_caller_waits_for_the_first_ones_end(app, engine):
    """A caller whose key another transaction is about to take waits: it is sent if that one rolls back."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer: the second caller waits for the file.")
    refresh = task(app, unique=True)
    ended = []
    with engine.connect() as first:
        first.execute(
            sa.text(
                "INSERT INTO catga_unique_keys (key, task_id, expires_at) VALUES (:key, 'x', now() + interval '1 h')"
            ),
            {"key": f"{refresh.name}:a"},
        )
        thread = threading.Thread(target=lambda: ended.append(refresh.apply_async(unique_key="a")))
        thread.start()
        wait_until(
            lambda: rows(app, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"),
            what="a caller that waits",
        )
        assert ended == []
        first.rollback()
    thread.join(20)
    assert sent(app) == [ended[0].id]


def test_15_an_engine_that_serializes_fails_no_call_and_repeats_no_task(engine):
    """Scenario 15: what waits for a key in a transaction of its own goes on when the other one has committed."""
    if engine.dialect.name == "sqlite":
        # It has no such failures.
        return
    serializing = sa.create_engine(engine.url, isolation_level="SERIALIZABLE")
    app = Catga("shop", broker="memory://", outbox=serializing, set_as_current=False)
    answers: list[object] = []
    ran: list[int] = []
    ordered = task(app, lambda _self: ran.append(1), key="busy")
    taken = message(app, first := ordered.delay().id)
    for call in (lambda: deliver(ordered, first, taken).info, lambda: ordered.delay().id and None):
        with engine.begin() as other:
            other.execute(
                sa.text("INSERT INTO catga_turns VALUES ('busy', 'x') ON CONFLICT (key) DO UPDATE SET key = 'busy'")
            )
            thread = threading.Thread(target=lambda call=call: answers.append(call()))
            thread.start()
            wait_until(
                lambda: rows(app, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"),
                what="somebody who waits",
            )
        thread.join(20)
    with app.outbox.session() as session:
        assert session.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
    serializing.dispose()
    app.close()
    assert (ran, answers) == ([1], [None, None])


def test_a_session_of_asyncio_takes_keys_too(app, engine):
    """`delay()` does no I/O in the transaction of an `AsyncSession`; the key is taken at its commit."""
    driver = "sqlite+aiosqlite" if engine.dialect.name == "sqlite" else "postgresql+asyncpg"
    refresh, ordered = task(app, unique=True), task(app, key="a")

    async def call():
        asynchronous = create_async_engine(engine.url.set(drivername=driver))
        async with AsyncSession(asynchronous) as session, session.begin():
            with app.outbox.join(session):
                found = [refresh.delay(1), refresh.delay(1), ordered.apply_async(countdown=60), ordered.delay()]
        await asynchronous.dispose()
        return found

    first, second, head, waiting = asyncio.run(call())
    assert first.id == second.id
    assert sent(app) == [first.id, head.id]
    assert rows(app, "SELECT task_id FROM catga_outbox") == [(waiting.id,)]


def test_many_at_once(app):
    """`delay_many` sends one message a key, and each result is that of the message that is sent."""
    refresh = task(app, unique=True)
    results = refresh.delay_many([(1,), (2,), (1,)])
    assert results[0].id == results[2].id != results[1].id
    assert sent(app) == [results[0].id, results[1].id]


# When a unique key is free again


@pytest.fixture(params=["at_least_once", "effectively_once", "deduplicate"])
def delivery(request):
    return {"deduplicate": True} if request.param == "deduplicate" else {"delivery": request.param}


def test_the_end_frees_the_key(app, delivery):
    """A task that is unique until its end frees its key however it ends, and not by a retry."""
    seen = []

    def refresh(self, how):
        seen.append(kept(app)[0])
        raise {"fail": ValueError("no"), "drop": Reject("no"), "ignore": Ignore()}.get(how) or self.retry(countdown=0)

    refreshing = task(app, refresh, unique=True, max_retries=1, **delivery)
    for how in ("fail", "drop", "ignore"):
        result = refreshing.delay(how)
        deliver(refreshing, result.id)
        assert kept(app) == ({}, {}), how
    result = refreshing.delay("retry")
    deliver(refreshing, result.id)
    assert list(kept(app)[0].values()) == [result.id]
    assert refreshing.delay("retry").id == result.id
    deliver(refreshing, result.id)
    assert kept(app) == ({}, {})
    assert len(seen) == 5
    assert all(len(each) == 1 for each in seen)
    done = task(app, unique=True, **delivery)
    deliver(done, done.delay().id)
    assert kept(app) == ({}, {})


def test_the_start_frees_the_key(app, delivery):
    """A task that is unique until its start sees everything that calls which were not sent have committed."""
    inside = []

    def refresh(self):
        inside.append(kept(app)[0])
        if not self.request.retries:
            raise self.retry(countdown=0)

    refreshing = task(app, refresh, unique={"until": "start"}, **delivery)
    first = refreshing.delay()
    deliver(refreshing, first.id)
    second = refreshing.delay()
    assert second.id != first.id
    deliver(refreshing, first.id)
    assert inside == [{}, dict.fromkeys(kept(app)[0], second.id)]
    assert list(kept(app)[0].values()) == [second.id]


def test_a_period_holds_the_key_past_the_end(app):
    """With a period and no `until` the key is held for so many seconds, whatever becomes of the task."""
    refresh = task(app, unique={"period": 3600})
    first = refresh.delay()
    deliver(refresh, first.id)
    assert refresh.delay().id == first.id
    past = "now() - interval '1 s'" if app.outbox.engine.dialect.name == "postgresql" else "'2020-01-01 00:00:00.000'"
    rows(app, f"UPDATE catga_unique_keys SET expires_at = {past}")
    second = refresh.delay()
    assert second.id != first.id
    assert kept(app)[0] == dict.fromkeys(kept(app)[0], second.id)


def test_a_stale_delivery_frees_nobody_elses_key(app):
    """A message whose key has expired, and is another's by now, leaves it alone when it ends."""
    refresh = task(app, unique=True)
    first = refresh.delay()
    taken = message(app, first.id)
    rows(app, "DELETE FROM catga_unique_keys")
    second = refresh.delay()
    deliver(refresh, first.id, taken)
    assert list(kept(app)[0].values()) == [second.id]


def test_keys_end_at_the_latest_after_a_day(app, engine):
    """The relay deletes keys whose longest time is over."""
    refresh = task(app, unique=True)
    refresh.delay()
    refresh.apply_async(unique_key="b", unique={"until": "end", "period": 0.001})
    ages = "extract(epoch FROM expires_at - taken_at)" if engine.dialect.name == "postgresql" else (
        "(julianday(expires_at) - julianday(taken_at)) * 86400"
    )  # fmt: skip
    assert max(float(age) for (age,) in rows(app, f"SELECT {ages} FROM catga_unique_keys")) == pytest.approx(
        86400, abs=1
    )
    housekeeper = claims.Claims(engine, app.catga_settings, relay="r")
    beat = {"hostname": "h", "pid": 1, "published": 0, "tally": Tally()}
    wait_until(lambda: housekeeper.housekeep(**beat) or len(kept(app)[0]) == 1)
    housekeeper.release()


# Order


def test_messages_of_one_key_are_sent_one_after_the_other(app, delivery):
    """The next message is due when the one before has ended; those of other keys don't wait."""
    charge = task(
        app,
        lambda self, order, fail=False: 1 / 0 if fail else order,
        key=lambda order, **_: f"order-{order}",
        **delivery,
    )
    one, two, three = charge.delay(1), charge.delay(1, fail=True), charge.delay(1)
    other = charge.delay(2)
    assert status(app)["waiting"] == 2
    for result, following in ((one, [two]), (two, [three]), (three, [])):
        due = rows(app, "SELECT task_id FROM catga_outbox WHERE available_at < '9999-01-01' ORDER BY id")
        assert sorted(id_ for (id_,) in due) == sorted([result.id, other.id])
        deliver(charge, result.id)
        assert set(kept(app)[1].values()) == {other.id, *(each.id for each in following)}
    assert status(app)["waiting"] == 0


def test_a_retry_keeps_its_place(app, delivery):
    """A message that is retried, later, still goes before those behind it."""

    def charge(self, number):
        if not self.request.retries:
            raise self.retry(countdown=30)

    charging = task(app, charge, key="a", **delivery)
    first, second = charging.delay(1), charging.delay(2)
    deliver(charging, first.id)
    assert kept(app)[1] == {"a": first.id}
    assert status(app)["scheduled"] == status(app)["waiting"] == 1
    deliver(charging, first.id)
    assert kept(app)[1] == {"a": second.id}


def status(app):
    with app.outbox.engine.connect() as connection:
        return admin.status(connection)


def test_the_order_is_that_of_the_commits(app, engine):
    """A transaction that commits later comes later, whenever it enqueued; a rolled-back one is no gap (scenario 8)."""
    charge = task(app, key="a")
    with Session(engine) as early, Session(engine) as late:
        with app.outbox.join(early):
            last = charge.delay()
        with app.outbox.join(late):
            first = charge.delay()
            late.commit()
        with Session(engine) as gone, app.outbox.join(gone):
            charge.delay()
            gone.rollback()
        early.commit()
    ids = [id_ for (id_,) in rows(app, "SELECT task_id FROM catga_outbox ORDER BY id")]
    assert ids == [first.id, last.id]
    assert kept(app)[1] == {"a": first.id}


def test_an_eta_holds_up_those_behind_it(app):
    """A message whose time hasn't come has its turn all the same; one that waits keeps its countdown."""
    charge = task(app, key="a")
    first = charge.apply_async(countdown=3600)
    charge.apply_async(countdown=7200)
    assert status(app)["scheduled"] == status(app)["waiting"] == 1
    rows(app, "UPDATE catga_outbox SET scheduled = scheduled")
    deliver(charge, first.id)
    assert status(app)["scheduled"] == 1
    assert status(app)["waiting"] == 0


def test_a_message_that_comes_again_after_its_turn_is_not_run(app):
    """Scenario 19: a redelivery after the turn was passed on would run beside the next message: it has ended before."""
    ran = []
    charge = task(app, lambda self, number: ran.append(number), key="a")
    first = charge.delay(1)
    second = charge.delay(2)
    taken = message(app, first.id)
    deliver(charge, first.id, taken)
    deliver(charge, first.id, taken)
    assert ran == [1]
    assert kept(app)[1] == {"a": second.id}


def test_a_task_may_enqueue_with_its_own_key(app, delivery):
    """What a task enqueues with the key that it has goes behind those that wait, and is sent."""
    charge = task(app, lambda self, number: number == 1 and charge.delay(3), key="a", **delivery)
    first, second = charge.delay(1), charge.delay(2)
    deliver(charge, first.id)
    assert kept(app)[1] == {"a": second.id}
    deliver(charge, second.id)
    ((third,),) = rows(app, "SELECT task_id FROM catga_outbox WHERE available_at < '9999-01-01'")
    deliver(charge, third)
    assert kept(app) == ({}, {})


def test_a_replacement_goes_on_with_the_keys(app, delivery):
    """`self.replace` by another task keeps the turn and the unique key; that task's end lets them go."""
    other = task(app, **delivery)
    charge = task(app, lambda self: self.replace(other.si()), key="a", unique=True, **delivery)
    first, second = charge.delay(), other.apply_async(key="a")
    deliver(charge, first.id)
    assert kept(app)[1] == {"a": first.id}
    deliver(other, first.id)
    assert kept(app) == ({}, {"a": second.id})


def test_an_effectively_once_task_lets_go_in_its_own_transaction(app):
    """Nobody is due before the commit, and a failure at the commit itself lets go too."""
    seen = []

    def charge(self, number):
        session = current_session()
        if number == 1:
            sa.event.listen(session, "before_commit", lambda session: seen.append(kept(app)), once=True)
        if number == 2:
            session.execute(
                sa.text("CREATE TEMPORARY TABLE twice (a int UNIQUE DEFERRABLE INITIALLY DEFERRED) ON COMMIT DROP")
            )
            session.execute(sa.text("INSERT INTO twice VALUES (1), (1)"))

    if app.outbox.engine.dialect.name == "sqlite":
        pytest.skip("A second connection can't look while SQLite's one writer is at it.")
    charging = task(app, charge, key="a", delivery="effectively_once")
    ids = [charging.delay(number).id for number in (1, 2, 3)]
    deliver(charging, ids[0])
    assert seen == [({}, {"a": ids[0]})]
    assert deliver(charging, ids[1]).info.state == "FAILURE"
    assert kept(app)[1] == {"a": ids[2]}


# What never runs


def bury(app, error="no"):
    """Let everything that is due become dead letters, as a relay does."""
    held = claims.Claims(app.outbox.engine, app.catga_settings, relay="r")
    taken = held.take()
    assert held.settle([], [(row._replace(attempts=99), error) for row in taken]) == len(taken)
    held.release()
    return [row.envelope.task_id for row in taken]


def test_a_dead_letter_lets_go_and_replay_takes_again(app, engine):
    """A dead letter steps aside; replayed, it goes to the end of its key's line, or stays if its key is taken."""
    refresh, charge = task(app, unique=True), task(app, key="a")
    unique, head, second = refresh.delay(), charge.delay(), charge.delay()
    assert sorted(bury(app)) == sorted([unique.id, head.id])
    assert kept(app) == ({}, {"a": second.id})
    holder = refresh.delay()
    with engine.begin() as connection:
        assert admin.replay(connection, Selection()) == 1
    assert [id_ for (id_,) in rows(app, "SELECT task_id FROM catga_dead_letters")] == [unique.id]
    assert sorted(sent(app)) == sorted([second.id, holder.id])
    assert rows(app, "SELECT task_id FROM catga_outbox") == [(head.id,)]
    rows(app, "DELETE FROM catga_unique_keys")
    with engine.begin() as connection:
        assert admin.replay(connection, Selection(task=refresh.name)) == 1
    assert sent(app) == [unique.id]
    assert refresh.delay().id == unique.id


def test_two_replays_at_a_time_replay_once(app, engine):
    """The second one finds what the first has left, so that no key waits for a message that isn't there."""
    charge, counts, came = task(app, key="a"), [], threading.Event()
    charge.delay()
    bury(app)

    def arrive(_connection, _cursor, statement, *_rest):
        if threading.current_thread() is thread and "INSERT" in statement:
            came.set()

    def replay():
        with engine.begin() as connection:
            counts.append(admin.replay(connection, Selection()))

    thread = threading.Thread(target=replay)
    sa.event.listen(engine, "before_cursor_execute", arrive)
    with engine.begin() as connection:
        counts.append(admin.replay(connection, Selection()))
        thread.start()
        assert came.wait(20)
    thread.join(20)
    sa.event.remove(engine, "before_cursor_execute", arrive)
    assert counts == [1, 0]


def test_a_purge_lets_go(app, engine):
    """Purged messages free their keys, and the next one that is left has its turn."""
    refresh, charge, other = task(app, unique=True), task(app, key="a"), task(app, key="a")
    refresh.delay()
    charge.delay()
    charge.delay()
    last = other.delay()
    task(app).delay()
    with engine.begin() as connection:
        assert admin.purge(connection, Selection(task=charge.name)) == 2
        assert admin.purge(connection, Selection(task=refresh.name)) == 1
    assert kept(app) == ({}, {"a": last.id})
    with engine.begin() as connection:
        assert admin.purge(connection, Selection()) == 2
    assert kept(app) == ({}, {})


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unique": "arguments"}, "unique must be True"),
        ({"unique": {"by": "args"}}, "by must be 'task'"),
        ({"unique": {"until": "done"}}, "until must be 'start' or 'end'"),
        ({"unique": {"period": 0}}, "period must be a number of seconds"),
        ({"unique": {"after": 1}}, "by, until and period"),
        ({"key": 7}, "key must be a string"),
        ({"unique": True, "delivery": "at_most_once"}, "need the outbox"),
        ({"key": "a", "delivery": "at_most_once"}, "need the outbox"),
    ],
)
def test_wrong_options_are_one_clear_error(app, options, says):
    """Scenario 25: a wrong option names itself and what it may be, when the task is registered."""
    with pytest.raises(ConfigurationError, match=says):
        task(app, **options)


def test_wrong_calls_are_one_clear_error(app):
    """A call that can't keep its promise is refused before anything is enqueued."""
    unique, plain = task(app, unique=True), task(app)
    direct = task(app, delivery="at_most_once")
    for call, says in (
        (lambda: plain.apply_async(key=""), "string of 1 to 500"),
        (lambda: plain.apply_async(unique_key="x" * 501), "string of 1 to 500"),
        (lambda: direct.apply_async(key="a"), "straight to its broker"),
        (lambda: unique.apply_async((object(),)), "JSON can hold"),
        (lambda: unique.apply_async(link=plain.s()), "has a link"),
        (lambda: chain(unique.si(), plain.si()).apply_async(), "part of a chain"),
        (lambda: chain(plain.si(), unique.si(), plain.si()).apply_async(), "not the last step"),
        (lambda: group(unique.si(), plain.si()).apply_async(), "a group"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            call()
        rows(app, "DELETE FROM catga_outbox WHERE task = :name", name=plain.name)
        assert sent(app) == []
    chain(plain.si(), unique.si()).apply_async()
    chain(plain.si(), unique.si().set(unique=False), plain.si()).apply_async()
    assert len(sent(app)) == 2


def test_the_broker_expires_no_message_that_holds_a_key(app):
    """`expires` is left to the worker, which lets go: a message that the broker drops would hold its key for ever."""
    task(app, key="a").apply_async(expires=60)
    ((headers, properties, expiration),) = rows(app, "SELECT headers, properties, expiration FROM catga_outbox")
    assert json.loads(headers)["expires"]
    assert expiration is None
    assert "expiration" not in json.loads(properties)
