"""How does a task call become a row in the caller's transaction?

`delay()` only appends to a buffer that belongs to the caller's transaction; one insert before the commit writes it.
What is enqueued in a savepoint goes with it. Outside any transaction a message is inserted in one of its own.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from catga_tasks import storing
from catga_tasks.database import Source, close_before_forks, is_locked, open_engine, refuse_missing_table
from catga_tasks.envelope import Envelope
from catga_tasks.errors import OutboxUnavailable, TransactionRequired
from catga_tasks.joining import SessionTarget, Target, listen_to_sessions, target_of, tracked_class
from catga_tasks.wakeup import Waker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.orm import SessionTransaction

    from catga_tasks.storing import Entry

#: What `join` takes.
Joinable = Session | AsyncSession | Connection | AsyncConnection
#: What `track` takes.
Trackable = sessionmaker[Any] | scoped_session[Any] | async_sessionmaker[Any]


class Outbox:
    """The producer's side of the outbox: `app.outbox`."""

    def __init__(self, source: Source, *, require_transaction: bool = False) -> None:
        self._source = source
        self._require_transaction = require_transaction
        self._engine: Engine | None = None
        self._pid = os.getpid()
        self._waker: Waker | None = None
        self._targets: ContextVar[tuple[Target, ...]] = ContextVar("catga_outbox_targets", default=())
        self._registries: list[scoped_session[Any]] = []

    @property
    def engine(self) -> Engine:
        """The engine of the outbox's database, for messages outside any transaction and for relays."""
        if self._engine is None:
            self._engine = open_engine(self._source)
            close_before_forks(self._engine)
        if self._pid != os.getpid():
            # A forked child must not talk on its parent's connections, nor close them.
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        return self._engine

    def session(self) -> Session:
        """Return a new session on the outbox's database: of the application's own sessionmaker, if it gave that."""
        engine = self.engine
        found: Session = self._source() if isinstance(self._source, sessionmaker) else Session(engine)
        return found

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Yield a connection, and commit: for transactions of our own.

        On PostgreSQL they are at READ COMMITTED, whatever the engine is at: their statements expect to see what others
        have just committed, and nobody would repeat them after a serialization failure.
        """
        with self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execution_options(isolation_level="READ COMMITTED")
            with connection.begin():
                yield connection

    @contextmanager
    def join(self, transaction: Joinable) -> Iterator[None]:
        """Let every task that is enqueued in this block commit, or roll back, with `transaction`.

        `transaction` is a `Session`, `AsyncSession`, `Connection` or `AsyncConnection`. The block does no I/O and
        ends nothing: the messages are written by one insert when the transaction commits.

            with Session.begin() as session:
                session.add(order)
                with app.outbox.join(session):
                    charge.delay(order.id)

        Raises `ConfigurationError` for anything else.
        """
        target = target_of(self, transaction)
        token = self._targets.set((*self._targets.get(), target))
        try:
            yield
        finally:
            target.leave()
            self._targets.reset(token)

    def track(self, sessions: Trackable) -> None:
        """Let every transaction of these sessions be joined without a word, from its begin to its end.

        `sessions` is the application's `sessionmaker`, `scoped_session` or `async_sessionmaker`. A session's
        transaction begins with `Session.begin()` or with the session's first use; where several are open at
        once in one thread or task, the one that began last is joined. Call it once, at start.
        """
        listen_to_sessions()
        event.listen(tracked_class(sessions), "after_transaction_create", self._began)
        if isinstance(sessions, scoped_session):
            self._registries.append(sessions)

    def add(self, entries: Sequence[Entry], *, independent: bool = False) -> None:
        """Enqueue messages, and what goes with them, in the current transaction, or in one of their own.

        `independent` keeps them out of the current transaction: a retry must survive its rollback. Raises
        `TransactionRequired`, `MigrationRequired` or `OutboxUnavailable`; nothing was enqueued then.
        """
        target = self.current_target()
        if target is not None and not independent:
            target.add(entries)
            return
        envelopes = [entry for entry in entries if isinstance(entry, Envelope)]
        if target is not None and self.engine.dialect.name == "sqlite" and target.postpone(envelopes):
            # SQLite has one writer, which may be the current transaction.
            return
        if envelopes and self._require_transaction and not independent:
            message = (
                f"{envelopes[0].task} was enqueued outside any transaction and outbox_require_transaction is set: "
                "use `with app.outbox.join(session):`, or track your sessionmaker with app.outbox.track()."
            )
            raise TransactionRequired(message)
        self.insert(entries)

    def insert(self, entries: Sequence[Entry]) -> None:
        """Enqueue messages, and what goes with them, in a transaction of their own; raise as `add` does."""
        try:
            with self.begin() as connection:
                storing.store(connection, entries)
        except DBAPIError as error:
            refuse_missing_table(error)
            if is_locked(error):
                message = (
                    "SQLite's file is locked by another transaction; nothing was enqueued. If it is your own, join it: "
                    "`with app.outbox.join(session):`, or app.outbox.track() your sessionmaker."
                )
                raise OutboxUnavailable(message) from error
            message = (
                f"The outbox's database refused the message or didn't answer ({type(error.orig).__name__}); nothing "
                "was enqueued. Check outbox_url and that the server is up."
            )
            raise OutboxUnavailable(message) from error
        self.wake()

    def wake(self) -> None:
        """Wake the relays: something was committed."""
        engine = self.engine
        if self._waker is None:
            self._waker = Waker(engine)
        self._waker.wake()

    def current_target(self) -> Target | None:
        """Return the transaction that a message would be enqueued in, or None."""
        targets = self._targets.get()
        for target in reversed(targets):
            if target.alive():
                return target
        for registry in self._registries:
            if registry.registry.has() and registry().in_transaction():
                return SessionTarget(self, registry())
        return None

    def _began(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None:
            return
        living = tuple(target for target in self._targets.get() if target.alive())
        self._targets.set((*living, SessionTarget(self, session, transaction)))
