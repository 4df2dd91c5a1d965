"""Which tables are ours?

The declared form; `migrations/` builds it, and a test compares the two. Every time is the database's own, in UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect

SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
#: When a message is due that waits for the one before it: not by itself. No infinity, which drivers can't read.
NEVER = "9999-12-31 00:00:00.000"
metadata = sa.MetaData()
#: 64 bits everywhere; SQLite counts up by itself only in its plain INTEGER.
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class UTCDateTime(TypeDecorator[datetime]):
    """A moment in UTC: a `timestamptz` on PostgreSQL, ISO text on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store the moment in UTC; SQLite's text has no zone."""
        if value is None:
            return None
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give every moment its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value


class DatabaseNow(FunctionElement[datetime]):
    """The database's clock when the row is written, not when its transaction began."""

    inherit_cache = True


@compiles(DatabaseNow, "postgresql")
def _now_on_postgresql(_element: object, _compiler: object, **_options: object) -> str:
    return "clock_timestamp()"


@compiles(DatabaseNow, "sqlite")
def _now_on_sqlite(_element: object, _compiler: object, **_options: object) -> str:
    return f"({SQLITE_NOW})"


def _message_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("exchange", sa.Text, nullable=False),
        sa.Column("routing_key", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.Column("content_encoding", sa.Text, nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("properties", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("declarations", sa.Text),
        sa.Column("backend_calls", sa.Text),
        sa.Column("send_event", sa.Boolean, nullable=False),
        sa.Column("expiration", sa.Double),
        sa.Column("broker", sa.Text, nullable=False, server_default=""),
        sa.Column("unique_key", sa.Text),
        sa.Column("ordering_key", sa.Text),
        sa.Column("created_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("history", sa.Text),
    ]


#: Messages on their way. A row is here until the broker has confirmed it.
outbox = sa.Table(
    "catga_outbox",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    *_message_columns(),
    sa.Column("available_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Column("scheduled", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("suspect", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("not_before", UTCDateTime),
    sa.Index("catga_outbox_due", "broker", "available_at", "id"),
    sa.Index("catga_outbox_due_by_queue", "broker", "queue", "available_at", "id"),
    sa.Index(
        "catga_outbox_suspects",
        "broker",
        "available_at",
        "id",
        postgresql_where=sa.text("suspect"),
        sqlite_where=sa.text("suspect"),
    ),
    sa.Index(
        "catga_outbox_turns",
        "ordering_key",
        "available_at",
        "id",
        postgresql_where=sa.text("ordering_key IS NOT NULL"),
        sqlite_where=sa.text("ordering_key IS NOT NULL"),
    ),
    sa.Index(
        "catga_outbox_retrying",
        "id",
        postgresql_where=sa.text("attempts > 0"),
        sqlite_where=sa.text("attempts > 0"),
    ),
    sqlite_autoincrement=True,
)

#: Messages that used up their attempts, under the id they had in the outbox.
dead_letters = sa.Table(
    "catga_dead_letters",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=False),
    *_message_columns(),
    sa.Column("died_at", UTCDateTime, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Index("catga_dead_letters_died_at", "died_at"),
)

#: The batches in flight. One that outlives its relay tells which rows may have killed it.
journal = sa.Table(
    "catga_outbox_journal",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    sa.Column("relay", sa.Text, nullable=False),
    sa.Column("row_ids", sa.Text, nullable=False),
    sa.Column("started_at", UTCDateTime, nullable=False),
    sqlite_autoincrement=True,
)

#: The relays, by their heartbeats; the row "retired" sums up what former ones published and counted (`tallies`).
relays = sa.Table(
    "catga_relays",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("broker", sa.Text, nullable=False, server_default=""),
    sa.Column("queues", sa.Text),
    sa.Column("started_at", UTCDateTime, nullable=False),
    sa.Column("heartbeat_at", UTCDateTime, nullable=False),
    sa.Column("published", BigId, nullable=False),
    sa.Column("tally", sa.Text),
)

#: Which relay may work, where the database has no row locks (SQLite).
lease = sa.Table(
    "catga_outbox_lease",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("expires_at", UTCDateTime, nullable=False),
)

#: The deliveries that were seen: what became of each attempt at a task, and at what replaced it (`self.replace`). Its
#: row is the first thing that a delivery writes in the task's own transaction, so that a duplicate waits for it.
inbox = sa.Table(
    "catga_inbox",
    metadata,
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("replaced", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("content_type", sa.Text),
    sa.Column("content_encoding", sa.Text),
    sa.Column("result", sa.LargeBinary),
    sa.Column("error", sa.Text),
    sa.Column("owner", sa.Text),
    sa.Column("lease_until", UTCDateTime),
    sa.Column("received_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Index("catga_inbox_received_at", "received_at"),
)

#: What the inbox met, by task: duplicates that it suppressed, and messages too old to tell whether they ran before.
inbox_counts = sa.Table(
    "catga_inbox_counts",
    metadata,
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("suppressed", BigId, nullable=False, server_default="0"),
    sa.Column("too_old", BigId, nullable=False, server_default="0"),
)

#: The states and results of tasks, for the result backend `outbox://`.
results = sa.Table(
    "catga_results",
    metadata,
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("result", sa.LargeBinary),
    sa.Column("traceback", sa.Text),
    sa.Column("children", sa.LargeBinary),
    sa.Column("name", sa.Text),
    sa.Column("args", sa.LargeBinary),
    sa.Column("kwargs", sa.LargeBinary),
    sa.Column("worker", sa.Text),
    sa.Column("retries", sa.Integer),
    sa.Column("queue", sa.Text),
    sa.Column("stamps", sa.LargeBinary),
    sa.Column("stored_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Index("catga_results_stored_at", "stored_at"),
)

#: Saved groups (`GroupResult.save`).
groups = sa.Table(
    "catga_groups",
    metadata,
    sa.Column("group_id", sa.Text, primary_key=True),
    sa.Column("result", sa.LargeBinary, nullable=False),
    sa.Column("stored_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Index("catga_groups_stored_at", "stored_at"),
)

#: Chords: of how many parts, and how many have returned. Without a size the header isn't committed yet. The row is
#: locked by each part that returns, until its transaction ends.
chords = sa.Table(
    "catga_chords",
    metadata,
    sa.Column("group_id", sa.Text, primary_key=True),
    sa.Column("size", sa.Integer),
    sa.Column("returned", sa.Integer, nullable=False, server_default="0"),
    sa.Column("header", sa.LargeBinary),
    sa.Column("stored_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Index("catga_chords_stored_at", "stored_at"),
)

#: The parts of chords that have returned, until the last one has.
chord_parts = sa.Table(
    "catga_chord_parts",
    metadata,
    sa.Column("group_id", sa.Text, primary_key=True),
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer),
    sa.Column("result", sa.LargeBinary, nullable=False),
)

#: The keys of unique tasks, each with the message that holds it.
unique_keys = sa.Table(
    "catga_unique_keys",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("taken_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Column("expires_at", UTCDateTime, nullable=False),
    sa.Index("catga_unique_keys_expires_at", "expires_at"),
)

#: Whose turn it is among the messages of one ordering key. No row: nobody's.
turns = sa.Table(
    "catga_turns",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("since", UTCDateTime, nullable=False, server_default=DatabaseNow()),
)

#: Queues whose messages wait until somebody resumes them.
paused_queues = sa.Table(
    "catga_paused_queues",
    metadata,
    sa.Column("broker", sa.Text, primary_key=True),
    sa.Column("queue", sa.Text, primary_key=True),
    sa.Column("paused_at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Column("paused_by", sa.Text, nullable=False),
)

#: Who changed what by hand. `rows` is how many messages it was, `selection` which ones, as JSON.
audit = sa.Table(
    "catga_audit",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    sa.Column("at", UTCDateTime, nullable=False, server_default=DatabaseNow()),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("via", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("rows", BigId, nullable=False),
    sa.Column("selection", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

#: What the two tables of messages have in common, by name.
MESSAGE_COLUMNS = tuple(column.name for column in _message_columns())


def dialect(connection: Connection) -> str:
    """Return "postgresql" or "sqlite"; raise `ConfigurationError` for a database that isn't supported."""
    name = connection.dialect.name
    if name not in ("postgresql", "sqlite"):
        message = (
            f"outbox: {name} is not supported; use PostgreSQL (postgresql+psycopg://...) or SQLite (sqlite:///...)."
        )
        raise ConfigurationError(message)
    return name


def now(connection: Connection) -> str:
    """Return the SQL of the database's clock: the transaction's start on PostgreSQL, so that an index can use it."""
    return "now()" if dialect(connection) == "postgresql" else SQLITE_NOW


def later(connection: Connection, parameter: str) -> str:
    """Return the SQL of the moment `parameter` seconds from now; a negative number goes back."""
    if dialect(connection) == "postgresql":
        return f"clock_timestamp() + make_interval(secs => :{parameter})"
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', :{parameter} || ' seconds')"


def epoch(connection: Connection, moment: str) -> str:
    """Return the SQL of the seconds from 1970 to a column, or to `now`."""
    if dialect(connection) == "postgresql":
        return f"CAST(extract(epoch FROM {'clock_timestamp()' if moment == 'now' else moment}) AS float8)"
    moment = "'now'" if moment == "now" else moment
    return f"(julianday({moment}) - 2440587.5) * 86400.0"


def seconds_since(connection: Connection, column: str) -> str:
    """Return the SQL of the seconds from `column` until now."""
    if dialect(connection) == "postgresql":
        return f"CAST(extract(epoch FROM clock_timestamp() - {column}) AS float8)"
    return f"(julianday('now') - julianday({column})) * 86400.0"
