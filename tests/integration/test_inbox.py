"""One delivery of an effectively-once task, by Celery's own tracer on real databases (scenarios 18 to 20)."""

from __future__ import annotations

import json
import threading
import time
import uuid
from contextlib import suppress

import pytest
import sqlalchemy as sa
from celery import states
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject
from sqlalchemy.orm import Session, sessionmaker

from catga_tasks import Catga, ConfigurationError, current_session, inbox, migrate
from tests.waiting import wait_until

RAN = []


@pytest.fixture
def app(database_url):
    yield from _app(database_url)


@pytest.fixture
def postgres_app(postgres_url):
    yield from _app(postgres_url)


def _app(url):
    app = Catga("shop", broker="memory://", outbox=url, set_as_current=False)
    migrate.upgrade(app.outbox.engine)
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (word TEXT NOT NULL UNIQUE)"))
    app.task(name="follow", shared=False, delivery="effectively_once")(follow)
    app.task(name="again", shared=False)(follow)
    RAN.clear()
    yield app
    app.outbox.engine.dispose()
    app.close()


def follow(*words):
    return words


def task(app, function, **options):
    """Register a task that is run by `deliver`."""
    options = {"delivery": "effectively_once", "bind": True, "name": function.__name__, **options}
    found = app.task(shared=False, **options)(function)
    app.finalize()
    found.__trace__ = build_tracer(found.name, found, app.loader, "here", app=app)
    return found


def deliver(task, *args, task_id="1", **request):
    """Hand a message to the task as a worker does; return the tracer's (value, information, seconds, text)."""
    request = {"id": task_id, "task": task.name, "delivery_info": {}, "headers": {}, **request}
    return task.__trace__(task_id, args, {}, request)


def effect(word):
    current_session().execute(sa.text("INSERT INTO effects VALUES (:word)"), {"word": word})


def rows(app, statement):
    with app.outbox.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(statement))]


def effects(app):
    return sorted(word for (word,) in rows(app, "SELECT word FROM effects"))


def entries(app):
    return rows(app, "SELECT task_id, attempt, replaced, state FROM catga_inbox ORDER BY task_id, attempt, replaced")


def enqueued(app):
    return rows(app, "SELECT task, task_id FROM catga_outbox ORDER BY id")


def charge(self, word, how=""):
    RAN.append(word)
    effect(word)
    self.app.tasks["follow"].delay(word)
    if how:
        raise {
            "reject": Reject("no", requeue=True),
            "drop": Reject("no"),
            "ignore": Ignore(),
            "error": ValueError("no"),
        }[how]
    return f"charged {word}"


def test_effects_messages_and_the_inbox_commit_together(app):
    """One transaction holds what the task wrote, what it enqueued, and that it was run."""
    answer = deliver(task(app, charge), "a")
    assert (answer.retval, answer.info) == ("charged a", None)
    assert effects(app) == ["a"]
    assert entries(app) == [("1", 0, 0, "SUCCESS")]
    assert [name for name, _ in enqueued(app)] == ["follow"]


def test_19_a_duplicate_returns_the_first_ones_result(app):
    """Scenario 19: a redelivery after the commit runs nothing, returns the stored result and is counted."""
    charging = task(app, charge)
    link = {"callbacks": [app.tasks["follow"].s()]}
    deliver(charging, "a", **link)
    answer = deliver(charging, "a", **link)
    assert (answer.retval, answer.info, RAN) == ("charged a", None, ["a"])
    assert effects(app) == ["a"]
    assert rows(app, "SELECT task, suppressed FROM catga_inbox_counts") == [("charge", 1)]


def test_what_follows_goes_out_again_under_the_same_ids(app):
    """A duplicate's callbacks and chain steps have the first one's ids, for their own inbox to tell them apart.

    A follower that can't tell is not sent twice: it was committed with the first delivery.
    """
    charging = task(app, charge)
    follow, again = app.tasks["follow"], app.tasks["again"]
    for _ in range(2):
        deliver(charging, "a", callbacks=[follow.s(), again.s()], chain=[follow.s().set(task_id="step")])
    sent = [entry for entry in enqueued(app) if entry[0] == "follow"][1:]
    assert len(sent) == 4
    assert len(set(sent)) == 2
    assert ("follow", "step") in sent
    assert [name for name, _ in enqueued(app)].count("again") == 1


def test_19_concurrent_duplicates_run_once(postgres_app):
    """Scenario 19: a redelivery while the first delivery still runs waits for it, and then sees it."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(self, word):
        RAN.append(word)
        effect(word)
        entered.set()
        assert go_on.wait(20)
        return word

    slow_task, follows = task(postgres_app, slow), postgres_app.tasks["follow"].s().set(task_id="step")
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(deliver(slow_task, "a", chain=[follows]))) for _ in range(4)
    ]
    threads[0].start()
    assert entered.wait(20)
    for thread in threads[1:]:
        thread.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    wait_until(lambda: rows(postgres_app, waiting) == [(3,)], what="three duplicates that wait")
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert [answer.retval for answer in answers] == ["a"] * 4
    assert (RAN, effects(postgres_app)) == (["a"], ["a"])


def test_a_failure_rolls_back_and_is_kept(app):
    """The effects and messages of a task that raises are gone; its error, and the errbacks, are kept once."""
    failures = []

    class Watched(app.Task):
        def on_failure(self, exc, *_rest):
            failures.append(str(exc))
            effect("from on_failure")

    charging = task(app, charge, base=Watched)
    for _ in range(2):
        answer = deliver(charging, "a", "error", errbacks=[app.tasks["again"].signature(immutable=True, args=("x",))])
        assert answer.info.state in (states.FAILURE, states.IGNORED)
    assert (RAN, failures) == (["a"], ["no"])
    assert effects(app) == ["from on_failure"]
    assert entries(app) == [("1", 0, 0, "FAILURE")]
    assert rows(app, "SELECT error FROM catga_inbox") == [("ValueError: no",)]


def test_20_a_retry_is_kept_though_the_effects_roll_back(app):
    """Scenario 20: `self.retry` and autoretry_for leave the next attempt in the outbox, due later, once."""

    def flaky(self, word):
        RAN.append(word)
        effect(word)
        raise self.retry(exc=OSError("busy"), countdown=60)

    def automatic(self, word):
        effect(word)
        raise OSError("busy")

    for function, options in ((flaky, {}), (automatic, {"autoretry_for": (OSError,), "retry_backoff": 60})):
        with app.outbox.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM catga_outbox"))
        found = task(app, function, **options)
        for _ in range(2):
            deliver(found, "a", task_id=function.__name__)
        assert effects(app) == []
        assert enqueued(app) == [(function.__name__, function.__name__)]
        assert rows(app, "SELECT scheduled FROM catga_outbox") in ([(True,)], [(1,)])
    assert [entry[3] for entry in entries(app)] == ["RETRY", "RETRY"]
    assert rows(app, "SELECT error FROM catga_inbox") == [("OSError: busy",)] * 2
    deliver(app.tasks["flaky"], "a", task_id="flaky", retries=1)
    assert [entry[:2] for entry in entries(app)] == [("automatic", 0), ("flaky", 0), ("flaky", 1)]


def test_20_the_last_retry_fails_once(app):
    """max_retries: the attempt after the last one fails, with its handlers run once, duplicates or not."""
    failures = []

    class Watched(app.Task):
        def on_failure(self, exc, *_rest):
            failures.append(type(exc).__name__)

    def flaky(self):
        raise self.retry(exc=OSError("busy"))

    found = task(app, flaky, base=Watched, max_retries=2)
    for retries in (0, 1, 2, 2):
        deliver(found, retries=retries)
    assert failures == ["OSError"]
    assert [entry[3] for entry in entries(app)] == ["RETRY", "RETRY", "FAILURE"]


def test_a_retry_that_the_task_catches_goes_out_with_it(app):
    """`retry(throw=False)`: the task goes on, and commits together with the retry."""

    def persistent(self, word):
        self.retry(throw=False)
        effect(word)

    deliver(task(app, persistent), "a")
    assert effects(app) == ["a"]
    assert enqueued(app) == [("persistent", "1")]


@pytest.mark.parametrize(("how", "kept"), [("reject", []), ("drop", ["REJECTED"]), ("ignore", ["IGNORED"])])
def test_reject_and_ignore_roll_back(app, how, kept):
    """What is rejected to come again leaves no trace; what is over is noted."""
    deliver(task(app, charge), "a", how)
    assert (effects(app), enqueued(app)) == ([], [])
    assert [entry[3] for entry in entries(app)] == kept


def test_a_replacement_is_no_duplicate(app):
    """`self.replace` keeps what the task did, and its replacement, which has the same id, runs."""

    def replaced(self, word):
        effect(word)
        return self.replace(self.app.tasks["charge"].s("b"))

    charging = task(app, charge)
    deliver(task(app, replaced), "a")
    assert effects(app) == ["a"]
    assert enqueued(app) == [("charge", "1")]
    deliver(charging, "b", replaced_task_nesting=1)
    assert effects(app) == ["a", "b"]
    assert entries(app) == [("1", 0, 0, "REPLACED"), ("1", 0, 1, "SUCCESS")]


def test_a_chain_takes_a_tasks_place(app):
    """The steps of a replacement have ids of their own, but the last: none of them goes with the rollback."""

    def replaced(self):
        return self.replace(self.app.tasks["follow"].s(1) | self.app.tasks["follow"].s())

    deliver(task(app, replaced))
    assert [name for name, _ in enqueued(app)] == ["follow"]


def test_a_task_may_not_end_its_transaction(app):
    """A commit or a rollback by the task is an error before anything of it is committed."""

    def ends(self, word, how):
        effect(word)
        self.app.tasks["follow"].delay(word)
        whose = self.session.connection() if how == "commit_its_connection" else self.session
        getattr(whose, how.partition("_")[0])()

    found = task(app, ends)
    for how in ("commit", "commit_its_connection", "rollback", "close"):
        answer = deliver(found, how, how, task_id=how)
        assert answer.info.state == states.FAILURE
        assert isinstance(answer.info.retval, ConfigurationError), answer.info.retval
        assert "Task ends " in str(answer.info.retval)
    assert effects(app) == []


def test_savepoints_are_the_tasks_own(app):
    """What may fail goes into session.begin_nested(): its rollback takes its messages along, and nothing else."""

    def careful(self, word):
        effect(word)
        try:
            with self.session.begin_nested():
                self.app.tasks["follow"].delay("dropped")
                effect(word)
        except sa.exc.IntegrityError:
            effect(f"not twice: {word}")
        with self.session.begin_nested():
            self.app.tasks["follow"].delay("kept")

    answer = deliver(task(app, careful), "a")
    assert answer.info is None
    assert effects(app) == ["a", "not twice: a"]
    assert len(enqueued(app)) == 1


@pytest.mark.parametrize("late", [False, True], ids=["task", "on_success"])
def test_an_error_that_is_caught_without_a_savepoint_fails_the_task(app, late):
    """PostgreSQL would roll back at the commit, and say nothing: the effects, and the inbox's row, would be lost."""

    def twice(word):
        effect(word)
        effect(word)

    def careless(self, word):
        effect("first")
        if not late:
            with suppress(sa.exc.IntegrityError):
                twice(word)

    found = task(app, careless, on_success=lambda *_: late and twice("a"))
    answer = deliver(found, "a")
    if app.outbox.engine.dialect.name == "sqlite":
        # Only the statement is undone there.
        assert (answer.info, effects(app)) == (None, ["a", "first"])
        return
    assert "session.begin_nested()" in str(answer.info.retval)
    assert (effects(app), entries(app)) == ([], [("1", 0, 0, "FAILURE")])
    assert deliver(found, "a").info.state == states.IGNORED


@pytest.mark.parametrize("words", ["a\0b", "caf\udce9.txt"], ids=["NUL", "surrogate"])
def test_an_error_in_words_that_no_database_takes(app, words):
    """A failure and a retry are kept whatever their error says; the message doesn't come again for ever."""
    app.conf.result_backend = "outbox://"

    def failing(self, words):
        effect("first")
        if not self.request.retries:
            raise self.retry(exc=ValueError(words))
        raise ValueError(words)

    found = task(app, failing)
    assert deliver(found, words).info.state == states.RETRY
    assert enqueued(app) == [("failing", "1")]
    assert repr(deliver(found, words, retries=1).info.retval) == repr(ValueError(words))
    assert (effects(app), entries(app)) == ([], [("1", 0, 0, "RETRY"), ("1", 1, 0, "FAILURE")])
    assert rows(app, "SELECT status FROM catga_results") == [("FAILURE",)]


def test_a_second_session_commits_by_itself(postgres_app):
    """The documented rule: what another session writes isn't part of the task's transaction."""

    def aside(self, word):
        with Session(self.app.outbox.engine) as other, other.begin():
            other.execute(sa.text("INSERT INTO effects VALUES ('aside')"))
        effect(word)
        raise ValueError

    deliver(task(postgres_app, aside), "a")
    assert effects(postgres_app) == ["aside"]


def test_a_result_that_cant_be_held_fails_before_the_commit(app):
    """The error names the task and the serializer, and nothing of the task is committed."""

    def strange(self, word):
        effect(word)
        return object()

    answer = deliver(task(app, strange), "a", chain=[app.tasks["follow"].s()])
    assert answer.info.state == states.FAILURE
    assert "result_serializer (json)" in str(answer.info.retval)
    assert (effects(app), enqueued(app)) == ([], [])
    # Nobody asks for this one.
    assert deliver(app.tasks["strange"], "b", task_id="2", ignore_result=True).info is None


def test_04_a_database_that_goes_away_is_no_failure(postgres_app, monkeypatch):
    """Scenario 4: the task's connection is cut amid the task, whether it notices or not, and at its commit."""
    monkeypatch.setattr("catga_tasks.worker.OUTAGE_SECONDS", (0.01, 0.01))

    def cut(self, word, how):
        effect(word)
        pid = current_session().scalar(sa.text("SELECT pg_backend_pid()"))
        with self.app.outbox.engine.connect() as other:
            other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        if how != "late":
            with suppress(*([sa.exc.SQLAlchemyError] if how == "caught" else [])):
                effect(word + word)

    found = task(postgres_app, cut)
    for how in ("early", "caught", "late"):
        answer = deliver(found, "a", how)
        assert answer.info.state == states.REJECTED
        assert answer.info.retval.requeue
    assert (effects(postgres_app), entries(postgres_app)) == ([], [])


def test_04_a_file_that_is_busy_at_the_commit_is_no_failure(sqlite_url, monkeypatch):
    """Scenario 4: SQLite's commit waits too long for a reader: the message goes back, and nobody is locked out."""
    monkeypatch.setattr("catga_tasks.worker.OUTAGE_SECONDS", (0.01, 0.01))
    reader = sa.create_engine(sqlite_url)
    for app in _app(f"{sqlite_url}?timeout=0.1"):
        found = task(app, charge)
        with reader.connect() as reading:
            reading.exec_driver_sql("BEGIN")
            reading.exec_driver_sql("SELECT * FROM catga_inbox").all()
            assert deliver(found, "a").info.state == states.REJECTED
        with reader.begin() as writing:
            writing.execute(sa.text("INSERT INTO effects VALUES ('other')"))
        assert (effects(app), entries(app)) == (["other"], [])
        assert deliver(found, "a").info is None
        assert effects(app) == ["a", "other"]
    reader.dispose()


def test_a_lease_that_cant_be_waited_for_is_no_failure(postgres_app, monkeypatch):
    """A message that meets a lease goes back to the broker if the outbox can't take it meanwhile."""
    monkeypatch.setattr("catga_tasks.worker.OUTAGE_SECONDS", (0.01, 0.01))
    found = task(postgres_app, charge, delivery="at_least_once", deduplicate=True)
    with postgres_app.outbox.engine.begin() as connection:
        inbox.take_lease(connection, inbox.Key("1"), "charge", owner="another", seconds=60)
        connection.execute(
            sa.text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'out' USING ERRCODE = '57P01'; END $$"
            )
        )
        connection.execute(
            sa.text("CREATE TRIGGER refuse BEFORE INSERT ON catga_outbox FOR EACH ROW EXECUTE FUNCTION refuse()")
        )
    answer = deliver(found, "a", args=["a"], kwargs={})
    assert answer.info.state == states.REJECTED
    assert answer.info.retval.requeue
    assert (RAN, enqueued(postgres_app)) == ([], [])


def test_15_a_serialization_failure_is_no_failure(postgres_app, monkeypatch):
    """Scenario 15: the transaction that the database chose as a victim is run again."""
    monkeypatch.setattr("catga_tasks.worker.OUTAGE_SECONDS", (0.01, 0.01))
    app = postgres_app
    engine = app.outbox.engine.execution_options(isolation_level="SERIALIZABLE")
    app.outbox._source = sessionmaker(engine)
    app.outbox._engine = None

    def skewed(self, mine):
        session = current_session()
        session.execute(sa.text("SELECT count(*) FROM effects")).all()
        if RAN.append(mine) is None and len(RAN) == 1:
            with engine.begin() as other:
                other.execute(sa.text("SELECT count(*) FROM effects")).all()
                other.execute(sa.text("INSERT INTO effects VALUES ('other')"))
        effect(mine)

    found = task(app, skewed)
    assert deliver(found, "a").info.state == states.REJECTED
    assert effects(app) == ["other"]
    assert deliver(found, "a").info is None
    assert effects(app) == ["a", "other"]


def test_a_commit_that_is_refused_is_a_failure(postgres_app):
    """A deferred constraint speaks at the commit: the task has failed after all, and its handlers know."""
    failures = []

    class Watched(postgres_app.Task):
        def on_failure(self, exc, *_rest):
            failures.append(type(exc).__name__)

    with postgres_app.outbox.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE late (n INT UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    def doubled(self):
        current_session().execute(sa.text("INSERT INTO late VALUES (1), (1)"))

    answer = deliver(task(postgres_app, doubled, base=Watched))
    assert (answer.info.state, failures) == (states.FAILURE, ["IntegrityError"])
    assert entries(postgres_app) == [("1", 0, 0, "FAILURE")]


def test_a_result_backend_hears_of_it_after_the_commit(app, redis_url):
    """Who sees a result on Redis finds the task's effects, also where its first worker died before it could tell."""
    app.conf.result_backend = redis_url
    charging = task(app, charge)
    seen = []
    store = charging.backend._store_result

    def watched(task_id, result, state, *args, **options):
        seen.append((state, effects(app)))
        return store(task_id, result, state, *args, **options)

    charging.backend._store_result = watched
    deliver(charging, "a")
    assert seen == [("SUCCESS", ["a"])]
    result = charging.AsyncResult("1")
    assert result.get(timeout=5) == "charged a"
    result.forget()
    deliver(charging, "a")
    assert charging.AsyncResult("1").get(timeout=5) == "charged a"
    deliver(charging, "b", "error", task_id="2")
    charging.AsyncResult("2").forget()
    deliver(charging, "b", "error", task_id="2")
    with pytest.raises(ValueError, match="no"):
        charging.AsyncResult("2").get(timeout=5)


def test_19_the_inbox_forgets_after_its_retention(app):
    """Scenario 19: a duplicate after the inbox's retention runs again; running deliveries aren't forgotten."""
    charging = task(app, charge)
    deliver(charging, "a")
    with app.outbox.engine.begin() as connection:
        key = inbox.Key("leased")
        assert inbox.take_lease(connection, key, "x", owner="me", seconds=60)
        assert inbox.expire(connection, 3600, 10) == 0
        connection.execute(sa.text("UPDATE catga_inbox SET received_at = '2000-01-01 00:00:00'"))
        assert inbox.expire(connection, 3600, 10) == 1
    assert entries(app) == [("leased", 0, 0, "STARTED")]


def test_19_messages_too_old_to_tell_are_counted(app):
    """Scenario 19: one that was due before all that the inbox remembers runs, and is counted for `outbox status`."""
    charging = task(app, charge)
    day = 86400
    app.conf.inbox_retention = 7 * day
    charging.delay("x")
    ((headers,),) = rows(app, "SELECT headers FROM catga_outbox")
    due = json.loads(headers)["catga_due_at"]
    assert abs(due - time.time()) < 60
    deliver(charging, "a", task_id="1", catga_due_at=due - 6 * day)
    assert rows(app, "SELECT task, too_old FROM catga_inbox_counts") == []
    deliver(charging, "b", task_id="2", catga_due_at=due - 8 * day)
    assert rows(app, "SELECT task, too_old FROM catga_inbox_counts") == [("charge", 1)]
    assert effects(app) == ["a", "b"]


def test_a_relay_forgets_in_small_batches(app):
    """`inbox_retention` and `outbox_retention` are the relay's work."""
    deliver(task(app, charge), "a")
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("UPDATE catga_inbox SET received_at = '2000-01-01 00:00:00'"))
        connection.execute(sa.text("DELETE FROM catga_outbox"))
    app.relay().run_once()
    assert entries(app) == []


def test_apply_runs_in_a_transaction_of_its_own(app):
    """Eager calls have no message and so no inbox; their effects commit, or roll back, all the same."""
    charging = task(app, charge)
    assert charging.apply(("a",)).get() == "charged a"
    assert effects(app) == ["a"]
    assert charging.apply(("b", "error")).state == states.FAILURE
    assert (effects(app), entries(app)) == (["a"], [])
    assert [name for name, _ in enqueued(app)] == ["follow"]


def test_current_session_is_the_running_tasks_alone(app):
    """Outside such a task it says what to do."""
    with pytest.raises(ConfigurationError, match="effectively_once"):
        current_session()

    def plain(self):
        return current_session()

    answer = deliver(task(app, plain, delivery="at_least_once"))
    assert isinstance(answer.info.retval, ConfigurationError)


def test_tasks_called_as_functions_share_the_transaction(app):
    """A task that calls another one's code runs it as a function, in its own transaction."""
    charging = task(app, charge)

    def outer(self, word):
        effect(f"outer {word}")
        return charging(word)

    answer = deliver(task(app, outer), "a")
    assert answer.retval == "charged a"
    assert effects(app) == ["a", "outer a"]
    assert entries(app) == [("1", 0, 0, "SUCCESS")]


def test_a_sessionmaker_of_the_application_gives_the_session(app):
    """`outbox=Session`: tasks get sessions of that kind, with its options."""

    class Own(Session):
        """A session of the application's."""

    app.outbox._source = sessionmaker(app.outbox.engine, class_=Own)

    def kind(self):
        return type(self.session).__name__

    assert deliver(task(app, kind)).retval == "Own"


def test_ids_are_the_messages(app):
    """Another id is another message."""
    charging = task(app, charge)
    for word in ("a", "b"):
        deliver(charging, word, task_id=str(uuid.uuid4()))
    assert effects(app) == ["a", "b"]
