"""The outbox, its dead letters, the journal of batches in flight, the relays and SQLite's lease."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_MOMENT = sa.DateTime(timezone=True)


def _now() -> sa.TextClause:
    if op.get_context().dialect.name == "postgresql":
        return sa.text("clock_timestamp()")
    return sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))")


def _message() -> list[sa.Column[Any]]:
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
        sa.Column("created_at", _MOMENT, nullable=False, server_default=_now()),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("history", sa.Text),
    ]


def upgrade() -> None:
    """Create the five tables."""
    op.create_table(
        "catga_outbox",
        sa.Column("id", _ID, sa.Identity(), primary_key=True),
        *_message(),
        sa.Column("available_at", _MOMENT, nullable=False, server_default=_now()),
        sa.Column("scheduled", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("suspect", sa.Boolean, nullable=False, server_default=sa.false()),
        sqlite_autoincrement=True,
    )
    op.create_index("catga_outbox_due", "catga_outbox", ["available_at", "id"])
    op.create_index("catga_outbox_due_by_queue", "catga_outbox", ["queue", "available_at", "id"])
    op.create_index(
        "catga_outbox_suspects",
        "catga_outbox",
        ["available_at", "id"],
        postgresql_where=sa.text("suspect"),
        sqlite_where=sa.text("suspect"),
    )
    op.create_table(
        "catga_dead_letters",
        sa.Column("id", _ID, primary_key=True, autoincrement=False),
        *_message(),
        sa.Column("died_at", _MOMENT, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
    )
    op.create_index("catga_dead_letters_died_at", "catga_dead_letters", ["died_at"])
    op.create_table(
        "catga_outbox_journal",
        sa.Column("id", _ID, sa.Identity(), primary_key=True),
        sa.Column("relay", sa.Text, nullable=False),
        sa.Column("row_ids", sa.Text, nullable=False),
        sa.Column("started_at", _MOMENT, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "catga_relays",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("hostname", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("queues", sa.Text),
        sa.Column("started_at", _MOMENT, nullable=False),
        sa.Column("heartbeat_at", _MOMENT, nullable=False),
        sa.Column("published", _ID, nullable=False),
    )
    op.create_table(
        "catga_outbox_lease",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("expires_at", _MOMENT, nullable=False),
    )


def downgrade() -> None:
    """Drop the five tables, with whatever is in them."""
    for table in ("catga_outbox_lease", "catga_relays", "catga_outbox_journal", "catga_dead_letters", "catga_outbox"):
        op.drop_table(table)
