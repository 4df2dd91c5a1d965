"""The inbox, and what it counts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the two tables."""
    postgresql = op.get_context().dialect.name == "postgresql"
    now = sa.text("clock_timestamp()" if postgresql else "(strftime('%Y-%m-%d %H:%M:%f', 'now'))")
    op.create_table(
        "catga_inbox",
        sa.Column("task_id", sa.Text, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("content_type", sa.Text),
        sa.Column("content_encoding", sa.Text),
        sa.Column("result", sa.LargeBinary),
        sa.Column("error", sa.Text),
        sa.Column("owner", sa.Text),
        sa.Column("lease_until", _MOMENT),
        sa.Column("received_at", _MOMENT, nullable=False, server_default=now),
    )
    op.create_index("catga_inbox_received_at", "catga_inbox", ["received_at"])
    op.create_table(
        "catga_inbox_counts",
        sa.Column("task", sa.Text, primary_key=True),
        sa.Column("suppressed", _COUNT, nullable=False, server_default="0"),
        sa.Column("too_old", _COUNT, nullable=False, server_default="0"),
    )


def downgrade() -> None:
    """Drop the two tables: every message that comes again would run again."""
    op.drop_table("catga_inbox_counts")
    op.drop_table("catga_inbox")
