"""`outbox history` and the inbox's part of `outbox status`."""

from __future__ import annotations

import json

from catga_tasks import Catga, admin, inbox, migrate

APP = """
import os
from catga_tasks import Catga
app = Catga("shop", broker="memory://", outbox=os.environ["OUTBOX"])
"""


def prepared(url):
    """Two attempts of a task, a retry that waits, and three duplicates; return what is known of them."""
    app = Catga("shop", broker="memory://", outbox=url, set_as_current=False)
    migrate.upgrade(app.outbox.engine)
    with app.outbox.engine.begin() as connection:
        for attempt, error in enumerate(("OSError: busy", "OSError: [busy] again")):
            key = inbox.Key("1", attempt)
            assert inbox.enter(connection, key, "charge", state="RETRY", error=error) is None
        inbox.count(connection, "charge", suppressed=3)
    app.send_task("charge", task_id="1", countdown=600)
    with app.outbox.engine.connect() as connection:
        found = admin.history(connection, "1"), admin.status(connection)["duplicates"]
    app.outbox.engine.dispose()
    return found


def test_history_follows_a_task(database_url):
    """Its attempts with their errors, and the retry that waits, by the task's id; duplicates are counted."""
    history, duplicates = prepared(database_url)
    assert [(entry["where"], entry["attempt"], entry["state"], entry["error"]) for entry in history] == [
        ("worker", 1, "RETRY", "OSError: busy"),
        ("worker", 2, "RETRY", "OSError: [busy] again"),
        ("outbox", 0, "WAITING", None),
    ]
    assert duplicates == [{"task": "charge", "suppressed": 3, "too_old": 0}]


def test_the_command_shows_it(sqlite_url, tmp_path, processes):
    """As a table, as JSON, and in one line if nothing is known."""
    history, _ = prepared(sqlite_url)
    (tmp_path / "shop.py").write_text(APP)
    commands = [("history", "1"), ("history", "1", "--json"), ("history", "2"), ("status",)]
    started = [
        processes.celery("shop", "outbox", *command, env={"OUTBOX": sqlite_url}, cwd=tmp_path) for command in commands
    ]
    assert [process.wait_exit(60) for process in started] == [0, 0, 1, 0]
    table, printed, nothing, status = (process.log() for process in started)
    assert "OSError: [busy] again" in table
    assert json.loads(printed[printed.index("[") :]) == history
    assert "Nothing is known of task 2" in nothing
    assert "Traceback" not in nothing
    assert "duplicates suppressed" in status
