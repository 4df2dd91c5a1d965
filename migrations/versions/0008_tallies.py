"""What relays count is in their rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add an empty column, which rewrites no table."""
    if op.get_context().dialect.name == "postgresql":
        # While it waits for a long transaction's lock, everything that comes later waits behind it.
        op.execute("SET LOCAL lock_timeout = '10s'")
    op.add_column("catga_relays", sa.Column("tally", sa.Text))


def downgrade() -> None:
    """Forget what was counted."""
    op.drop_column("catga_relays", "tally")
