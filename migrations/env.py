"""Runs the revisions on the connection that `catga_tasks.migrate` hands over, or prints them as SQL."""

from __future__ import annotations

from alembic import context

from catga_tasks import tables
from catga_tasks.migrate import VERSION_TABLE

connection = context.config.attributes.get("connection")

if context.is_offline_mode():
    context.configure(
        dialect_name=context.config.attributes["dialect"],
        target_metadata=tables.metadata,
        version_table=VERSION_TABLE,
        literal_binds=True,
    )
else:
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        version_table=VERSION_TABLE,
        include_name=lambda name, type_, _parents: type_ != "table" or name in tables.metadata.tables,
    )
with context.begin_transaction():
    context.run_migrations()
