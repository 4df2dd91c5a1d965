"""Could a message go through now? Green means that one could, on real servers in the states that fool health checks."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import pytest
from redis import Redis, ResponseError
from sqlalchemy import create_engine, text

from catga_tasks import Catga, health, migrate
from catga_tasks.errors import BrokerUnavailable
from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import free_port

GREEN = {"database": True, "schema": True, "relay": True, "age": True, "broker": True}


def shop(broker, outbox, **settings):
    app = Catga("shop", broker=broker, outbox=outbox, set_as_current=False)
    app.conf.update(settings)
    return app


def colours(found):
    return {check.name: check.ok for check in found.checks}


def red(found):
    return {check.name: check.detail for check in found.checks if not check.ok}


class Running:
    """A relay that works while the block does."""

    def __init__(self, app):
        self._relay = app.relay()
        self._thread = threading.Thread(target=self._relay.run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._relay.stop()
        self._thread.join(30)


@pytest.fixture
def postgres(postgres_url):
    engine = create_engine(postgres_url)
    migrate.upgrade(engine)
    yield engine
    engine.dispose()


def test_all_is_well(database_url, redis_url):
    """With a relay alive everything is green, and the probe leaves nothing in the queue."""
    engine = create_engine(database_url)
    migrate.upgrade(engine)
    app = shop(redis_url, engine)
    with Running(app):
        wait_until(lambda: colours(health.check(app))["relay"], what="a relay's heartbeat")
        found = health.check(app)
    assert colours(found) == GREEN, red(found)
    assert found.status == health.HEALTHY
    with Redis.from_url(redis_url) as client:
        assert client.llen("celery") == 0
    engine.dispose()


def test_the_probe_disturbs_no_message(postgres, redis_url):
    """What waits in the queue stays, in its order, and a consumer that waits at an empty one gets nothing."""
    app = shop(redis_url, postgres)
    with Redis.from_url(redis_url) as client:
        got = []
        waiting = threading.Thread(target=lambda: got.append(client.brpop("celery", 1)))
        waiting.start()
        while waiting.is_alive():
            assert colours(health.check(app))["broker"]
        assert got == [None]
        client.lpush("celery", "first", "second")
        assert colours(health.check(app))["broker"]
        assert client.lrange("celery", 0, -1) == [b"second", b"first"]


@pytest.mark.parametrize(("settings", "word"), [
    (("--maxmemory", "2mb", "--maxmemory-policy", "noeviction"), "OutOfMemoryError"),
    (("--replicaof", "127.0.0.1", "1"), "ReadOnlyError"),
    (("--min-replicas-to-write", "1"), "NOREPLICAS"),
], ids=["full", "read-only", "no replicas"])  # fmt: skip
def test_a_redis_that_only_answers_pings_is_red(postgres, own_redis, settings, word):
    """A health check that is green because a connection is there says nothing of a Redis that takes no message."""
    server = own_redis(*settings)
    with Redis.from_url(server.url) as client:
        for number in range(100):
            with contextlib.suppress(ResponseError):  # full, or refusing from the start
                client.set(f"filler {number}", b"x" * 32768)
        assert client.ping()
    found = health.check(shop(server.url, postgres))
    assert word in red(found)["broker"]
    assert found.status == health.DEGRADED


def test_a_nats_that_cannot_store_is_red(postgres, own_nats):
    """A server with a full stream accepts connections all the same; the probe's own message isn't in the queue."""
    server = own_nats()
    app = shop(server.url, postgres, broker_transport_options={"max_msgs": 2})
    assert colours(health.check(app))["broker"], "a stream that isn't there yet would be made"
    app.send_task("charge", (1,))
    app.relay().run_once()
    assert colours(health.check(app))["broker"]
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.counts("celery")["messages_ready"] == 1, "the probe was stored"
    app.send_task("charge", (2,))
    app.relay().run_once()
    assert red(health.check(app))["broker"] == "NATS: the stream of queue celery is full."


#: An account with room for a few messages.
SMALL = """
accounts { A {
  jetstream { max_file: 100KB, max_mem: 0 }
  users: [{user: a, password: hunter2}]
} }
no_auth_user: a
"""


def test_a_nats_whose_account_is_full_is_red(postgres, own_nats):
    """Its streams have no limit of their own; only storing something tells that nothing is stored."""
    server = own_nats(SMALL)
    app = shop(server.url, postgres)
    assert colours(health.check(app))["broker"]
    for _ in range(40):
        app.send_task("charge", ("x" * 3000,))
    with pytest.raises(BrokerUnavailable):
        app.relay().run_once()
    assert red(health.check(app))["broker"] == "NATS: resource limits exceeded for account"
    with postgres.connect() as connection:
        assert connection.execute(text("SELECT sum(attempts) FROM catga_outbox")).scalar_one() == 0


def test_a_nats_without_jetstream_is_red(postgres, own_nats):
    """It answers a ping."""
    server = own_nats(jetstream=False)
    assert "JetStream" in red(health.check(shop(server.url, postgres)))["broker"]


def test_a_broker_and_a_database_that_are_gone(postgres, sqlite_url):
    """Each is red by its name, in bounded time, and the answer has no address and no password."""
    broker = f"redis://user:hunter2@127.0.0.1:{free_port()}/0"
    found = health.check(shop(broker, postgres))
    assert set(red(found)) == {"broker", "relay"}
    gone = f"postgresql+psycopg://user:hunter2@127.0.0.1:{free_port()}/shop"
    both = health.check(shop(broker, gone))
    assert set(red(both)) == set(GREEN)
    assert both.status == health.DOWN
    for answer in (found, both):
        told = json.dumps(answer.as_dict())
        assert "hunter2" not in told
        assert "127.0.0.1" not in told
    unmigrated = health.check(shop(broker, sqlite_url))
    assert "outbox migrate" in red(unmigrated)["schema"]
    assert unmigrated.status == health.DOWN


def test_one_that_never_answers_is_red_in_time(postgres, own_redis, own_postgres):
    """A stopped server accepts TCP and says nothing: the check ends all the same."""
    server, database = own_redis(), own_postgres()
    app = shop(server.url, database.url)
    for each in (server, database):
        each.pause()
    try:
        started = time.monotonic()
        found = health.check(app, timeout=1)
        assert time.monotonic() - started < 30
    finally:
        for each in (server, database):
            each.resume()
    assert set(red(found)) == set(GREEN)
    assert set(red(found).values()) == {"no answer within 1 s"}


def test_a_message_that_waits_too_long_is_red(postgres, redis_url):
    """The age of what is due counts; a message that waits for its ETA doesn't."""
    app = shop(redis_url, postgres)
    app.send_task("charge", (1,), countdown=3600)
    assert colours(health.check(app))["age"]
    app.send_task("charge", (1,))
    with postgres.begin() as connection:
        connection.execute(
            text("UPDATE catga_outbox SET available_at = now() - interval '10 minutes' WHERE NOT scheduled")
        )
    assert "more than 300 s" in red(health.check(app))["age"]
    assert colours(health.check(app, max_age=3600))["age"]


def test_each_named_broker_is_asked(postgres, redis_url):
    """One of several brokers that is out is red by its own name."""
    app = shop(redis_url, postgres, outbox_brokers={"mail": f"redis://127.0.0.1:{free_port()}/0"})
    found = colours(health.check(app))
    assert found["broker"]
    assert not found["broker:mail"]


def test_the_command(sqlite_url, redis_url, tmp_path):
    """`outbox check` ends with 2, 1 or 0, and prints each check by its name, as text or JSON."""
    (tmp_path / "shop.py").write_text(
        f"from catga_tasks import Catga\napp = Catga('shop', broker={redis_url!r}, outbox={sqlite_url!r})\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "celery", "-A", "shop", "outbox", "check", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, text=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip

    empty = run()
    assert empty.returncode == health.DOWN
    assert "RED    schema: The outbox's tables are missing" in empty.stdout
    engine = create_engine(sqlite_url)
    migrate.upgrade(engine)
    alone = run("--json", "--max-age", "90s")
    assert alone.returncode == health.DEGRADED
    told = json.loads(alone.stdout)
    assert {check["name"]: check["ok"] for check in told["checks"]} == {**GREEN, "relay": False}
    with Running(app := shop(redis_url, engine)):
        wait_until(lambda: colours(health.check(app))["relay"], what="a relay's heartbeat")
        well = run()
    assert well.returncode == health.HEALTHY, well.stdout
    assert "RED" not in well.stdout
    engine.dispose()
