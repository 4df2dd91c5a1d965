"""The result backend `outbox://`: what it stores, and with which transaction (scenarios 16, 18, 19 and 25)."""

from __future__ import annotations

import asyncio
import threading

import pytest
import sqlalchemy as sa
from celery import Celery, chain, chord, group, states
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError
from celery.exceptions import Reject as RejectError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import EncodeError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from catga_tasks import Catga, ConfigurationError, TransactionRequired, current_session, migrate
from catga_tasks.backend import OutboxBackend
from tests.integration.test_inbox import deliver, effect, effects, rows, task
from tests.waiting import wait_until

TABLES = ("catga_results", "catga_groups", "catga_chords", "catga_chord_parts", "catga_outbox")


@pytest.fixture
def app(engine):
    yield from _app(engine)


@pytest.fixture
def postgres_app(postgres_url):
    engine = sa.create_engine(postgres_url)
    migrate.upgrade(engine)
    yield from _app(engine)
    engine.dispose()


def _app(engine):
    app = Catga("shop", broker="memory://", backend="outbox://", outbox=engine, set_as_current=False)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (word TEXT NOT NULL UNIQUE)"))
    register(app)
    yield app
    app.close()


def register(app, **options):
    """Define what the canvases are made of."""
    app.conf.broker_transport_options = {"polling_interval": 0.01}

    @app.task(name="add", shared=False, **options)
    def add(*numbers):
        return sum(each if isinstance(each, int) else sum(each) for each in numbers)

    @app.task(name="show", shared=False, **options)
    def show(value):
        return value

    @app.task(name="quiet", shared=False, ignore_result=True, **options)
    def quiet(value):
        return value

    @app.task(name="fail", shared=False, **options)
    def fail(*_args):
        raise ValueError("out of stock")

    @app.task(name="flaky", shared=False, bind=True, max_retries=3, default_retry_delay=0, **options)
    def flaky(self, value):
        if self.request.retries < 2:
            raise self.retry(exc=ValueError("busy"))
        return value

    @app.task(name="failed", shared=False)
    def failed(_task_id):
        """An errback with one parameter is sent as a task."""


def counts(app):
    return {table: rows(app, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


NOTHING = dict.fromkeys(TABLES, 0)


class Running:
    """A worker and a relay in this process; `ran` are the names of the tasks that it ran."""

    def __init__(self, app):
        self.ran = []
        self._app = app
        self._relay = app.relay() if hasattr(app, "relay") else None
        self._thread = threading.Thread(target=self._relay.run) if self._relay else None
        self._worker = start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30)

    def __enter__(self):
        from celery.signals import task_prerun

        task_prerun.connect(self._note)
        if self._thread:
            self._thread.start()
        self._worker.__enter__()
        return self

    def __exit__(self, *error):
        from celery.signals import task_prerun

        try:
            self._worker.__exit__(*error)
        finally:
            task_prerun.disconnect(self._note)
            if self._thread:
                self._relay.stop()
                self._thread.join(30)

    def _note(self, sender, **_options):
        self.ran.append(sender.name)


@pytest.fixture(params=["celery", "outbox on postgresql", "outbox on sqlite"])
def either(request, tmp_path):
    """An application with Celery's own database backend, and with ours."""
    kind = request.param.rpartition(" ")[2]
    if kind == "celery":
        app = Celery("shop", broker="memory://", backend=f"db+sqlite:///{tmp_path / 'celery.db'}", set_as_current=False)
        register(app)
        yield app
        app.close()
        return
    engine = sa.create_engine(request.getfixturevalue("postgres_url" if kind == "postgresql" else "sqlite_url"))
    migrate.upgrade(engine)
    app = Catga("shop", broker="memory://", backend="outbox://", outbox=engine, set_as_current=False)
    register(app)
    yield app
    engine.dispose()
    app.close()


def test_a_result_shows_what_celerys_database_backend_shows(either):
    """States, values, tracebacks, children, extended fields, groups: the same `AsyncResult`, whichever stored it."""
    app = either
    app.conf.update(result_extended=True, task_track_started=True)

    @app.task(name="parent", shared=False, bind=True)
    def parent(self, number, *, word="no"):
        self.update_state(state="PROGRESS", meta={"done": number})
        seen.append((self.AsyncResult(self.request.id).state, self.AsyncResult(self.request.id).result))
        return [app.tasks["show"].delay(number).id, word]

    seen = []
    with Running(app):
        done = parent.apply_async((1,), {"word": "y\x00s"}, stamped_headers=["order"], order="7")
        child, word = done.get(timeout=20)
        wait_until(lambda: app.AsyncResult(child).ready(), what="the child")
        failed = app.tasks["fail"].delay(1, (2, "three"))
        with pytest.raises(ValueError, match="out of stock"):
            failed.get(timeout=20)
        flaky = app.tasks["flaky"].delay("z")
        assert flaky.get(timeout=20) == "z"
        quiet = app.tasks["quiet"].delay(1)
        several = group(app.tasks["show"].s(number) for number in range(5)).apply_async()
        several.save()
        assert several.get(timeout=20) == [0, 1, 2, 3, 4]
        mixed = app.GroupResult("mixed", [app.AsyncResult(child), app.AsyncResult(failed.id)])
        assert [str(value) for value in mixed.get(propagate=False, timeout=20)] == ["1", "out of stock"]
    if app.backend.__class__ is not OutboxBackend or app.outbox.engine.dialect.name == "postgresql":
        # On SQLite the task's transaction is the one writer.
        assert seen == [("PROGRESS", {"done": 1})]
    found = app.AsyncResult(done.id)
    assert (found.state, found.result, word) == ("SUCCESS", [child, "y\x00s"], "y\x00s")
    assert [each.id for each in found.children] == [child]
    assert (found.name, list(found.args), found.kwargs, found.retries) == ("parent", [1], {"word": "y\x00s"}, 0)
    assert found.queue == "celery"
    assert found.worker
    assert found.date_done is not None
    assert found._get_task_meta()["order"] == "7"
    failure = app.AsyncResult(failed.id)
    assert (failure.state, repr(failure.result)) == ("FAILURE", "ValueError('out of stock')")
    assert "raise ValueError" in failure.traceback
    assert failure.date_done is not None
    assert app.AsyncResult(flaky.id).retries == 2
    for nothing in (app.AsyncResult(quiet.id), app.AsyncResult("nobody's")):
        assert (nothing.state, nothing.result, nothing.date_done) == ("PENDING", None, None)
        assert (nothing.exists(), found.exists()) == (False, True)
    restored = app.GroupResult.restore(several.id)
    assert (restored, restored.get(timeout=5)) == (several, [0, 1, 2, 3, 4])
    restored.delete()
    assert app.GroupResult.restore(several.id) is None
    done.forget()
    assert app.AsyncResult(done.id).state == "PENDING"
    with pytest.raises(CeleryTimeoutError):
        app.AsyncResult("nobody's").get(timeout=0.05)
    with pytest.raises(CeleryTimeoutError):
        app.GroupResult("nobody's", [app.AsyncResult("a"), app.AsyncResult(child)]).get(timeout=0.05)


def test_a_success_stays(app):
    """What a repeated run says later doesn't change a result; a state that is no success does."""
    backend = app.backend
    for state, value in (("STARTED", {}), ("FAILURE", ValueError("no")), ("SUCCESS", 1), ("FAILURE", KeyError("late"))):
        backend.store_result("1", value, state)
    assert (app.AsyncResult("1").state, app.AsyncResult("1").result) == ("SUCCESS", 1)


def canvases(app):
    """Name each canvas, with its result."""
    add, show, quiet, flaky, fail = (app.tasks[name] for name in ("add", "show", "quiet", "flaky", "fail"))
    return {
        "chord": (chord([show.s(number) for number in range(12)], show.s()), list(range(12))),
        "chord in a chain": (chain(add.s(1), chord([add.s(2), add.s(3)], add.s()), add.s(5)), 12),
        "group before a task": (chain(group(add.s(1), add.s(2)), show.s()), [1, 2]),
        "group in a chord": (chord([show.s(1), group(show.s(2), show.s(2))], show.s()), [1, 2, 2]),
        "chain that ends in a group in a chord": (
            chord([chain(show.s(1), group(add.s(1), add.s(2))), show.s(4)], show.s()),
            [[2, 3], 4],
        ),
        "chord of chords": (
            chord([chord([add.s(1), add.s(2)], add.s()), chain(add.s(1), add.s(5))], show.s()),
            [3, 6],
        ),
        "chord whose body is a chord": (chord([show.s(1), show.s(2)], chord([add.s(3), add.s(4)], show.s())), [6, 7]),
        "results that are ignored": (chord([quiet.s(1), show.s(2)], show.s()), [1, 2]),
        "a part that is retried": (chord([flaky.s(1), show.s(2)], show.s()), [1, 2]),
        "a generator": (chord((show.s(number) for number in range(3)), show.s()), [0, 1, 2]),
        "a part that fails": (chord([show.s(1), fail.s()], show.s()), ChordError),
        "a chain that fails in a chord": (chord([chain(fail.s(), show.s()), show.s(1)], show.s()), ChordError),
        "a chord of a chord that fails": (
            chord([chord([fail.s(), show.s(1)], show.s()), show.s(2)], show.s()),
            ChordError,
        ),
    }


@pytest.fixture
def canvas_app(request):
    """An application whose results are in Redis, as Celery keeps them, or in the outbox's database."""
    kind = request.param
    engine = sa.create_engine(request.getfixturevalue("sqlite_url" if kind == "sqlite" else "postgres_url"))
    migrate.upgrade(engine)
    backend = request.getfixturevalue("redis_url") if kind == "redis" else "outbox://"
    app = Catga("shop", broker="memory://", backend=backend, outbox=engine, set_as_current=False)
    yield app
    engine.dispose()
    app.close()


@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header")
@pytest.mark.parametrize(
    ("canvas_app", "delivery"),
    [
        ("redis", "at_least_once"),
        ("postgresql", "at_least_once"),
        ("postgresql", "effectively_once"),
        ("postgresql", "at_most_once"),
        ("sqlite", "effectively_once"),
    ],
    indirect=["canvas_app"],
)
def test_a_canvas_gives_what_it_gives_with_redis(canvas_app, delivery):
    """Nested canvases, ignored results, retries and failures: the body gets what it gets with Celery's Redis backend.

    Nothing polls for it, and nothing but the counters, each of them full, is left.
    """
    app = canvas_app
    register(app, delivery=delivery)
    errback = app.tasks["failed"].s()
    tried = canvases(app)
    if not isinstance(app.backend, OutboxBackend):
        # It waits for ever there: the outer chord never hears of the inner one's failure.
        del tried["a chord of a chord that fails"]
    with Running(app) as running:
        found = {
            name: (canvas.on_error(errback) if expected is ChordError else canvas).apply_async()
            for name, (canvas, expected) in tried.items()
        }
        for name, (_, expected) in tried.items():
            value = found[name].get(timeout=30, propagate=False, disable_sync_subtasks=False)
            if expected is ChordError:
                assert isinstance(value, ChordError), name
                assert "out of stock" in str(value)
            else:
                assert (value, name) == (expected, name)
        wait_until(lambda: counts(app)["catga_outbox"] == 0, what="the errbacks")
        wait_until(lambda: running.ran.count("failed") >= 2, what="the bodies' errbacks")
    assert "celery.chord_unlock" not in running.ran
    assert counts(app)["catga_chord_parts"] == 0
    assert rows(app, "SELECT count(*) FROM catga_chords WHERE size IS NULL OR size <> returned") == [(0,)]


def shapes(app):
    add, show = app.tasks["add"], app.tasks["show"]
    return {
        "group": group(add.s(1), add.s(2)),
        "chord": chord([add.s(1), add.s(2)], add.s()),
        "nested": chain(add.s(1), chord([add.s(2), group(add.s(3), add.s(4))], add.s()), add.s(5)),
        "complex": chord([chain(add.s(1), group(add.s(1), add.s(2))), chord([add.s(1)] * 2, add.s())], show.s()),
    }


def send(app, shape):
    """Send a canvas, and save what it is of a group."""
    result = shapes(app)[shape].apply_async()
    (result if shape == "group" else app.GroupResult(f"saved {shape}", [result])).save()


@pytest.mark.parametrize("shape", ["group", "chord", "nested", "complex"])
def test_18_a_rolled_back_canvas_leaves_nothing_in_any_table(app, shape):
    """Scenario 18: no message, no counter, no saved group of a transaction or savepoint that is rolled back."""
    engine = app.outbox.engine
    with Session(engine) as session, app.outbox.join(session):
        send(app, shape)
        session.rollback()
    assert counts(app) == NOTHING
    with engine.connect() as connection, app.outbox.join(connection):
        send(app, shape)
        connection.rollback()
    assert counts(app) == NOTHING
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        app.tasks["add"].delay(7)
        with session.begin_nested() as savepoint:
            send(app, shape)
            savepoint.rollback()
    assert counts(app) == {**NOTHING, "catga_outbox": 1}


def test_18_a_canvas_and_its_group_commit_together(app):
    """Scenario 18: with the commit the messages, the counter and the saved group are there, and not before."""
    with Session(app.outbox.engine) as session, session.begin(), app.outbox.join(session):
        send(app, "chord")
        assert counts(app) == NOTHING
        assert app.GroupResult.restore("saved chord") is None
    assert counts(app) == {**NOTHING, "catga_outbox": 2, "catga_chords": 1, "catga_groups": 1}
    assert rows(app, "SELECT size, returned FROM catga_chords") == [(2, 0)]
    assert len(app.GroupResult.restore("saved chord")) == 1


def test_18_asyncio_too(postgres_app):
    """Scenario 18: a chord and its saved group in an AsyncSession, without I/O in between."""
    app = postgres_app
    engine = create_async_engine(app.outbox.engine.url.set(drivername="postgresql+asyncpg"))

    async def order(*, fails):
        async with async_sessionmaker(engine)() as session:
            await session.execute(sa.text("SELECT 1"))
            with app.outbox.join(session):
                send(app, "chord")
            await (session.rollback() if fails else session.commit())

    async def both():
        await order(fails=True)
        assert counts(app) == NOTHING
        await order(fails=False)
        await engine.dispose()

    asyncio.run(both())
    assert counts(app) == {**NOTHING, "catga_outbox": 2, "catga_chords": 1, "catga_groups": 1}


def test_18_outside_a_transaction_a_header_is_sent_as_a_whole(app):
    """A chord whose second part can't be sent leaves nothing; the next chord is counted as ever."""
    add = app.tasks["add"]
    with pytest.raises(EncodeError):
        chord([add.s(1), add.s(object())], add.s()).apply_async()
    assert counts(app) == NOTHING
    add.delay(1)
    chord([add.s(1), add.s(2)], add.s()).apply_async()
    assert counts(app) == {**NOTHING, "catga_outbox": 3, "catga_chords": 1}


def test_a_group_may_be_saved_outside_a_transaction_that_tasks_require(app):
    """`outbox_require_transaction` is about tasks: a chord's counter goes with them, a group is none."""
    app.conf.outbox_require_transaction = True
    app.GroupResult("g", [app.AsyncResult("1")]).save()
    with pytest.raises(TransactionRequired, match="add"):
        shapes(app)["chord"].apply_async()
    assert counts(app) == {**NOTHING, "catga_groups": 1}


def test_19_parts_that_come_twice_count_once(app):
    """Scenario 19: a part that is run again, before or after the others, isn't counted again; the body is sent once."""
    callback = app.tasks["show"].s().set(task_id="body")
    app.backend.apply_chord(("g", []), callback)
    app.backend.set_chord_size("g", 2)
    once, twice = task(app, charge), task(app, charge, name="twice", delivery="at_least_once", bind=False)
    first = {"chord": callback, "group": "g", "group_index": 0, "task_id": "a"}
    second = {"chord": callback, "group": "g", "group_index": 1, "task_id": "b"}
    for _ in range(2):
        deliver(twice, "b", **second)
    assert counts(app) == {**NOTHING, "catga_results": 1, "catga_chords": 1, "catga_chord_parts": 1}
    for _ in range(2):
        deliver(once, "a", **first)
    deliver(twice, "b", **second)
    assert rows(app, "SELECT task, task_id FROM catga_outbox") == [("show", "body")]
    assert app.AsyncResult("a").get(timeout=1) == "charged a"


def charge(*arguments):
    if len(arguments) > 1:
        effect(arguments[-1])
    return f"charged {arguments[-1]}"


def test_19_of_parts_that_end_at_a_time_one_sends_the_body(postgres_app):
    """Eight parts commit at the same moment, in transactions of their own: the body is sent once, with all results."""
    app = postgres_app
    callback = app.tasks["show"].s().set(task_id="body")
    app.backend.apply_chord(("g", []), callback)
    app.backend.set_chord_size("g", 8)
    ready = threading.Barrier(8)

    def part(_self, word):
        effect(word)
        ready.wait(20)
        return word

    run = task(app, part)
    threads = [
        threading.Thread(
            target=deliver,
            args=(run, str(number)),
            kwargs={"chord": callback, "group": "g", "group_index": number, "task_id": f"p{number}"},
        )
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [name for (name,) in rows(app, "SELECT task_id FROM catga_outbox")] == ["body"]
    assert app.relay().run_once() == 1
    assert effects(app) == [str(number) for number in range(8)]


def test_parts_that_return_before_the_commit_are_waited_for(app):
    """At-most-once parts leave before the transaction ends; the body is enqueued by its commit, or never."""
    for commits in (False, True):
        callback = app.tasks["show"].s().set(task_id=f"body {commits}")
        with Session(app.outbox.engine) as session, app.outbox.join(session):
            app.backend.apply_chord((f"g {commits}", []), callback)
            app.backend.set_chord_size(f"g {commits}", 2)
            for number in range(2):
                # The task's own tracer, before any row of the chord is committed.
                straight = task(app, charge, name=f"straight{number}", delivery="at_most_once", bind=False)
                deliver(
                    straight, "x", task_id=f"{commits} {number}", chord=callback, group=f"g {commits}",
                    group_index=number,
                )  # fmt: skip
            session.commit() if commits else session.rollback()
    assert rows(app, "SELECT task_id FROM catga_outbox") == [("body True",)]
    assert rows(app, "SELECT count(*) FROM catga_chords WHERE size IS NULL") == [(1,)]


def test_a_result_commits_with_the_tasks_effects(postgres_app):
    """While the task runs others see its progress, but neither its effects nor its result; then they see all."""
    app = postgres_app
    seen = []

    def slow(self, word):
        effect(word)
        self.update_state(state="PROGRESS", meta="half")
        look()
        sa.event.listen(current_session(), "before_commit", look)
        return word

    def look(_session=None):
        seen.append((rows(app, "SELECT status FROM catga_results"), effects(app)))

    deliver(task(app, slow), "a")
    assert seen == [([("PROGRESS",)], [])] * 2
    assert (app.AsyncResult("1").result, effects(app)) == ("a", ["a"])


def test_16_a_result_that_cant_be_stored_gives_the_task_back(app, monkeypatch):
    """An effectively-once task whose result the database refuses is rolled back whole, and comes again."""
    monkeypatch.setattr("catga_tasks.worker.OUTAGE_SECONDS", (0.01, 0.01))
    charging = task(app, charge)
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE catga_results RENAME TO away"))
    answer = deliver(charging, "a")
    assert isinstance(answer.info.retval, RejectError)
    assert answer.info.retval.requeue
    assert (effects(app), rows(app, "SELECT count(*) FROM catga_inbox")) == ([], [(0,)])
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO catga_results"))
    assert deliver(charging, "a").retval == "charged a"
    assert (effects(app), app.AsyncResult("1").state) == (["a"], "SUCCESS")


def test_a_value_that_cant_be_held_fails_the_task_before_its_commit(app):
    """The effects roll back, and the failure, which names the mend, is the result."""

    def opaque(_self, word):
        effect(word)
        return object()

    deliver(task(app, opaque), "a")
    assert effects(app) == []
    assert app.AsyncResult("1").state == states.FAILURE
    assert "result_serializer (json) can't hold" in str(app.AsyncResult("1").result)


def test_a_failure_that_rolls_back_lists_no_children(app):
    """What a failed task had sent went with its transaction: its result doesn't name it."""

    def parent(self, _word):
        self.app.tasks["add"].delay(1)
        raise ValueError("no")

    deliver(task(app, parent), "a")
    assert (app.AsyncResult("1").state, app.AsyncResult("1").children) == ("FAILURE", None)
    assert counts(app)["catga_outbox"] == 0


def test_a_relay_deletes_what_has_expired(app):
    """Results, groups and finished chords go after `result_expires`; a chord that waits for a part stays."""
    app.conf.result_expires = 60
    for number in range(3):
        app.backend.store_result(str(number), number, "SUCCESS")
    app.GroupResult("g", [app.AsyncResult("1")]).save()
    shapes(app)["chord"].apply_async()
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM catga_outbox"))
        connection.execute(sa.text("INSERT INTO catga_chords (group_id, size, returned) VALUES ('done', 1, 1)"))
        connection.execute(sa.text("INSERT INTO catga_chords (group_id, returned) VALUES ('never', 1)"))
    app.relay().run_once()
    assert counts(app) == {**NOTHING, "catga_results": 3, "catga_groups": 1, "catga_chords": 3}
    with app.outbox.engine.begin() as connection:
        old = "now() - interval '2 minutes'" if connection.dialect.name == "postgresql" else "'2020-01-01 00:00:00'"
        for table in TABLES[:3]:
            connection.execute(sa.text(f"UPDATE {table} SET stored_at = {old} WHERE true"))
    app.backend.store_result("new", 1, "SUCCESS")
    app.relay().run_once()
    assert counts(app) == {**NOTHING, "catga_results": 1, "catga_chords": 1}
    assert rows(app, "SELECT size, returned FROM catga_chords") == [(2, 0)]


@pytest.mark.parametrize("expires", [None, 0])
def test_results_may_be_kept(app, expires):
    """Without `result_expires` nothing is deleted, neither by a relay nor by Celery's own clean-up."""
    app.conf.result_expires = expires
    app.backend.store_result("1", 1, "SUCCESS")
    with app.outbox.engine.begin() as connection:
        old = "now() - interval '9 years'" if connection.dialect.name == "postgresql" else "'2000-01-01 00:00:00'"
        connection.execute(sa.text(f"UPDATE catga_results SET stored_at = {old} WHERE true"))
    app.relay().run_once()
    app.backend.cleanup()
    assert counts(app)["catga_results"] == 1


def test_25_wrong_backends_say_what_is_wrong(app, sqlite_url):
    """Scenario 25: an address in the URL, and an application that has no outbox."""
    wrong = Catga("shop", backend="outbox://localhost/results", outbox=app.outbox.engine, set_as_current=False)
    with pytest.raises(ConfigurationError, match="takes no address"):
        _ = wrong.backend
    plain = Celery("shop", backend="catga_tasks.backend:OutboxBackend", set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"made by Catga"):
        _ = plain.backend
