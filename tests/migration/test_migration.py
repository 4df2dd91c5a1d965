"""The shipped history makes the schema that the code declares."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from catga_tasks import migrate, tables
from catga_tasks.errors import MigrationRequired
from catga_tasks.migrations import versions

#: The newest file of the history.
NEWEST = max(path.name[:4] for path in Path(versions.__file__).parent.glob("0*.py"))


@pytest.fixture
def engine(database_url):
    engine = sa.create_engine(database_url)
    yield engine
    engine.dispose()


def test_history_builds_what_is_declared(engine):
    """After `migrate`, Alembic finds no difference between the database and the declared tables."""
    assert migrate.upgrade(engine) == (None, NEWEST)
    with engine.connect() as connection:
        options = {"version_table": migrate.VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, tables.metadata) == []


def test_a_second_run_changes_nothing(engine):
    """`migrate` may run at every deployment."""
    migrate.upgrade(engine)
    assert migrate.upgrade(engine) == (NEWEST, NEWEST)


def test_missing_tables_name_the_command(engine):
    """Without the tables the error says what to run."""
    with engine.connect() as connection, pytest.raises(MigrationRequired, match="outbox migrate"):
        migrate.check(connection)


def test_a_newer_schema_is_refused(engine):
    """An older release says that it is older, and leaves the schema alone."""
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'"))
    with engine.connect() as connection, pytest.raises(MigrationRequired, match="newer than this release"):
        migrate.check(connection)
    with pytest.raises(MigrationRequired, match="newer than this release"):
        migrate.upgrade(engine)


def test_the_script_builds_the_same_schema(postgres_url):
    """`migrate --sql` gives a script that a database administrator can run by hand."""
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(migrate.sql("postgresql").replace("%", "%%"))
    with engine.connect() as connection:
        migrate.check(connection)
    engine.dispose()


def test_the_applications_own_alembic_is_left_alone(engine):
    """Our version table is ours: one named alembic_version, with its content, stays as it was."""
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num varchar(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('abc')"))
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == ["abc"]
