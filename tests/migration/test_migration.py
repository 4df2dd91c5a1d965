"""The shipped history makes the schema that the code declares."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from catga_tasks import migrate, tables
from catga_tasks.errors import MigrationRequired
from catga_tasks.migrations import versions
from tests.processes import ROOT

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
        assert differences(connection) == []


def differences(connection):
    """What Alembic finds between the database and the declared tables."""
    options = {"version_table": migrate.VERSION_TABLE, "compare_type": True}
    return compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)


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


def test_the_script_builds_the_same_schema(engine, database_url):
    """What `migrate --sql` prints, run by the database's own client on an empty database, makes what is declared."""
    script = migrate.sql(engine.dialect.name)
    if engine.dialect.name == "postgresql":
        address = sa.make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(script.encode())
    else:
        with closing(sqlite3.connect(sa.make_url(database_url).database)) as connection:
            connection.executescript(script)
    with engine.connect() as connection:
        migrate.check(connection)
        assert differences(connection) == []
    assert migrate.upgrade(engine) == (NEWEST, NEWEST)


def test_the_applications_own_alembic_is_left_alone(engine):
    """Our version table is ours: one named alembic_version, with its content, stays as it was."""
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num varchar(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('abc')"))
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == ["abc"]


ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table, create_engine

metadata = MetaData()
Table("orders", metadata, Column("id", Integer, primary_key=True))

{recipe}

with create_engine({url!r}).connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, {argument})
    with context.begin_transaction():
        context.run_migrations()
"""


@pytest.mark.parametrize("recipe", [True, False], ids=["with the recipe", "without"])
def test_the_applications_autogenerate(engine, database_url, tmp_path, recipe):
    """With the `include_name` of the how-to, `alembic revision --autogenerate` proposes no change of ours."""
    migrate.upgrade(engine)
    page = (ROOT / "docs/how-to/alembic.md").read_text()
    [function] = re.findall(r"^def include_name.*?(?=^$)", page, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "alembic"
    (folder / "versions").mkdir(parents=True)
    (tmp_path / "alembic.ini").write_text(f"[alembic]\nscript_location = {folder}\n")
    (folder / "env.py").write_text(
        ENV.format(
            recipe=function if recipe else "", argument="include_name=include_name" if recipe else "", url=database_url
        )
    )
    (folder / "script.py.mako").write_text((ROOT / "migrations/script.py.mako").read_text())
    command = [sys.executable, "-m", "alembic", "revision", "--autogenerate", "-m", "orders"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    [revision] = (folder / "versions").glob("*.py")
    proposed = revision.read_text()
    assert "op.create_table('orders'" in proposed
    assert ("catga_" in proposed) is not recipe
    assert ("drop_table('catga_outbox')" in proposed) is not recipe
