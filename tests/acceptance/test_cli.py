"""`celery -A app outbox ...` as somebody at a terminal meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from sqlalchemy import create_engine, make_url, text

from catga_tasks import Catga, migrate
from tests.processes import ROOT
from tests.waiting import wait_until

APP = """
import os
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(outbox_max_attempts=1, broker_transport_options={"visibility_timeout": 5}, %s)

@app.task(name="charge")
def charge(order):
    print(f"charged {order}")
"""


class Shop:
    """An application in a folder of its own, and its command line."""

    def __init__(self, folder, database, broker):
        self.folder = folder
        self.environment = {"BROKER": broker, "OUTBOX": database}
        self.configure()
        self.engine = create_engine(database)
        self.app = Catga("shop", broker=broker, outbox=self.engine, set_as_current=False)

        @self.app.task(name="charge", shared=False)
        def charge(order):
            return order

        self.charge = charge

    def configure(self, settings=""):
        (self.folder / "shop.py").write_text(APP % settings)

    def run(self, *arguments, status=0, answer=None, **environment):
        """Run `celery -A shop outbox ...`; return what it printed. A traceback is never an answer."""
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "shop", "outbox", *arguments], cwd=self.folder, text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{self.folder}:{ROOT}", **self.environment, **environment},
            input=answer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stdout, done.stdout
        assert done.returncode == status, done.stdout
        return done.stdout

    def bury(self, count=1, *, task="charge", error="the broker refused it"):
        """Make dead letters as a relay does: enqueued, and moved with their error."""
        from catga_tasks import outbox

        for number in range(count):
            self.app.send_task(task, (number,))
        with self.engine.begin() as connection:
            rows, _ = outbox.claim(connection, 100)
            for row in rows:
                outbox.bury(connection, row, error=error)

    def dead(self):
        return json.loads(self.run("dead", "list", "--json"))

    def pending(self):
        with self.engine.connect() as connection:
            return connection.execute(text("SELECT count(*) FROM catga_outbox")).scalar_one()


#: What a command prints is the same with each database; their statements have tests of their own.
ONE_DATABASE = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def empty(database_url, redis_url, tmp_path):
    """The application on a database without tables."""
    shop = Shop(tmp_path, database_url, redis_url)
    yield shop
    shop.engine.dispose()


@pytest.fixture
def shop(empty):
    migrate.upgrade(empty.engine)
    return empty


def test_migrate(empty):
    assert "outbox migrate" in empty.run("migrate", "--check", status=1)
    assert "CREATE TABLE catga_outbox" in empty.run("migrate", "--sql")
    assert "outbox migrate" in empty.run("status", status=2)
    assert "from nothing to " in empty.run("migrate")
    assert "up to date" in empty.run("migrate", "--check")
    assert "up to date" in empty.run("migrate")


def test_status_and_a_relay_for_once(shop):
    assert "No relay is alive" in shop.run("status")
    shop.charge.delay(1)
    shop.charge.apply_async((2,), countdown=3600)
    shop.charge.apply_async((3,), countdown=3600, key="a")
    shop.charge.apply_async((4,), key="a")
    found = json.loads(shop.run("status", "--json", status=1))
    assert found.keys() >= {"pending", "scheduled", "retrying", "dead", "published", "oldest_age_seconds", "relays"}
    assert [found[state] for state in ("pending", "scheduled", "waiting", "retrying", "dead")] == [1, 2, 1, 0, 0]
    assert (found["published"], found["relays"]) == (0, [])
    assert found["oldest_age_seconds"] > 0
    (charges,) = found["tasks"]
    assert charges == {"broker": "", "queue": "celery", "task": "charge", "pending": 1, "scheduled": 2, "waiting": 1,
                       "retrying": 0, "dead": 0}  # fmt: skip
    assert "charge" in shop.run("status", status=1)
    assert "1 published." in shop.run("relay", "--once")
    found = json.loads(shop.run("status", "--json"))
    assert (found["pending"], found["scheduled"], found["published"]) == (0, 2, 1)
    assert found["oldest_age_seconds"] is None


@ONE_DATABASE
def test_keys_that_are_held(shop):
    """`outbox keys` shows whose turn it is and ends it; a dead letter whose unique key is taken stays one."""
    first = shop.charge.apply_async((1,), key="customer-7")
    shop.charge.apply_async((2,), key="customer-7")
    (found,) = json.loads(shop.run("keys", "list", "--json"))
    assert (found["key"], found["task_id"], found["waiting"]) == ("customer-7", first.id, 1)
    assert "customer-7" in shop.run("keys", "list")
    assert "The next message is due." in shop.run("keys", "skip", "customer-7", answer="y\n")
    assert "No message waits" in shop.run("keys", "skip", "customer-7", "--yes")
    assert "No message has the key" in shop.run("keys", "skip", "customer-7", "--yes", status=1)
    shop.run("purge", "--all", "--yes")
    shop.charge.apply_async((1,), unique_key="a")
    shop.run("relay", "--once")
    shop.bury()
    with shop.engine.begin() as connection:
        connection.execute(text("UPDATE catga_dead_letters SET unique_key = 'charge:a'"))
    answer = shop.run("dead", "replay", "--all", "--yes")
    assert "0 dead letters replayed." in answer
    assert "1 stay: other messages hold their unique keys." in answer


def test_12_a_relay_ends_cleanly(shop, processes):
    """SIGTERM ends it with status 0 and a heartbeat row folded away; while it runs, `status` counts it."""
    relay = processes.celery("shop", "outbox", "relay", "--batch-size", "7", env=shop.environment, cwd=shop.folder)
    shop.charge.delay_many([(number,) for number in range(100)])
    wait_until(lambda: shop.pending() == 0)
    found = json.loads(shop.run("status", "--json"))
    assert [each["pid"] for each in found["relays"]] == [relay.pid]
    relay.terminate()
    assert relay.wait_exit() == 0, relay.log()
    found = json.loads(shop.run("status", "--json"))
    assert (found["published"], found["relays"]) == (100, [])
    assert "ready" in relay.log()
    assert "100 published" in relay.log()


def test_12_a_second_signal_ends_it_at_once(own_redis, shop, processes):
    """The broker takes the connection and never answers: the first signal waits, the second doesn't."""
    broker = own_redis()
    environment = {**shop.environment, "BROKER": broker.url}
    shop.configure("outbox_publish_timeout=60, outbox_lease_timeout=120")
    relay = processes.celery("shop", "outbox", "relay", env=environment, cwd=shop.folder)
    wait_until(lambda: "ready" in relay.log())
    broker.pause()
    shop.charge.delay(1)
    with shop.engine.connect() as connection:
        wait_until(lambda: connection.execute(text("SELECT count(*) FROM catga_outbox_journal")).scalar_one() == 1)
    relay.terminate()
    wait_until(lambda: "once more ends it at once" in relay.log())
    relay.terminate()
    assert relay.wait_exit(5) == 128 + signal.SIGTERM
    assert shop.pending() == 1
    broker.resume()


def test_queues_are_relayed_alone(shop):
    shop.charge.apply_async((1,), queue="fast")
    shop.charge.apply_async((2,), queue="slow")
    shop.charge.apply_async((3,), queue="other")
    assert "2 published." in shop.run("relay", "--once", "-Q", "fast,other")
    assert shop.pending() == 1


@ONE_DATABASE
def test_dead_letters(shop):
    shop.bury(3, error="the broker [refused] it")
    shop.bury(2, task="ship")
    assert [row["task"] for row in shop.dead()] == ["ship", "ship", "charge", "charge", "charge"]
    listed = shop.run("dead", "list", "--task", "charge")
    assert "3 dead letters" in listed
    assert "the broker [refused] it" in listed
    assert "No dead letters" in shop.run("dead", "list", "--older-than", "1h")
    assert "not an age" in shop.run("dead", "list", "--older-than", "soon", status=2)

    first = shop.dead()[0]["id"]
    shown = shop.run("dead", "show", str(first))
    assert "(1,)" in shown
    assert json.loads(shop.run("dead", "show", str(first), "--json"))["history"][0]["attempt"] == 1
    assert "no dead letter 999" in shop.run("dead", "show", "999", status=1)

    assert "Which ones?" in shop.run("dead", "replay", status=2)
    assert "contradict" in shop.run("dead", "replay", "--all", "--task", "ship", status=2)
    assert "Replay 2 dead letters?" in shop.run("dead", "replay", "--task", "ship", answer="n\n", status=1)
    assert len(shop.dead()) == 5
    assert "2 dead letters replayed." in shop.run("dead", "replay", "--task", "ship", answer="y\n")
    assert (len(shop.dead()), shop.pending()) == (3, 2)
    assert "2 published." in shop.run("relay", "--once")

    one = shop.dead()[0]["id"]
    assert "1 dead letter discarded." in shop.run("dead", "discard", str(one))
    assert "2 dead letters discarded." in shop.run("dead", "discard", "--queue", "celery", "--yes")
    assert "No dead letters match" in shop.run("dead", "discard", "--all", "--yes", status=1)
    assert (shop.dead(), shop.pending()) == ([], 0)


def test_purge(shop):
    shop.charge.delay_many([(1,), (2,)])
    shop.charge.apply_async((3,), queue="slow")
    assert "Which ones?" in shop.run("purge", status=2)
    assert "Purge 1 waiting messages?" in shop.run("purge", "--queue", "slow", answer="y\n")
    assert shop.pending() == 2
    assert "2 messages purged." in shop.run("purge", "--all", "--yes")
    assert shop.pending() == 0


@pytest.mark.parametrize(
    ("database", "said"),
    [
        ("nonsense", "outbox_url is not a SQLAlchemy URL"),
        ("mysql://root:geheim@localhost/x", "mysql is not supported"),
        ("postgresql+asyncpg://u:geheim@localhost/x", "asynchronous driver"),
        ("postgresql+psycopg://u:geheim@127.0.0.1:1/x", "Connection refused"),
        ("oracle+nothing://u:geheim@localhost/x", "unknown database"),
    ],
)
def test_25_a_wrong_url_is_one_line(tmp_path, database, said):
    Shop(tmp_path, "sqlite://", "redis://127.0.0.1:1/0")
    shop = Shop.__new__(Shop)
    shop.folder, shop.environment = tmp_path, {"BROKER": "redis://127.0.0.1:1/0", "OUTBOX": database}
    printed = shop.run("relay", status=1)
    assert said in printed
    assert "geheim" not in printed
    assert len(printed.strip().splitlines()) == 1


@ONE_DATABASE
def test_25_unknown_settings_and_wrong_types(shop):
    shop.configure("outbox_bach_size=3")
    assert "did you mean outbox_batch_size?" in shop.run("relay", status=1)
    shop.configure("outbox_batch_size='many'")
    assert "outbox_batch_size must be a whole number" in shop.run("status", status=2)
    shop.configure("outbox_lease_timeout=5")
    assert "must be longer than outbox_publish_timeout" in shop.run("relay", status=1)


@ONE_DATABASE
def test_25_a_newer_schema_is_refused(shop):
    with shop.engine.begin() as connection:
        connection.execute(text("UPDATE catga_version SET version_num = '9999'"))
    for command in (("migrate",), ("relay",), ("dead", "list")):
        assert "newer than this release" in shop.run(*command, status=1)


def test_25_no_permission(postgres_url, redis_url, tmp_path):
    shop = Shop(tmp_path, postgres_url, redis_url)
    migrate.upgrade(shop.engine)
    with shop.engine.begin() as connection:
        connection.execute(text("CREATE ROLE clerk LOGIN"))
        connection.execute(text("GRANT SELECT ON catga_version TO clerk"))
    shop.environment["OUTBOX"] = make_url(postgres_url).set(username="clerk").render_as_string(hide_password=False)
    assert "permission denied for table catga_outbox" in shop.run("purge", "--all", status=1)
    assert "Grant" in shop.run("status", status=2)
    with shop.engine.begin() as connection:
        connection.execute(text("REVOKE ALL ON catga_version FROM clerk"))
        connection.execute(text("DROP ROLE clerk"))
    shop.engine.dispose()


def test_a_plain_celery_application_is_told(tmp_path):
    (tmp_path / "plain.py").write_text("from celery import Celery\napp = Celery('plain')\n")
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "plain", "outbox", "status"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "put Catga(...) where Celery(...) is" in done.stderr


def test_the_relay_in_a_worker(shop, processes):
    worker = processes.celery(
        "shop", "worker", "--outbox-relay", "--concurrency", "2", "--loglevel", "INFO",
        env=shop.environment, cwd=shop.folder,
    )  # fmt: skip
    for number in range(20):
        shop.charge.delay(number)
    wait_until(lambda: all(f"charged {number}\n" in worker.log() for number in range(20)))
    assert len(json.loads(shop.run("status", "--json"))["relays"]) == 1
    worker.terminate()
    assert worker.wait_exit() == 0, worker.log()
    assert json.loads(shop.run("status", "--json"))["relays"] == []


@ONE_DATABASE
def test_25_a_worker_with_a_wrong_setting(shop, processes):
    shop.configure("outbox_bach_size=3")
    worker = processes.celery("shop", "worker", env=shop.environment, cwd=shop.folder)
    assert worker.wait_exit() == 1
    assert "did you mean outbox_batch_size?" in worker.log()
    assert "Traceback" not in worker.log()


@ONE_DATABASE
def test_26_no_secret_is_printed(own_redis, shop, processes, database_url):
    """A broker's password that is wrong, a broker that isn't there, and a database user without a right."""
    broker = own_redis("--requirepass", "other-secret")
    shop.charge.delay(1)
    for url in (broker.url.replace("redis://", "redis://:geheim@"), "redis://:geheim@127.0.0.1:1/0"):
        printed = shop.run("relay", "--once", "--loglevel", "DEBUG", status=1, BROKER=url)
        assert "The broker is out" in printed
        assert "geheim" not in printed
        assert shop.pending() == 1
    right = broker.url.replace("redis://", "redis://:other-secret@")
    printed = shop.run("relay", "--once", "--loglevel", "DEBUG", BROKER=right)
    assert "1 published." in printed
    assert "other-secret" not in printed + shop.run("status") + shop.run("status", "--json")
