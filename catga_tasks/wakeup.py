"""How does a relay learn of a commit before its next look at the table?

On PostgreSQL a NOTIFY after the commit, from a thread of the producer's process, several commits at a time; the relay
listens on a connection of its own. A wake-up may get lost (a process that ends, a pooler in transaction mode);
the relay's polling finds the rows all the same. On SQLite the relay watches the file's change counter.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks.outbox import CHANNEL, notify

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

#: Commits within this many seconds of a wake-up share the next one.
COALESCE_SECONDS = 0.005
#: After this long without a commit the thread's connection goes back to the pool.
IDLE_SECONDS = 5.0
#: How often the relay looks at SQLite's change counter, in seconds.
WATCH_SECONDS = 0.005


class Waker:
    """Wakes relays after commits, from a background thread that is started on first use and again after a fork."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wanted = threading.Event()
        self._pid = 0
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Ask for a wake-up and return at once."""
        if self._engine.dialect.name != "postgresql":
            return
        if self._pid != os.getpid():
            self._start()
        self._wanted.set()

    def _start(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
            self._wanted = threading.Event()
            threading.Thread(target=self._run, name="catga-outbox-waker", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            try:
                with self._engine.connect() as plain:
                    self._serve(plain.execution_options(isolation_level="AUTOCOMMIT"))
            except SQLAlchemyError:
                # Only the wake-up is lost: the relay polls. Wait for the next commit before the next try.
                self._wanted.clear()

    def _serve(self, connection: Connection) -> None:
        while self._wanted.wait(IDLE_SECONDS):
            self._wanted.clear()
            notify(connection)
            time.sleep(COALESCE_SECONDS)


class Listener:
    """Waits until there may be something to do. `interrupt` ends a wait from a signal handler or a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self._version: object = None
        self._ours, self._theirs = socket.socketpair()
        self._ours.settimeout(0)

    def wait(self, seconds: float) -> bool:
        """Wait for a wake-up, at most so long; return whether one came."""
        try:
            if self._engine.dialect.name == "sqlite":
                return self._watch(seconds)
            return self._listen(seconds)
        except SQLAlchemyError:
            # The database is away: the relay finds out by itself, and backs off.
            self.disconnect()
            return self._sleep(seconds)

    def interrupt(self) -> None:
        """End the wait that is under way, or the next one; nothing after `close`."""
        with suppress(OSError):
            self._theirs.send(b"x")

    def disconnect(self) -> None:
        """Drop the connection; the next wait opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except SQLAlchemyError:
                connection.detach()

    def close(self) -> None:
        """Free the connection and the sockets."""
        self.disconnect()
        self._ours.close()
        self._theirs.close()

    def _sleep(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, seconds))
        return bool(ready) and self._drained()

    def _drained(self) -> bool:
        try:
            self._ours.recv(4096)
        except BlockingIOError:
            return False
        return True

    def _listen(self, seconds: float) -> bool:
        """Wait on PostgreSQL's socket, where the driver is psycopg; with another one only polling is left."""
        first = self._connection is None
        connection = self._open()
        driver: Any = connection.connection.driver_connection
        if not hasattr(driver, "pgconn"):
            return self._sleep(seconds)
        if first:
            connection.execute(text(f"LISTEN {CHANNEL}"))
            # Rows that were committed before the LISTEN sent their wake-up to nobody.
            return True
        ready, _, _ = select.select([self._ours, driver.fileno()], [], [], max(0.0, seconds))
        if self._ours in ready:
            self._drained()
        if driver.fileno() not in ready:
            return bool(ready)
        try:
            driver.pgconn.consume_input()
            while driver.pgconn.notifies() is not None:
                pass
        except connection.dialect.loaded_dbapi.Error:
            self.disconnect()
            return self._sleep(seconds)
        return True

    def _watch(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        connection = self._open()
        while True:
            version = connection.execute(text("PRAGMA data_version")).scalar()
            if version != self._version:
                self._version = version
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._sleep(min(left, WATCH_SECONDS)):
                return True

    def _open(self) -> Connection:
        if self._connection is None:
            plain = self._engine.connect()
            self._connection = plain.execution_options(isolation_level="AUTOCOMMIT")
        return self._connection
