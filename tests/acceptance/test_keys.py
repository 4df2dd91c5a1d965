"""Unique and ordered messages through real relays and workers that are killed (scenarios 5, 19 to 24)."""

from __future__ import annotations

import itertools
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.acceptance.test_effectively_once import Shop
from tests.waiting import wait_until

APP = """
import os, signal, time
import sqlalchemy as sa
from catga_tasks import Catga, current_session

app = Catga("once", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(
    task_ignore_result=True, worker_prefetch_multiplier=4, broker_connection_retry_on_startup=True,
    broker_transport_options=(
        {"ack_wait": 1.5, "stream_prefix": os.environ["PREFIX"]} if os.environ["BROKER"].startswith("nats")
        else {"visibility_timeout": 4, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1,
              "unacked_mutex_expire": 1}
    ),
)

def note(word, session=None):
    statement = sa.text("INSERT INTO effects VALUES (:word)")
    if session is not None:
        session.execute(statement, {"word": word})
        return
    with app.outbox.engine.begin() as connection:
        connection.execute(statement, {"word": word})

def sometimes(task, number):
    if number % 10 == 3 and task.request.retries == 0:
        raise task.retry(countdown=0.1, max_retries=3)
    if number % 10 == 7:
        raise ValueError("no")

@app.task(name="often", bind=True, throws=(ValueError,))
def often(self, key, number):
    note(f"{key} {number}") if self.request.retries or number % 10 != 3 else None
    sometimes(self, number)

@app.task(name="once", bind=True, delivery="effectively_once", throws=(ValueError,))
def once(self, key, number):
    if number % 10 == 7:
        note(f"{key} {number}")
    else:
        note(f"{key} {number}", current_session())
    sometimes(self, number)

@app.task(name="follow")
def follow(word):
    note(word)

@app.task(name="sleep", time_limit=1)
def sleep(seconds):
    time.sleep(seconds)

@app.task(name="die", bind=True)
def die(self, word):
    if not os.path.exists(word):
        open(word, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    note(f"survived {word}")

@app.task(name="fatal", delivery="effectively_once", time_limit=1)
def fatal():
    time.sleep(60)

@app.task(name="report", unique={"until": "start"}, delivery="effectively_once")
def report():
    count = current_session().execute(sa.text("SELECT count(*) FROM effects WHERE word LIKE 'row %'")).scalar_one()
    time.sleep(0.1)
    note(f"report {count}", current_session())
"""


@pytest.fixture
def make_shop(tmp_path, postgres_url, processes, request):
    made = []

    def make(kind):
        url = request.getfixturevalue("redis_url" if kind == "redis" else "nats_server")
        shop = Shop(tmp_path, postgres_url, url, processes)
        (tmp_path / "once.py").write_text(APP)
        shop.app.conf.task_delivery = "at_least_once"
        with shop.app.outbox.engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE effects ADD COLUMN place BIGSERIAL"))
        made.append((kind, shop))
        return shop

    yield make
    for kind, shop in made:
        shop.app.outbox.engine.dispose()
        shop.app.close()
        if kind == "nats":
            processes.end()
            with shop.app.connection_for_write() as connection:
                connection.default_channel.queue_delete("celery")


KEYS, MESSAGES = 20, 15


def test_each_key_keeps_its_order_when_workers_are_killed(make_shop):
    """20 keys, 15 messages each, four processes in two workers, one killed, tasks that retry and fail.

    Each key's messages end in the order in which they were committed, none is lost; effectively-once ones ran once.
    """
    shop = make_shop("nats")
    doomed, _ = shop.worker("-c", "2"), shop.worker("-c", "2")
    for number in range(MESSAGES):
        with Session(shop.app.outbox.engine) as session, session.begin(), shop.app.outbox.join(session):
            for key in range(KEYS):
                shop.send("once" if key % 2 else "often", f"k{key}", number, key=f"k{key}")
    total = KEYS * MESSAGES
    wait_until(lambda: len(shop.effects()) > total / 4, deadline=60, what="a quarter of the messages")
    doomed.kill()
    wait_until(
        lambda: shop.ask("SELECT count(*) FROM catga_turns") == [(0,)] and shop.drained(), deadline=90, what="the rest"
    )
    order = {f"k{key}": [] for key in range(KEYS)}
    for (word,) in shop.ask("SELECT word FROM effects ORDER BY place"):
        key, number = word.split()
        order[key].append(int(number))
    assert all(found == list(range(MESSAGES)) for key, found in order.items() if int(key[1:]) % 2), order
    # The one that was killed may have run twice, in its place.
    assert all([n for n, _ in itertools.groupby(found)] == list(range(MESSAGES)) for found in order.values()), order


def test_what_never_ran_holds_up_nobody(make_shop):
    """Expired, revoked, unknown, killed by its time limit, its child killed: the next message of the key is sent."""
    shop = make_shop("redis")
    shop.send("follow", "expired", key="expired", expires=0.01)
    shop.send("nobody-knows", key="unknown")
    shop.send("sleep", 60, key="hard")
    shop.send("fatal", key="fatal")
    shop.send("die", "died", key="died")
    time.sleep(0.05)
    names = ["expired", "unknown", "hard", "fatal", "died"]
    for name in names:
        shop.send("follow", name, key=name)
    assert shop.ask("SELECT count(*) FROM catga_outbox WHERE available_at > '9999-01-01'") == [(len(names),)]
    worker = shop.worker()
    wait_until(lambda: shop.app.control.revoke("nobody", reply=True, limit=1), what="a worker that hears")
    revoked = shop.send("sleep", 0, key="revoked", countdown=3)
    assert shop.app.control.revoke(revoked.id, reply=True, limit=1, timeout=20)
    shop.send("follow", "revoked", key="revoked")
    names.append("revoked")
    expected = sorted([*names, "survived died"])
    wait_until(lambda: len(shop.effects()) == len(expected) and shop.drained(), deadline=60, what="those behind them")
    assert shop.effects() == expected, worker.log()
    words = [word for (word,) in shop.ask("SELECT word FROM effects ORDER BY place")]
    assert words.index("survived died") < words.index("died")
    assert shop.ask("SELECT * FROM catga_turns") == []
    assert f"Discarding revoked task: sleep[{revoked.id}]" in worker.log()


def test_a_unique_task_until_its_start_sees_every_callers_commit(make_shop):
    """While reports run, callers commit rows and ask for one: few reports, and the last one has counted every row."""
    shop = make_shop("nats")
    shop.worker()
    for number in range(200):
        with Session(shop.app.outbox.engine) as session, session.begin(), shop.app.outbox.join(session):
            session.execute(sa.text("INSERT INTO effects VALUES (:word)"), {"word": f"row {number}"})
            shop.send("report", unique={"until": "start"})
        time.sleep(0.005)
    wait_until(lambda: shop.ask("SELECT 1 FROM catga_unique_keys") == [] and shop.drained(), what="the last report")
    counts = [int(word.split()[1]) for word in shop.effects() if word.startswith("report")]
    assert max(counts) == 200
    assert 2 <= len(counts) <= 100
