"""A replacement (`self.replace`) has the id of the task that it replaces: the inbox tells them apart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Lead the key on by the count of replacements. Nothing has written to this table before this revision."""
    _rebuild(sa.Column("replaced", sa.Integer, primary_key=True, autoincrement=False))


def downgrade() -> None:
    """Forget the deliveries: every message that comes again would run again."""
    _rebuild()


def _rebuild(*more: sa.Column[int]) -> None:
    postgresql = op.get_context().dialect.name == "postgresql"
    now = sa.text("clock_timestamp()" if postgresql else "(strftime('%Y-%m-%d %H:%M:%f', 'now'))")
    moment = sa.DateTime(timezone=True)
    op.drop_table("catga_inbox")
    op.create_table(
        "catga_inbox",
        sa.Column("task_id", sa.Text, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        *more,
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("content_type", sa.Text),
        sa.Column("content_encoding", sa.Text),
        sa.Column("result", sa.LargeBinary),
        sa.Column("error", sa.Text),
        sa.Column("owner", sa.Text),
        sa.Column("lease_until", moment),
        sa.Column("received_at", moment, nullable=False, server_default=now),
    )
    op.create_index("catga_inbox_received_at", "catga_inbox", ["received_at"])
