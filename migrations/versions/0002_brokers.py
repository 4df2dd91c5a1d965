"""Messages and relays name their broker."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = ("catga_outbox", "catga_dead_letters", "catga_relays")
#: The indexes that a claim walks along, by their columns.
_INDEXES = {
    "catga_outbox_due": ["available_at", "id"],
    "catga_outbox_due_by_queue": ["queue", "available_at", "id"],
    "catga_outbox_suspects": ["available_at", "id"],
}


def upgrade() -> None:
    """Add a column with a constant default, which rewrites no table, and lead the claim's indexes with it."""
    _dont_queue_for_long()
    for table in _TABLES:
        op.add_column(table, sa.Column("broker", sa.Text, nullable=False, server_default=""))
    _index(["broker"])


def downgrade() -> None:
    """Forget the brokers: what waits for one of `outbox_brokers` would go to the application's own."""
    _dont_queue_for_long()
    _index([])
    for table in _TABLES:
        op.drop_column(table, "broker")


def _dont_queue_for_long() -> None:
    # While it waits for a long transaction's lock, everything that comes later waits behind it.
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '10s'")


def _index(first: list[str]) -> None:
    for name, columns in _INDEXES.items():
        where = sa.text("suspect") if name == "catga_outbox_suspects" else None
        op.drop_index(name, "catga_outbox")
        op.create_index(name, "catga_outbox", [*first, *columns], postgresql_where=where, sqlite_where=where)
