"""Paused queues, a record of changes by hand, and a way to the messages that failed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create two tables, and an index that only rows which failed are in."""
    postgresql = op.get_context().dialect.name == "postgresql"
    now = sa.text("clock_timestamp()" if postgresql else "(strftime('%Y-%m-%d %H:%M:%f', 'now'))")
    if postgresql:
        # While it waits for a long transaction's lock, everything that comes later waits behind it.
        op.execute("SET LOCAL lock_timeout = '10s'")
    op.create_table(
        "catga_paused_queues",
        sa.Column("broker", sa.Text, primary_key=True),
        sa.Column("queue", sa.Text, primary_key=True),
        sa.Column("paused_at", _MOMENT, nullable=False, server_default=now),
        sa.Column("paused_by", sa.Text, nullable=False),
    )
    op.create_table(
        "catga_audit",
        sa.Column("id", _ID, sa.Identity(), primary_key=True),
        sa.Column("at", _MOMENT, nullable=False, server_default=now),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("via", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("rows", _ID, nullable=False),
        sa.Column("selection", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    failed = sa.text("attempts > 0")
    op.create_index("catga_outbox_retrying", "catga_outbox", ["id"], postgresql_where=failed, sqlite_where=failed)


def downgrade() -> None:
    """Forget who did what; paused queues go on."""
    op.drop_index("catga_outbox_retrying", "catga_outbox")
    op.drop_table("catga_audit")
    op.drop_table("catga_paused_queues")
