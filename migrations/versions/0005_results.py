"""Results, saved groups and chords."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TABLES = ("catga_results", "catga_groups", "catga_chords")


def upgrade() -> None:
    """Create the four tables."""
    postgresql = op.get_context().dialect.name == "postgresql"
    now = sa.text("clock_timestamp()" if postgresql else "(strftime('%Y-%m-%d %H:%M:%f', 'now'))")

    def stored_at() -> sa.Column[Any]:
        return sa.Column("stored_at", sa.DateTime(timezone=True), nullable=False, server_default=now)

    op.create_table(
        "catga_results",
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
        stored_at(),
    )
    op.create_table(
        "catga_groups",
        sa.Column("group_id", sa.Text, primary_key=True),
        sa.Column("result", sa.LargeBinary, nullable=False),
        stored_at(),
    )
    op.create_table(
        "catga_chords",
        sa.Column("group_id", sa.Text, primary_key=True),
        sa.Column("size", sa.Integer),
        sa.Column("returned", sa.Integer, nullable=False, server_default="0"),
        sa.Column("header", sa.LargeBinary),
        stored_at(),
    )
    op.create_table(
        "catga_chord_parts",
        sa.Column("group_id", sa.Text, primary_key=True),
        sa.Column("task_id", sa.Text, primary_key=True),
        sa.Column("position", sa.Integer),
        sa.Column("result", sa.LargeBinary, nullable=False),
    )
    for table in _TABLES:
        op.create_index(f"{table}_stored_at", table, ["stored_at"])


def downgrade() -> None:
    """Drop the four tables: results are gone, and chords under way never run their bodies."""
    for table in ("catga_chord_parts", *_TABLES):
        op.drop_table(table)
