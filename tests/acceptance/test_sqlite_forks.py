"""SQLite must not be open in a process that forks: whatever we have open is closed before it does."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

from catga_tasks import Catga, migrate
from tests.waiting import wait_until

APP = """
import os
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
engine = create_engine(os.environ["OUTBOX"])

@app.task(name="charge")
def charge(order):
    with Session(engine) as session, session.begin(), app.outbox.join(session):
        session.execute(text("INSERT INTO charged VALUES (:order)"), {"order": order})
        ship.delay(order)

@app.task(name="ship")
def ship(order):
    with Session(engine) as session, session.begin():
        session.execute(text("INSERT INTO shipped VALUES (:order)"), {"order": order})
"""
ORDERS = 15


def test_a_pool_that_forks_beside_the_relay(tmp_path, processes, redis_url, sqlite_url):
    """A child that inherits an open connection takes its parent's locks for its own: lost writes, a broken file."""
    (tmp_path / "shop.py").write_text(APP)
    app = Catga("shop", broker=redis_url, outbox=sqlite_url, set_as_current=False)
    migrate.upgrade(app.outbox.engine)
    with contextlib.closing(sqlite3.connect(tmp_path / "catga.db", timeout=20)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for table in ("charged", "shipped"):
            database.execute(f"CREATE TABLE {table} (number INTEGER)")
        worker = processes.celery(
            "shop", "worker", "--outbox-relay", "--concurrency", "2", "--max-tasks-per-child", "1", "-l", "WARNING",
            env={"BROKER": redis_url, "OUTBOX": sqlite_url}, cwd=tmp_path,
        )  # fmt: skip
        for number in range(ORDERS):
            app.send_task("charge", args=(number,))

        def done(table):
            return sorted(number for (number,) in database.execute(f"SELECT number FROM {table}"))

        wait_until(lambda: done("charged") == done("shipped") == list(range(ORDERS)), deadline=60, what="all run")
        worker.terminate()
        assert worker.wait_exit() == 0, worker.log()
        assert "Error" not in worker.log()
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    app.outbox.engine.dispose()


FORK = """
import os, sys
from catga_tasks import Catga, migrate

app = Catga("shop", broker="memory://", outbox=sys.argv[1])
migrate.upgrade(app.outbox.engine)
app.send_task("charge")

def files():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.exists(link) and "catga.db" in os.readlink(link)]

print("parent", files() != [], flush=True)
pid = os.fork()
if pid == 0:
    print("child", files(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
app.send_task("charge")
"""


def test_a_child_has_none_of_its_parents_connections(sqlite_url):
    """A process that has used the outbox and forks, as any pool does, leaves the file to itself."""
    command = [sys.executable, "-c", FORK, sqlite_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "parent True\nchild []\n"), done.stderr
