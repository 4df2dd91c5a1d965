"""How is a message tied to a transaction: to a session's or a connection's, and to its savepoints?

A target buffers; events of SQLAlchemy write the buffer before the commit and drop what a rollback undoes. What is
enqueued while the commit is under way is written at once, and what is enqueued after it commits by itself.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from catga_tasks import storing, tables
from catga_tasks.database import refuse_missing_table
from catga_tasks.envelope import Envelope
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.orm import SessionTransaction

    from catga_tasks.storing import Entry


class Owner(Protocol):
    """The outbox that a message is for."""

    def wake(self) -> None:
        """Wake the relays: something was committed."""

    def insert(self, entries: Sequence[Entry]) -> None:
        """Enqueue messages, and what goes with them, in a transaction of their own."""


class Target(Protocol):
    """A transaction that messages are enqueued in."""

    def add(self, entries: Sequence[Entry]) -> None:
        """Keep the messages, and what goes with them, for the commit; no I/O."""

    def alive(self) -> bool:
        """Return whether the transaction can still take messages."""

    def leave(self) -> None:
        """Take no more messages: the block is over, also for threads and asyncio tasks that began in it."""

    def postpone(self, envelopes: Sequence[Envelope]) -> bool:
        """Enqueue the messages by themselves once the transaction is over, however it ends; False if that can't be."""


class SessionTarget:
    """A session: joined for a block, or tracked for one transaction."""

    def __init__(self, owner: Owner, session: Session, transaction: SessionTransaction | None = None) -> None:
        self._owner = owner
        # Weak ones: a session that is forgotten in its transaction must go, and give back its connection.
        self._session = weakref.ref(session)
        self._transaction = None if transaction is None else weakref.ref(transaction)
        self._left = False

    def alive(self) -> bool:
        """Return whether the tracked transaction is still the session's; a block's session counts until its end.

        Also if a flush has failed in it, which leaves it to be rolled back; but not in a listener after the commit.
        """
        session = self._session()
        if session in _committed:
            return False
        if self._transaction is None:
            return not self._left
        transaction = self._transaction()
        return session is not None and transaction is not None and session.get_transaction() is transaction

    def leave(self) -> None:
        """Take no more messages."""
        self._left = True

    def add(self, entries: Sequence[Entry]) -> None:
        """Keep the messages for the session's commit; begin its transaction if there is none."""
        session = self._session()
        if session is None:
            message = "The joined session is gone: keep it open while tasks are enqueued in it."
            raise ConfigurationError(message)
        if not session.in_transaction():
            session.begin()
        _buffer(self._owner, session).add(session, entries)

    def postpone(self, envelopes: Sequence[Envelope]) -> bool:
        """Keep the messages for the moment after the session's transaction."""
        session = self._session()
        if session is None or not session.in_transaction():
            return False
        _buffer(self._owner, session).postponed += envelopes
        return True


class _SessionBuffer:
    """What is enqueued in a session's transaction, each message with the savepoint that it belongs to."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._entries: list[tuple[SessionTransaction, Sequence[Entry]]] = []
        self._wrote = False
        self._failed = False
        self.postponed: list[Envelope] = []

    def add(self, session: Session, entries: Sequence[Entry]) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        assert transaction is not None  # noqa: S101 - begun by the caller
        self._entries.append((transaction, entries))
        if session in _committing:
            # A flush, or a listener of the application, enqueues: nothing will write it later.
            self.write(session)

    def write(self, session: Session) -> None:
        """Insert everything with one statement, in the session's own transaction."""
        if self._failed:
            message = "The messages of this transaction couldn't be written, so it can't be committed: roll it back."
            raise PendingRollbackError(message)
        if not session._flushing and any(storing.takes_keys(several) for _, several in self._entries):
            # What the flush locks must not come after the keys: two transactions could wait for each other.
            session.flush()
        if not self._entries:
            return
        entries = [entry for _, several in self._entries for entry in several]
        self._entries.clear()
        try:
            storing.store(_connection_of(session), entries)
        except BaseException as error:
            # SQLAlchemy leaves the transaction open, and a second commit would go through without them.
            self._failed = True
            if isinstance(error, DBAPIError):
                refuse_missing_table(error)
            raise
        self._wrote = True

    def committed(self) -> None:
        """Wake the relays after the commit."""
        if self._wrote:
            self._owner.wake()

    def rolled_back(self, transaction: SessionTransaction) -> None:
        """Drop what was enqueued in this savepoint, or in the whole transaction."""
        self._entries = [entry for entry in self._entries if not _within(entry[0], transaction)]

    def ended(self) -> None:
        """Forget what was never committed, and enqueue what was postponed: the whole transaction is over."""
        self._entries.clear()
        self._wrote = self._failed = False
        if self.postponed:
            envelopes, self.postponed = self.postponed, []
            self._owner.insert(envelopes)


def _connection_of(session: Session) -> Connection:
    try:
        return session.connection(bind_arguments={"clause": tables.outbox})
    except UnboundExecutionError:
        message = "The joined session has no bind for the table catga_outbox: give it one (bind=, or binds={...})."
        raise ConfigurationError(message) from None


def _within(transaction: SessionTransaction | None, ancestor: SessionTransaction) -> bool:
    while transaction is not None and transaction is not ancestor:
        transaction = transaction.parent
    return transaction is not None


class _ConnectionTarget:
    """A connection without a session: joined for a block."""

    def __init__(self, buffer: _ConnectionBuffer) -> None:
        self._buffer = buffer
        self._left = False

    def alive(self) -> bool:
        return not self._left

    def leave(self) -> None:
        self._left = True

    def add(self, entries: Sequence[Entry]) -> None:
        self._buffer.add(entries)

    def postpone(self, _envelopes: Sequence[Envelope]) -> bool:
        # The core has no event after a transaction's end.
        return False


class _ConnectionBuffer:
    """What is enqueued in a connection's transaction, each message with the names of the savepoints around it."""

    def __init__(self, owner: Owner, connection: Connection) -> None:
        self._owner = owner
        self._connection = weakref.ref(connection)
        self._entries: list[tuple[frozenset[str], Sequence[Entry]]] = []

    def add(self, entries: Sequence[Entry]) -> None:
        connection = self._connection()
        if connection is None or connection.closed:
            message = "The joined connection is closed: keep it open while tasks are enqueued in it."
            raise ConfigurationError(message)
        self._entries.append((_savepoints(connection), entries))
        if not connection.in_transaction():
            connection.begin()

    def write(self, connection: Connection) -> None:
        if not self._entries:
            return
        # What is written may enqueue more: the body of a chord whose parts have all returned.
        while self._entries:
            entries = [entry for _, several in self._entries for entry in several]
            self._entries.clear()
            try:
                storing.store(connection, entries)
            except BaseException as error:
                _abandon(connection)
                if isinstance(error, DBAPIError):
                    refuse_missing_table(error)
                raise
        # The core has no event after the commit: this wake-up may come a moment early. It makes the relay poll
        # every few milliseconds for a while, which finds the rows.
        self._owner.wake()

    def rolled_back(self, savepoint: str | None = None) -> None:
        """Drop what was enqueued in this savepoint, or in the whole transaction."""
        self._entries = [entry for entry in self._entries if savepoint is not None and savepoint not in entry[0]]


def _savepoints(connection: Connection) -> frozenset[str]:
    names = set()
    savepoint = connection.get_nested_transaction()
    while savepoint is not None:
        names.add(savepoint._savepoint)
        savepoint = savepoint._previous_nested
    return frozenset(names)


def _abandon(connection: Connection) -> None:
    """End the transaction of a commit that can't be: SQLAlchemy takes it for over, and hands the connection on."""
    if connection.dialect.name == "sqlite":
        # A database in memory goes with its connection.
        connection.connection.rollback()
    else:
        connection.invalidate()


#: Where a session keeps its buffers, among its `info`: they know its transaction, and must go with it.
_BUFFERS = "catga_tasks"
#: Sessions that have buffers; whose transaction's commit has begun; whose transaction is committed, and not yet over.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_committing: weakref.WeakSet[Session] = weakref.WeakSet()
_committed: weakref.WeakSet[Session] = weakref.WeakSet()
_connections: weakref.WeakKeyDictionary[Connection, dict[Owner, _ConnectionBuffer]] = weakref.WeakKeyDictionary()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_listening: list[bool] = []


def target_of(owner: Owner, transaction: object) -> Target:
    """Return the target for what `join` was given, and see that its events are heard."""
    if isinstance(transaction, AsyncSession):
        transaction = transaction.sync_session
    elif isinstance(transaction, scoped_session):
        transaction = transaction()
    elif isinstance(transaction, AsyncConnection):
        transaction = transaction.sync_connection
    if isinstance(transaction, Session):
        listen_to_sessions()
        return SessionTarget(owner, transaction)
    if isinstance(transaction, Connection):
        _listen_to(transaction.engine)
        buffers = _connections.setdefault(transaction, {})
        return _ConnectionTarget(buffers.setdefault(owner, _ConnectionBuffer(owner, transaction)))
    message = (
        "app.outbox.join() takes a Session, AsyncSession, Connection or AsyncConnection of SQLAlchemy, "
        f"not {type(transaction).__name__}."
    )
    raise ConfigurationError(message)


def pending(owner: Owner, transaction: Session | Connection | None = None) -> list[Envelope]:
    """Return the messages that wait for the commit of this transaction, or of any; what savepoints undid is gone."""
    known: list[tuple[Any, dict[Owner, Any]]] = [(each, _buffers(each)) for each in _sessions]
    known += _connections.items()
    buffers = [each[owner] for joined, each in known if owner in each and transaction in (None, joined)]
    entries = [entry for buffer in buffers for _, several in buffer._entries for entry in several]
    return [entry for entry in entries if isinstance(entry, Envelope)]


def _buffer(owner: Owner, session: Session) -> _SessionBuffer:
    buffers: dict[Owner, _SessionBuffer] = session.info.setdefault(_BUFFERS, {})
    buffer = buffers.get(owner)
    if buffer is None:
        buffer = buffers[owner] = _SessionBuffer(owner)
        _sessions.add(session)
    return buffer


def _buffers(session: Session) -> dict[Owner, _SessionBuffer]:
    found: dict[Owner, _SessionBuffer] = session.info.get(_BUFFERS, {})
    return found


def tracked_class(sessions: object) -> Any:
    """Return what SQLAlchemy takes as the target of session events for these sessions."""
    if isinstance(sessions, scoped_session):
        sessions = sessions.session_factory
    if isinstance(sessions, sessionmaker):
        return sessions
    if isinstance(sessions, async_sessionmaker):
        # Events are the synchronous session's; give these sessions a class of their own, so that no others are tracked.
        base = sessions.kw.get("sync_session_class", Session)
        if isinstance(base, sessionmaker):
            return base
        tracked = type("TrackedSession", (base,), {})
        sessions.configure(sync_session_class=tracked)
        return tracked
    message = (
        f"app.outbox.track() takes a sessionmaker, scoped_session or async_sessionmaker, not {type(sessions).__name__}."
    )
    raise ConfigurationError(message)


def listen_to_sessions() -> None:
    """Listen to all sessions of the process, once: cheaper than a listener for each session that is joined."""
    if _listening:
        return
    _listening.append(True)
    event.listen(Session, "before_commit", _before_commit)
    # First of all: another listener may enqueue, and the transaction takes no more.
    event.listen(Session, "after_commit", _after_commit, insert=True)
    event.listen(Session, "after_soft_rollback", _after_soft_rollback)
    event.listen(Session, "after_transaction_end", _after_transaction_end)


def _before_commit(session: Session) -> None:
    if not _commits_all(session):
        return
    _committing.add(session)
    for buffer in list(_buffers(session).values()):
        buffer.write(session)


def _commits_all(session: Session) -> bool:
    """Return whether the whole transaction is about to be committed, not just a savepoint."""
    if not session.in_nested_transaction():
        return True
    # SQLAlchemy doesn't say which: it releases savepoints that are open at a commit. Where it has no such attribute the
    # messages are written at each savepoint's end, which is as good, but slow.
    return getattr(session.get_transaction(), "_current_fn", True) is not None


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        _committed.add(session)
        for buffer in _buffers(session).values():
            buffer.committed()


def _after_soft_rollback(session: Session, previous: SessionTransaction) -> None:
    for buffer in _buffers(session).values():
        buffer.rolled_back(previous)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        _committing.discard(session)
        _committed.discard(session)
        for buffer in _buffers(session).values():
            buffer.ended()


def _listen_to(engine: Engine) -> None:
    if engine in _engines:
        return
    _engines.add(engine)

    def each(connection: Connection, action: Callable[[_ConnectionBuffer], None]) -> None:
        for buffer in list(_connections.get(connection, {}).values()):
            action(buffer)

    event.listen(engine, "commit", lambda c: each(c, lambda buffer: buffer.write(c)))
    event.listen(engine, "prepare_twophase", lambda c, _xid: each(c, lambda buffer: buffer.write(c)))
    # It may be committed without having been prepared; otherwise there is nothing left to write.
    event.listen(engine, "commit_twophase", lambda c, _xid, _: each(c, lambda buffer: buffer.write(c)))
    event.listen(engine, "rollback", lambda c: each(c, lambda buffer: buffer.rolled_back()))
    event.listen(engine, "rollback_twophase", lambda c, _xid, _: each(c, lambda buffer: buffer.rolled_back()))
    event.listen(engine, "rollback_savepoint", lambda c, name, _: each(c, lambda buffer: buffer.rolled_back(name)))
