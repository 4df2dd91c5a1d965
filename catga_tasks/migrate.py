"""Is the schema the one that this release needs, and how does it get there?

The history ships in the package (`catga_tasks.migrations`) with a version table of its own, so that it lives
beside the application's own Alembic.
"""

from __future__ import annotations

import io
from importlib.resources import files
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from catga_tasks.errors import MigrationRequired

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

VERSION_TABLE = "catga_version"


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Bring the tables to this release's revision, in one transaction; return the revisions before and after.

    Raises `MigrationRequired` if the schema is newer than this release.
    """
    head = _head()
    with engine.connect() as connection:
        before = revision(connection)
        if before != head:
            _refuse_newer(before)
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
    return before, head


def sql(dialect: str) -> str:
    """Return the whole history as a script for a database administrator, without connecting to anything."""
    buffer = io.StringIO()
    config = _config(buffer)
    config.attributes["dialect"] = dialect
    command.upgrade(config, "head", sql=True)
    return buffer.getvalue()


def check(connection: Connection) -> None:
    """Raise `MigrationRequired` unless the schema is exactly this release's."""
    found, head = revision(connection), _head()
    if found == head:
        return
    _refuse_newer(found)
    what = (
        "The outbox's tables are missing"
        if found is None
        else f"The outbox's schema is at revision {found}, this release needs {head}"
    )
    message = f"{what}: run `celery -A <your app> outbox migrate`."
    raise MigrationRequired(message)


def revision(connection: Connection) -> str | None:
    """Return the revision that the database is at, or None."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def _refuse_newer(found: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        message = f"The outbox's schema is at revision {found}, which is newer than this release: upgrade catga-tasks."
        raise MigrationRequired(message)


def _head() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None  # noqa: S101 - the package ships its history
    return head


def _config(output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(files("catga_tasks.migrations")))
    return config
