"""Effectively-once tasks on real workers that are killed at every step (scenarios 5, 16, 19 to 25)."""

from __future__ import annotations

import signal
import uuid

import pytest
import sqlalchemy as sa
from celery import chain

from catga_tasks import Catga, migrate
from tests.waiting import wait_until

APP = """
import os, pathlib, signal, time
import sqlalchemy as sa
from celery.exceptions import SoftTimeLimitExceeded
from catga_tasks import Catga, current_session

app = Catga("once", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(
    task_delivery="effectively_once", task_ignore_result=True, worker_prefetch_multiplier=2,
    broker_connection_retry_on_startup=True, outbox_poll_interval_max=0.2, inbox_lease=2.0,
    broker_transport_options=(
        {"ack_wait": 1.5, "stream_prefix": os.environ["PREFIX"]} if os.environ["BROKER"].startswith("nats")
        else {"visibility_timeout": 3, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1,
              "unacked_mutex_expire": 1}
    ),
)

def once(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def say(word):
    with open("said", "a") as file:
        file.write(f"{word}\\n")

def effect(word):
    current_session().execute(sa.text("INSERT INTO effects VALUES (:word)"), {"word": word})

class Watched(app.Task):
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        effect(f"on_failure {self.name}")

@app.task(name="note")
def note(*words):
    effect(words[-1])
    return words[-1]

@app.task(name="killed_inside")
def killed_inside():
    effect("killed_inside")
    note.delay("sent by killed_inside")
    if once("inside"):
        os.kill(os.getpid(), signal.SIGKILL)

def die_once(session):
    if once("after"):
        os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="killed_after")
def killed_after():
    effect("killed_after")
    note.delay("sent by killed_after")
    sa.event.listen(current_session(), "after_commit", die_once)
    return "value"

@app.task(name="hard", time_limit=1, base=Watched)
def hard():
    effect("hard")
    say("hard")
    time.sleep(60)

@app.task(name="soft", soft_time_limit=1, base=Watched)
def soft():
    effect("soft")
    time.sleep(60)

@app.task(name="flaky", bind=True, max_retries=5, base=Watched)
def flaky(self):
    effect("flaky")
    if self.request.retries < 2:
        raise self.retry(exc=OSError("busy"), countdown=0.1)

@app.task(name="hopeless", bind=True, max_retries=1, base=Watched)
def hopeless(self):
    effect("hopeless")
    raise self.retry(exc=OSError("busy"), countdown=0.1)

@app.task(name="long")
def long(word, seconds):
    say(f"begin {word}")
    effect(word)
    time.sleep(seconds)

@app.task(name="outside", delivery="at_least_once", deduplicate=True)
def outside(word, seconds=0):
    say(f"begin {word}")
    time.sleep(seconds)
    say(f"end {word}")
"""


@pytest.fixture(params=["nats", "redis"])
def shop(request, tmp_path, postgres_url, processes):
    """The application in a folder of its own, its tables made; `shop.worker(...)` starts a worker of it."""
    kind = request.param
    url = request.getfixturevalue("redis_url" if kind == "redis" else "nats_server")
    found = Shop(tmp_path, postgres_url, url, processes)
    yield found
    found.app.outbox.engine.dispose()
    found.app.close()
    if kind == "nats":
        processes.end()
        with found.app.connection_for_write() as connection:
            connection.default_channel.queue_delete("celery")


class Shop:
    def __init__(self, folder, database, broker, processes):
        self.folder, self.processes, self.broker = folder, processes, broker
        prefix = f"once-{uuid.uuid4().hex[:8]}"
        self.env = {"OUTBOX": database, "BROKER": broker, "PREFIX": prefix}
        (folder / "once.py").write_text(APP)
        self.app = Catga("once", broker=broker, outbox=database, set_as_current=False)
        self.app.conf.update(task_delivery="effectively_once", task_ignore_result=True)
        if broker.startswith("nats"):
            self.app.conf.broker_transport_options = {"stream_prefix": prefix, "ack_wait": 1.5}
        migrate.upgrade(self.app.outbox.engine)
        with self.app.outbox.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE effects (word TEXT NOT NULL)"))

    def worker(self, *arguments, pool="prefork", env=None):
        command = ("worker", "-P", pool, "-c", "4", "-n", f"w{uuid.uuid4().hex[:8]}", "-l", "INFO", "--outbox-relay",
                   "--without-gossip", "--without-mingle", *arguments)  # fmt: skip
        process = self.processes.celery("once", *command, env={**self.env, **(env or {})}, cwd=self.folder)
        wait_until(lambda: " ready." in process.log() or not process.alive(), deadline=60, what="a ready worker")
        assert process.alive(), process.log()
        return process

    def send(self, name, *args, **options):
        """Enqueue in a transaction of its own; every sender has the broker's own tasks only by name."""
        return self.app.send_task(name, args, **options)

    def ask(self, statement):
        with self.app.outbox.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(statement))]

    def effects(self):
        return sorted(word for (word,) in self.ask("SELECT word FROM effects"))

    def said(self):
        path = self.folder / "said"
        return path.read_text().splitlines() if path.exists() else []

    def drained(self):
        """Nothing waits in the outbox, and nothing is with the broker."""
        if self.ask("SELECT count(*) FROM catga_outbox") != [(0,)]:
            return False
        with self.app.connection_for_read() as connection:
            channel = connection.default_channel
            if hasattr(channel, "counts"):
                return channel.counts("celery")["messages"] == 0
            return channel.client.llen("celery") + channel.client.hlen("unacked") == 0


def test_19_to_22_effects_happen_once_whatever_is_killed(shop):
    """Scenarios 19 to 22: children killed inside the task and between commit and acknowledgement, time limits, retries.

    Each task's effects, and what it enqueues, are there once; its failure's handlers ran once.
    """
    doomed, _ = shop.worker(), shop.worker()
    for name in ("killed_inside", "killed_after", "hard", "soft", "flaky", "hopeless"):
        signature = shop.app.signature("note", args=(f"link_error of {name}",), immutable=True)
        shop.send(name, link_error=signature)
    chain(
        shop.app.signature("killed_after", immutable=True),
        shop.app.signature("note", args=("step 2",), immutable=True),
        shop.app.signature("note", args=("step 3",), immutable=True),
    ).apply_async()
    for number in range(4):
        shop.send("long", f"long {number}", 4)
    wait_until(lambda: sum(line.startswith("begin long") for line in shop.said()) == 4, what="long tasks that run")
    doomed.kill()
    expected = sorted([
        "killed_inside", "sent by killed_inside", "flaky", *["killed_after", "sent by killed_after"] * 2,
        "step 2", "step 3", *(f"long {number}" for number in range(4)),
        *(f"{what} {name}" for name in ("hard", "soft", "hopeless") for what in ("on_failure", "link_error of")),
    ])  # fmt: skip
    wait_until(lambda: len(shop.effects()) >= len(expected) and shop.drained(), deadline=60, what="all tasks")
    assert shop.effects() == expected
    states = dict(shop.ask("SELECT task, string_agg(state, ' ' ORDER BY attempt) FROM catga_inbox GROUP BY task"))
    assert states["flaky"] == "RETRY RETRY SUCCESS"
    assert states["hopeless"] == "RETRY FAILURE"
    assert states["hard"] == states["soft"] == "FAILURE"
    assert dict(shop.ask("SELECT task, suppressed FROM catga_inbox_counts"))["killed_after"] >= 1
    errors = dict(shop.ask("SELECT task, error FROM catga_inbox WHERE state = 'FAILURE'"))
    assert "TimeLimitExceeded(1" in errors["hard"]
    assert "SoftTimeLimitExceeded" in errors["soft"]


@pytest.mark.parametrize(("shop", "number"), [("nats", signal.SIGQUIT), ("redis", signal.SIGTERM)], indirect=["shop"])
def test_21_a_shutdown_loses_and_doubles_nothing(shop, number):
    """Scenario 21: a warm shutdown ends what runs, a cold one gives it back; another worker does the rest, once."""
    first = shop.worker()
    for each in range(8):
        shop.send("long", str(each), 1)
    wait_until(lambda: len(shop.said()) >= 4, what="tasks that run")
    first.signal(number)
    first.wait_exit(30)
    shop.worker(pool="threads")
    wait_until(lambda: len(shop.effects()) == 8 and shop.drained(), deadline=40, what="all tasks")
    assert shop.effects() == sorted(map(str, range(8)))


def test_19_a_lease_keeps_a_message_from_running_twice_at_a_time(shop):
    """Scenarios 19 and 21: with deduplicate=True a copy of a running message waits, one of a finished one is skipped.

    A task longer than its lease runs once, and a killed worker's task runs again when the lease is over.
    """
    first = shop.worker("-Q", "first")
    second = shop.worker()
    long = {"task_id": "long", "headers": {}}
    shop.send("outside", "long", 5, queue="first", **long)
    wait_until(lambda: shop.said() == ["begin long"], what="the first copy")
    shop.send("outside", "long", 5, **long)
    wait_until(lambda: "runs elsewhere" in second.log(), what="the second copy postponed")
    wait_until(lambda: "end long" in shop.said(), what="its end")
    shop.send("outside", "long", 5, **long)
    wait_until(lambda: "came again" in second.log(), what="a copy that is skipped")
    wait_until(shop.drained, what="all copies")
    assert shop.said() == ["begin long", "end long"]
    assert shop.ask("SELECT state, owner FROM catga_inbox") == [("SUCCESS", None)]
    shop.send("outside", "crash", 3, queue="first", task_id="crash")
    wait_until(lambda: "begin crash" in shop.said(), what="the one to be killed")
    first.kill()
    shop.send("outside", "crash", 0, task_id="crash")
    wait_until(lambda: "end crash" in shop.said(), what="its second run")
    assert shop.said()[2:] == ["begin crash", "begin crash", "end crash"]


@pytest.mark.parametrize("shop", ["nats"], indirect=True)
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_05_a_workers_clock_decides_nothing(shop, seconds):
    """Scenario 5: on a worker whose clock is an hour off retries come when they are due, and leases hold."""
    (shop.folder / "sitecustomize.py").write_text(
        "import os\nfrom tests.integration.relay_children import shift_clock\nshift_clock(float(os.environ['SHIFT']))\n"
    )
    worker = shop.worker("-Q", "celery,wrong", env={"SHIFT": str(seconds)})
    shop.send("flaky")
    shop.send("note", "later", countdown=2)
    shop.send("outside", "leased", 3, task_id="leased")
    wait_until(lambda: "begin leased" in shop.said(), what="a lease")
    shop.send("outside", "leased", 3, task_id="leased")
    wait_until(lambda: "runs elsewhere" in worker.log(), what="a copy that meets the lease")
    wait_until(lambda: shop.effects() == ["flaky", "later"] and "end leased" in shop.said(), what="all tasks")
    wait_until(shop.drained, what="all copies")
    assert shop.said() == ["begin leased", "end leased"]
    moments = shop.ask("SELECT abs(extract(epoch FROM clock_timestamp() - received_at)) < 600 FROM catga_inbox")
    assert set(moments) == {(True,)}


@pytest.mark.parametrize("kind", ["nats", "redis"])
def test_23_servers_restart(kind, tmp_path, processes, own_nats, own_redis, own_postgres):
    """Scenario 23: broker and database are killed and restarted under load; each effect is there once."""
    database = own_postgres()
    broker = own_nats() if kind == "nats" else own_redis("--appendonly", "yes", "--appendfsync", "always")
    shop = Shop(tmp_path, database.create_database("shop"), broker.url, processes)
    shop.worker(), shop.worker()
    shop.app.outbox.engine.dispose()
    sent = 0
    for server in (broker, database, broker):
        for _ in range(40):
            shop.send("long", str(sent), 0.05)
            sent += 1
        wait_until(lambda sent=sent: len(shop.effects()) > sent - 30, deadline=60, what="tasks that run")
        shop.app.outbox.engine.dispose()
        server.kill()
        server.restart()
    wait_until(lambda: len(shop.effects()) >= sent and shop.drained(), deadline=90, what="all tasks")
    assert shop.effects() == sorted(map(str, range(sent)))
    shop.app.outbox.engine.dispose()
    shop.app.close()


@pytest.mark.parametrize("shop", ["nats"], indirect=True)
def test_25_a_worker_without_the_tables_says_which_command(shop):
    """Scenario 25: a worker whose tasks need the inbox doesn't start without it."""
    with shop.app.outbox.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE catga_version"))
    process = shop.processes.celery("once", "worker", "-P", "solo", env=shop.env, cwd=shop.folder)
    assert process.wait_exit() == 1
    assert "outbox migrate" in process.log()
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("shop", ["nats"], indirect=True)
def test_workers_show_the_delivery_of_their_tasks(shop):
    """`celery inspect registered delivery` tells each task's."""
    shop.worker(pool="threads")
    shown = shop.processes.celery("once", "inspect", "registered", "delivery", "-j", env=shop.env, cwd=shop.folder)
    assert shown.wait_exit() == 0
    assert "note [delivery=effectively_once]" in shown.log()
    assert "outside [delivery=at_least_once]" in shown.log()
