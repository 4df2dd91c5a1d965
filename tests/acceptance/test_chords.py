"""Chords whose results are in the outbox's database, on real workers that are killed (scenarios 19 and 21)."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy as sa
from celery import chain, chord

from catga_tasks import Catga, migrate
from tests.waiting import wait_until

APP = """
import os, signal, time, sqlalchemy as sa
from catga_tasks import Catga, current_session

app = Catga("chords", broker=os.environ["BROKER"], backend="outbox://", outbox=os.environ["OUTBOX"])
app.conf.update(
    worker_prefetch_multiplier=2, broker_connection_retry_on_startup=True, outbox_poll_interval_max=0.2,
    broker_transport_options=(
        {"ack_wait": 1.5, "stream_prefix": os.environ["PREFIX"]} if os.environ["BROKER"].startswith("nats")
        else {"visibility_timeout": 3, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1,
              "unacked_mutex_expire": 1}
    ),
)

def first(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def die_first(name, victim):
    if first(name):
        os.kill(victim, signal.SIGKILL)

@app.task(name="once", delivery="effectively_once")
def once(number, how=""):
    session = current_session()
    session.execute(sa.text("INSERT INTO effects VALUES (:word)"), {"word": f"once {number}"})
    if how == "child":
        die_first(f"child {number}", os.getpid())
    elif how == "worker":
        # At most once: the part that may be lost with its worker is over.
        count = sa.text("SELECT count(*) FROM catga_chord_parts WHERE position = 4")
        while session.scalar(count) == 0 and not os.path.exists(f"worker {number}"):
            time.sleep(0.1)
        die_first(f"worker {number}", os.getppid())
    elif how == "committed" and first(f"committed {number}"):
        sa.event.listen(session, "after_commit", lambda session: os.kill(os.getpid(), signal.SIGKILL))
    return number

@app.task(name="twice")
def twice(number, how=""):
    if how == "child":
        die_first(f"twice {number}", os.getpid())
    return number

@app.task(name="straight", delivery="at_most_once", ignore_result=True)
def straight(number):
    return number

@app.task(name="body", delivery="effectively_once")
def body(numbers):
    word = " ".join(map(str, numbers))
    current_session().execute(sa.text("INSERT INTO effects VALUES (:word)"), {"word": f"body {word}"})
    return sum(numbers)
"""


@pytest.fixture(params=["nats", "redis"])
def shop(request, tmp_path, postgres_url, processes):
    """Workers of the application above, and the application here."""
    kind = request.param
    url = request.getfixturevalue("redis_url" if kind == "redis" else "nats_server")
    prefix = f"chords-{uuid.uuid4().hex[:8]}"
    env = {"OUTBOX": postgres_url, "BROKER": url, "PREFIX": prefix}
    (tmp_path / "chords.py").write_text(APP)
    app = Catga("chords", broker=url, backend="outbox://", outbox=postgres_url, set_as_current=False)
    if kind == "nats":
        app.conf.broker_transport_options = {"stream_prefix": prefix, "ack_wait": 1.5}
    migrate.upgrade(app.outbox.engine)
    with app.outbox.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (word TEXT NOT NULL)"))

    def worker():
        process = processes.celery(
            "chords", "worker", "-c", "2", "-n", f"w{uuid.uuid4().hex[:8]}", "-l", "INFO", "--outbox-relay",
            "--without-gossip", "--without-mingle", env=env, cwd=tmp_path,
        )  # fmt: skip
        wait_until(lambda: " ready." in process.log() or not process.alive(), deadline=60, what="a ready worker")
        return process

    yield app, worker
    processes.end()
    if kind == "nats":
        with app.connection_for_write() as connection:
            connection.default_channel.queue_delete("celery")
    app.outbox.engine.dispose()
    app.close()


def ask(app, statement):
    with app.outbox.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(statement))]


def test_19_21_a_chords_body_runs_once_whatever_is_killed(shop):
    """Scenarios 19 and 21: SIGKILL inside parts, after a part's commit and to a whole worker; the body runs once.

    Its parts are of every delivery, its result reaches the chord around it, and nothing polls.
    """
    app, worker = shop
    once, twice, straight, body = (app.signature(name) for name in ("once", "twice", "straight", "body"))
    straight.set(ignore_result=True)
    workers = [worker(), worker()]
    inner = chord([once.clone((number,)) for number in range(4)], body.clone())
    parts = [
        once.clone((10, "child")),
        once.clone((11, "committed")),
        once.clone((12, "worker")),
        twice.clone((13, "child")),
        straight.clone((14,)),
        chain(twice.clone((15,)), twice.clone()),
        inner,
    ]
    with app.outbox.engine.connect() as connection, app.outbox.join(connection):
        chord(parts, body.clone()).apply_async()
        connection.rollback()
    with app.outbox.engine.begin() as connection, app.outbox.join(connection):
        result = chord(parts, body.clone()).apply_async()
    wait_until(lambda: not all(each.alive() for each in workers), deadline=60, what="a worker that is killed")
    worker()
    assert result.get(timeout=60) == 10 + 11 + 12 + 13 + 14 + 15 + 6
    wait_until(lambda: ask(app, "SELECT count(*) FROM catga_outbox") == [(0,)], what="an empty outbox")
    expected = ["body 0 1 2 3", "body 10 11 12 13 14 15 6", *(f"once {n}" for n in (0, 1, 2, 3, 10, 11, 12))]
    assert sorted(word for (word,) in ask(app, "SELECT word FROM effects")) == sorted(expected)
    assert ask(app, "SELECT size, returned FROM catga_chords ORDER BY size") == [(4, 4), (7, 7)]
    assert ask(app, "SELECT count(*) FROM catga_chord_parts") == [(0,)]
    assert not any("chord_unlock" in each.log() for each in workers)


def test_25_a_worker_without_the_tables_says_which_command(tmp_path, processes, sqlite_url):
    """Scenario 25: results that can't be stored are found out at the start, though no task needs the inbox."""
    (tmp_path / "bare.py").write_text(
        f'from catga_tasks import Catga\napp = Catga("bare", broker="memory://", backend="outbox://", '
        f'outbox="{sqlite_url}")\n'
    )
    process = processes.celery("bare", "worker", "-P", "solo", cwd=tmp_path)
    assert process.wait_exit() == 1
    assert "outbox migrate" in process.log()
    assert "Traceback" not in process.log()
