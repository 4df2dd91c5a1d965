"""Which database is the outbox's, and what does its driver's error mean?"""

from __future__ import annotations

import os
import re
import sqlite3
import weakref
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from catga_tasks.errors import ConfigurationError, MigrationRequired

#: What `Catga(outbox=...)` takes.
Source = str | URL | Engine | sessionmaker[Any]

#: Seconds that a connection to PostgreSQL may take to open, unless the URL says otherwise.
CONNECT_TIMEOUT = 10
#: Seconds that a transaction on SQLite waits for the others' writes, unless the URL says otherwise. Python's own 5 were
#: all but used up by six callers and eight processes of workers on one file.
BUSY_TIMEOUT = 20


#: libpq's PQTRANS_INERROR: in a transaction that a statement has failed in.
_IN_ERROR = 3
#: Connections that are kept open between uses.
POOL_SIZE = 20


def open_engine(source: object) -> Engine:
    """Return the engine of `Catga(outbox=...)`; raise `ConfigurationError` that says what is wrong with it."""
    if isinstance(source, Engine):
        return source
    if isinstance(source, sessionmaker):
        return _bound(source)
    if isinstance(source, (AsyncEngine, async_sessionmaker)):
        message = (
            "outbox: pass a synchronous URL such as 'postgresql+psycopg://localhost/shop' (relays and commands use "
            "it); AsyncSession and AsyncConnection join all the same."
        )
        raise ConfigurationError(message)
    if not isinstance(source, (str, URL)):
        message = f"outbox must be a SQLAlchemy URL, an Engine or a sessionmaker, not {type(source).__name__}."
        raise ConfigurationError(message)
    try:
        return _connected(make_url(source))
    except NoSuchModuleError as error:
        message = f"outbox_url: unknown database in the URL ({error}); use postgresql+psycopg://... or sqlite:///..."
        raise ConfigurationError(message) from None
    except ArgumentError:
        # The URL may hold a password: it is not repeated.
        message = "outbox_url is not a SQLAlchemy URL; it looks like 'postgresql+psycopg://user@host/database'."
        raise ConfigurationError(message) from None
    except ModuleNotFoundError as error:
        message = (
            f"outbox_url: the driver {error.name!r} is not installed; "
            "`pip install catga-tasks[postgres]` brings psycopg, for postgresql+psycopg:// URLs."
        )
        raise ConfigurationError(message) from None


def close_before_forks(engine: Engine) -> None:
    """Have this engine's idle connections closed before the process forks, if they are to a file of SQLite.

    A child that inherits one takes its parent's locks for its own: lost writes, a broken file. Servers know their
    clients by their sockets, which a child only has to leave alone.
    """
    # A database in memory goes with its connection, and has another pool.
    if engine.dialect.name == "sqlite" and isinstance(engine.pool, QueuePool):
        _files.add(engine)


_files: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_files() -> None:
    for engine in list(_files):
        engine.dispose()


os.register_at_fork(before=_close_files)


def masked_url(url: str) -> str:
    """Return the URL without its password; nothing of it if it can't be read."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "***"


def refuse_missing_table(error: SQLAlchemyError) -> None:
    """Raise `MigrationRequired` if the error says that a table isn't there; return otherwise."""
    original = getattr(error, "orig", None)
    if getattr(original, "sqlstate", None) == "42P01" or "no such table" in str(original):
        message = "The outbox's tables are missing: run `celery -A <your app> outbox migrate` on this database."
        raise MigrationRequired(message) from None


def is_locked(error: SQLAlchemyError) -> bool:
    """Return whether SQLite's one writer was another one for too long."""
    return "database is locked" in str(getattr(error, "orig", None))


def is_passing(error: SQLAlchemyError) -> bool:
    """Return whether trying again may help: the server is out or a replica, or it chose this transaction as a victim.

    By SQLSTATE (PostgreSQL, appendix A): connection exceptions, transaction rollbacks (serialization, deadlocks),
    insufficient resources, shutdowns, a lock that isn't to be had, and a server that takes no writes.
    """
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated or is_locked(error):
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state[:2] in ("08", "40", "53") or state[:4] == "57P0" or state in ("55P03", "25006")
    # psycopg gives a connection that can't be opened or that broke no state. SQLite's errors have none either.
    return isinstance(error, (OperationalError, InterfaceError)) and not isinstance(error.orig, sqlite3.Error)


def storable(value: object) -> str:
    """Return text that every database takes: no lone surrogates, as names of files have them, and no NUL."""
    return str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def is_aborted(connection: Connection) -> bool:
    """Return whether an error has ended the transaction, so that PostgreSQL would take its commit for a rollback."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name != "postgresql":
        return False
    if hasattr(driver, "info"):
        # psycopg; the driver knows it without asking the server.
        return bool(driver.info.transaction_status == _IN_ERROR)
    try:
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError:
        return True
    return False


def in_one_line(error: Exception) -> str:
    """Say what is wrong in one line, and no secret with it."""
    if not isinstance(error, DBAPIError):
        return " ".join(str(error).split())
    words = str(error.orig).strip().partition("\n")[0]
    # Whatever the driver repeats of the URL.
    words = re.sub(r"(password\s*=\s*|://[^:/@\s]+:)[^@\s]+", r"\1***", words)
    if is_locked(error):
        return (
            "SQLite's file is locked by another transaction: end it, or raise the time-out (sqlite:///...?timeout=60)."
        )
    if getattr(error.orig, "sqlstate", None) == "42501":
        return f"The database refuses it: {words}. Grant the outbox's tables to this user."
    return f"The database can't be used: {words} (check outbox_url and that the server is up)."


def _bound(sessions: sessionmaker[Any]) -> Engine:
    bind = sessions.kw.get("bind")
    if isinstance(bind, Connection):
        bind = bind.engine
    if not isinstance(bind, Engine):
        message = "outbox: the sessionmaker has no bind: give it an Engine, or pass the Engine itself."
        raise ConfigurationError(message)
    return bind


def _connected(url: URL) -> Engine:
    dialect = url.get_dialect()
    if url.get_backend_name() not in ("postgresql", "sqlite"):
        message = f"outbox_url: {url.get_backend_name()} is not supported; use postgresql+psycopg:// or sqlite:///."
        raise ConfigurationError(message)
    if getattr(dialect, "is_async", False):
        message = f"outbox_url: {url.drivername} is an asynchronous driver; use postgresql+psycopg:// or sqlite:///."
        raise ConfigurationError(message)
    bounds = {"psycopg": ("connect_timeout", CONNECT_TIMEOUT), "pysqlite": ("timeout", BUSY_TIMEOUT)}
    bound = bounds.get(dialect.driver)
    limits = dict([bound]) if bound and bound[0] not in url.query else {}
    # A connection for each thread that is at it, however many a worker has; SQLite's pools take no sizes for memory.
    sizes = {"pool_size": POOL_SIZE, "max_overflow": -1} if dialect.name == "postgresql" else {}
    return create_engine(url, connect_args=limits, pool_pre_ping=True, **sizes)
