"""Unique keys, and turns among the messages of one ordering key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TABLES = ("catga_outbox", "catga_dead_letters")
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add columns that may be empty, which rewrites no table, and an index on none of the rows that are there."""
    postgresql = op.get_context().dialect.name == "postgresql"
    now = sa.text("clock_timestamp()" if postgresql else "(strftime('%Y-%m-%d %H:%M:%f', 'now'))")
    if postgresql:
        # While it waits for a long transaction's lock, everything that comes later waits behind it.
        op.execute("SET LOCAL lock_timeout = '10s'")
    for table in _TABLES:
        op.add_column(table, sa.Column("unique_key", sa.Text))
        op.add_column(table, sa.Column("ordering_key", sa.Text))
    op.add_column("catga_outbox", sa.Column("not_before", _MOMENT))
    keyed = sa.text("ordering_key IS NOT NULL")
    columns = ["ordering_key", "available_at", "id"]
    op.create_index("catga_outbox_turns", "catga_outbox", columns, postgresql_where=keyed, sqlite_where=keyed)
    op.create_table(
        "catga_unique_keys",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("taken_at", _MOMENT, nullable=False, server_default=now),
        sa.Column("expires_at", _MOMENT, nullable=False),
    )
    op.create_index("catga_unique_keys_expires_at", "catga_unique_keys", ["expires_at"])
    op.create_table(
        "catga_turns",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("since", _MOMENT, nullable=False, server_default=now),
    )


def downgrade() -> None:
    """Forget the keys: what waits for its turn is due at once."""
    op.drop_table("catga_turns")
    op.drop_table("catga_unique_keys")
    op.drop_index("catga_outbox_turns", "catga_outbox")
    now = (
        "clock_timestamp()" if op.get_context().dialect.name == "postgresql" else "strftime('%Y-%m-%d %H:%M:%f', 'now')"
    )
    op.execute(f"UPDATE catga_outbox SET available_at = coalesce(not_before, {now}) WHERE available_at > '9999-01-01'")
    op.drop_column("catga_outbox", "not_before")
    for table in _TABLES:
        op.drop_column(table, "ordering_key")
        op.drop_column(table, "unique_key")
