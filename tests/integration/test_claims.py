"""What a relay does with its connections to the database, without a broker."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, insert, text

from catga_tasks import migrate, tables
from catga_tasks.claims import Claims
from catga_tasks.config import Settings


def add_row(engine) -> None:
    names = ("task_id", "task", "queue", "exchange", "routing_key", "content_type", "content_encoding")
    values = {**dict.fromkeys(names, "x"), "headers": "{}", "properties": "{}", "body": b"[]", "send_event": False}
    with engine.begin() as connection:
        connection.execute(insert(tables.outbox).values(values))


def test_13_a_pooler_gets_its_sessions_back_as_they_were(postgres_url):
    """What a relay sets is over with each transaction: behind a pooler the next one in that session is another's."""
    engine = create_engine(postgres_url)
    migrate.upgrade(engine)
    add_row(engine)

    claims = Claims(engine, Settings(), relay="test")
    rows = claims.take()
    claims.settle(rows, [])
    changed = text("SELECT name, setting FROM pg_settings WHERE source = 'session' AND name NOT LIKE 'transaction%'")
    left = [*map(tuple, claims._side.execute(changed)), *map(tuple, claims._work.execute(changed))]
    claims.farewell()
    assert (len(rows), left) == (1, [])


@pytest.mark.parametrize("words", ["a\0b", "caf\udce9"], ids=["NUL", "surrogate"])
def test_06_an_error_in_words_that_no_database_takes(engine, words):
    """Whatever a broker says of a message, it becomes a dead letter with these words."""
    add_row(engine)
    claims = Claims(engine, Settings(outbox_max_attempts=1), relay="test")
    rows = claims.take()
    assert claims.settle([], [(rows[0], words)]) == 1
    claims.farewell()
    with engine.connect() as connection:
        error = connection.execute(text("SELECT error FROM catga_dead_letters")).scalar_one()
    assert error.startswith(words[0])
