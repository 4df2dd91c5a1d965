"""Messages that no task can be made of: kept, shown and replayed, whatever is wrong with them (scenario 24)."""

from __future__ import annotations

import json
import os

import pytest
from celery import Celery
from sqlalchemy import create_engine, text

from catga_tasks import migrate
from tests.conformance.messages import publish
from tests.waiting import wait_until

APP = """
import json, os
from celery import Celery
from catga_tasks import Catga

kind, options = (Catga, {"outbox": os.environ["OUTBOX"]}) if "OUTBOX" in os.environ else (Celery, {})
app = kind("shop", broker=os.environ["BROKER"], **options)
app.conf.update(
    broker_transport_options=json.loads(os.environ["OPTIONS"]), task_default_queue="jobs", task_acks_late=True,
    outbox_poll_interval_max=0.2, outbox_max_attempts=1,
)

@app.task(name="note")
def note(word):
    with open("noted", "a") as file:
        file.write(f"{word}\\n")
"""
NEWER = """
@app.task(name="newer", serializer="json")
def newer(word, *, to):
    note(f"newer {word} {to}")
"""
TASK = {"lang": "py", "task": "note", "id": "x-1"}
ADDRESS = b'"delivery_info": {"exchange": "", "routing_key": "jobs"}'
#: Bytes in a queue that are no message of kombu's, for one reason or another.
FRAMES = [
    b"no json", b'{"properties": 3}', b"\xff\xfe", b"[" * 5000,
    b'{"body": "", "headers": ["a"], "properties": {"delivery_tag": "1", "delivery_info": {}}}',
    b'{"body": "a", "headers": {}, "properties": {"delivery_tag": "2", "body_encoding": "base64", %b}}' % ADDRESS,
    b'{"body": "\xff", "headers": {}, "properties": {"delivery_tag": "3", %b}}' % ADDRESS,
]  # fmt: skip
#: Messages of kombu's that are no task: body, headers, other options.
MESSAGES = [
    ({"no": "task"}, {}, {}),
    (b"{broken", TASK, {"serializer": None, "content_type": "application/json", "content_encoding": "utf-8"}),
    ([[1], {}, {}], TASK, {"serializer": "pickle"}),
    ([["x"], {}, {}], {**TASK, "eta": "soon"}, {}),
    ([["x"], {}, {}], {**TASK, "compression": "zlib"}, {}),
    ([["x"], {}, {}], {**TASK, "task": "n\0l", "id": "\ud800"}, {}),
]
#: Those that end Celery's own worker: no id, a name that is a list, a time limit that is none.
WORSE = [
    ([["x"], {}, {}], {"task": "note"}, {}),
    ([["x"], {}, {}], {**TASK, "task": ["note"]}, {}),
    ([["x"], {}, {}], {**TASK, "timelimit": 3}, {}),
]


class Site:
    """Workers of one application on this broker, and its dead letters."""

    def __init__(self, broker, processes, folder, outbox=None):
        self.broker, self._processes, self.folder = broker, processes, folder
        self.env = {"BROKER": broker.url, "OPTIONS": json.dumps(broker.options)}
        if outbox:
            self.env["OUTBOX"] = outbox
            self.engine = create_engine(outbox)
            migrate.upgrade(self.engine)
        (folder / "shop.py").write_text(APP)

    def run(self, *arguments):
        return self._processes.celery("shop", *arguments, env={**os.environ, **self.env}, cwd=self.folder)

    def worker(self, *arguments):
        worker = self.run("worker", "-P", "solo", "-l", "INFO", *arguments)
        wait_until(lambda: " ready." in worker.log() or not worker.alive(), what="a ready worker")
        assert worker.alive(), worker.log()
        return worker

    def send(self, name, *args, **options):
        """As plain Celery does, of a release that knows more tasks."""
        with Celery("other", broker=self.broker.url, set_as_current=False) as app:
            app.conf.broker_transport_options = self.broker.options
            return app.send_task(name, args, queue="jobs", **options)

    def put_garbage(self, messages):
        """Fill the queue with what no worker can read; return how many."""
        with self.broker.connect() as connection:
            publish(connection, [], "jobs")
            for number, frame in enumerate(FRAMES):
                self.broker.put("jobs", frame, f"garbage-{number}")
            for body, headers, options in messages:
                publish(connection, [body], "jobs", headers=headers, **options)
        return len(FRAMES) + len(messages)

    def noted(self):
        path = self.folder / "noted"
        return path.read_text().splitlines() if path.exists() else []

    def dead(self):
        with self.engine.connect() as connection:
            return connection.execute(text("SELECT * FROM catga_dead_letters ORDER BY id")).mappings().all()

    def output(self, *arguments):
        done = self.run("outbox", *arguments)
        assert done.wait_exit() == 0, done.log()
        return done.log()


@pytest.fixture
def site(broker, processes, tmp_path, request):
    """Redis with PostgreSQL, NATS with SQLite."""
    database = request.getfixturevalue("postgres_url" if broker.name == "redis" else "sqlite_url")
    site = Site(broker, processes, tmp_path, database)
    yield site
    site.engine.dispose()


@pytest.mark.timeout(120)
def test_24_what_is_no_task_is_a_dead_letter(broker, site):
    """Scenario 24: the worker goes on, `outbox dead` shows it, and a replay to a worker that knows the task runs it."""
    worker = site.worker()
    site.send("newer", "é", kwargs={"to": "ann"}, compression="zlib", priority=3)
    count = 1 + site.put_garbage(MESSAGES + WORSE)
    site.send("note", "good")
    wait_until(lambda: "good" in site.noted() or not worker.alive())
    wait_until(lambda: len(site.dead()) == count, what=f"{count} dead letters", deadline=20)
    wait_until(lambda: broker.kept("jobs") == 0, what="an empty queue")
    assert worker.alive()
    assert "Traceback" not in worker.log()
    assert site.noted() == ["good"]
    newer = next(letter for letter in site.dead() if letter["task"] == "newer")
    assert "The task newer isn't registered" in newer["error"]
    assert {letter["queue"] for letter in site.dead()} == {"jobs"}
    assert FRAMES[0] in [letter["body"] for letter in site.dead()]
    shown = json.loads(site.output("dead", "show", str(newer["id"]), "--json"))
    assert (shown["task"], shown["priority"], shown["history"][0]["error"]) == ("newer", 3, newer["error"])
    worker.terminate()
    assert worker.wait_exit() == 0, worker.log()

    (site.folder / "shop.py").write_text(APP + NEWER)
    worker = site.worker("--outbox-relay")
    site.output("dead", "replay", "--all", "--yes")
    wait_until(lambda: "newer é ann" in site.noted(), what="the replayed task")
    # The others are no better than before: each comes back, and none twice.
    wait_until(lambda: min((letter["id"] for letter in site.dead()), default=0) > count, what="new dead letters")
    wait_until(lambda: len(site.dead()) == count - 1, what="as many as before", deadline=20)
    assert worker.alive()
    assert "Traceback" not in worker.log()


@pytest.mark.timeout(120)
def test_24_while_the_database_is_out_nothing_is_lost(broker, site):
    """Scenario 24: the message goes back, again and again, and is kept as soon as there is a place for it."""
    with site.engine.begin() as connection:
        connection.execute(text("ALTER TABLE catga_dead_letters RENAME TO away"))
    worker = site.worker()
    site.send("newer", "x", kwargs={"to": "ann"})
    wait_until(lambda: "goes back" in worker.log(), what="the message goes back")
    site.send("note", "good")
    wait_until(lambda: site.noted() == ["good"])
    wait_until(lambda: broker.kept("jobs") == 1, what="one message that is kept")
    with site.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO catga_dead_letters"))
    wait_until(lambda: len(site.dead()) == 1, what="a dead letter")
    wait_until(lambda: broker.kept("jobs") == 0, what="an empty queue")
    assert "Traceback" not in worker.log()


@pytest.mark.timeout(120)
@pytest.mark.needs("dead stream")
def test_24_plain_celery_keeps_it_on_the_server(broker, processes, tmp_path):
    """Scenario 24: Celery discards what it doesn't know; without an outbox to keep it, the broker does."""
    site = Site(broker, processes, tmp_path)
    worker = site.worker()
    site.send("newer", "x")
    count = 1 + site.put_garbage(MESSAGES)
    site.send("note", "good")
    wait_until(lambda: "good" in site.noted() or not worker.alive())
    wait_until(lambda: len(broker.dead("jobs")) == count, what=f"{count} dead letters", deadline=20)
    wait_until(lambda: broker.kept("jobs") == 0, what="an empty queue")
    assert all(reason for _, reason in broker.dead("jobs"))
