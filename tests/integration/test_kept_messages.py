"""A message that a worker couldn't make a task of is a dead letter beside the relay's own (scenario 24)."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from catga_tasks import admin, outbox
from catga_tasks.envelope import Envelope, Row
from catga_tasks.selection import Selection

MESSAGE = Envelope(
    task_id="t-1", task="charge", queue="celery", exchange="", routing_key="celery", priority=None,
    content_type="application/json", content_encoding="utf-8", headers="{}", properties="{}", body=b"[[], {}, {}]",
)  # fmt: skip


@pytest.fixture
def connection(engine):
    with engine.begin() as connection:
        yield connection


def newest(connection):
    outbox.add(connection, [MESSAGE])
    return connection.execute(text("SELECT max(id) FROM catga_outbox")).scalar_one()


def test_24_its_id_is_no_other_messages(connection):
    """Scenario 24: neither before nor after, however often it is replayed and dies again."""
    ids = [newest(connection)]
    for _ in range(3):
        ids += [outbox.add_dead(connection, MESSAGE, error="unknown"), newest(connection)]
    assert ids == sorted(set(ids))
    assert admin.replay(connection, Selection(ids=(ids[1],))) == 1
    again = connection.execute(text("SELECT max(id) FROM catga_outbox")).scalar_one()
    assert again not in ids
    outbox.bury(connection, Row(again, MESSAGE), error="unknown still")
    assert admin.count(connection, "catga_dead_letters", Selection()) == 3
    assert admin.count(connection, "catga_outbox", Selection()) == 4


def test_24_it_has_one_attempt_with_its_reason(connection):
    """Scenario 24: shown as the relay's dead letters are."""
    number = outbox.add_dead(connection, MESSAGE, error="unknown")
    letter = admin.dead_letter(connection, number)
    assert (letter["attempts"], letter["error"], letter["body"]) == (1, "unknown", MESSAGE.body)
    assert [entry["error"] for entry in letter["history"]] == ["unknown"]
    assert letter["history"][0]["at"]
