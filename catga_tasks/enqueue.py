"""How does a task call become a row in the caller's transaction?

`delay()` only appends to a buffer that belongs to the caller's transaction; one insert before the commit writes it.
What is enqueued in a savepoint goes with it. Outside any transaction a message is inserted in one of its own.
"""

from __future__ import annotations

import os
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from catga_tasks import outbox, tables
from catga_tasks.errors import ConfigurationError, MigrationRequired, OutboxUnavailable, TransactionRequired
from catga_tasks.wakeup import Waker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy.orm import SessionTransaction

    from catga_tasks.envelope import Envelope

#: What `join` takes.
Joinable = Session | AsyncSession | Connection | AsyncConnection
#: What `track` takes.
Trackable = sessionmaker[Any] | scoped_session[Any] | async_sessionmaker[Any]
#: What `Catga(outbox=...)` takes.
Source = str | URL | Engine | sessionmaker[Any]

#: Seconds that a connection to PostgreSQL may take to open, unless the URL says otherwise.
CONNECT_TIMEOUT = 10
_HINT = "run `celery -A <your app> outbox migrate` on this database."


class Outbox:
    """The producer's side of the outbox: `app.outbox`."""

    def __init__(self, source: Source, *, require_transaction: bool = False) -> None:
        self._source = source
        self._require_transaction = require_transaction
        self._engine: Engine | None = None
        self._pid = os.getpid()
        self._waker: Waker | None = None
        self._targets: ContextVar[tuple[_Target, ...]] = ContextVar("catga_outbox_targets", default=())
        self._registries: list[scoped_session[Any]] = []

    @property
    def engine(self) -> Engine:
        """The engine of the outbox's database, for messages outside any transaction and for relays."""
        if self._engine is None:
            self._engine = open_engine(self._source)
            self._waker = Waker(self._engine)
        if self._pid != os.getpid():
            # A forked child must not talk on its parent's connections, nor close them.
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        return self._engine

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
        target = _target(self, transaction)
        token = self._targets.set((*self._targets.get(), target))
        try:
            yield
        finally:
            self._targets.reset(token)

    def track(self, sessions: Trackable) -> None:
        """Let every transaction of these sessions be joined without a word, from its begin to its end.

        `sessions` is the application's `sessionmaker`, `scoped_session` or `async_sessionmaker`. A session's
        transaction begins with `Session.begin()` or with the session's first use; where several are open at
        once in one thread or task, the one that began last is joined. Call it once, at start.
        """
        _listen_once()
        event.listen(_tracked_class(sessions), "after_transaction_create", self._began)
        if isinstance(sessions, scoped_session):
            self._registries.append(sessions)

    def add(self, envelopes: Sequence[Envelope], *, independent: bool = False) -> None:
        """Enqueue messages in the current transaction, or in one of their own if there is none.

        `independent` keeps them out of the current transaction: a retry must survive its rollback. Raises
        `TransactionRequired`, `MigrationRequired` or `OutboxUnavailable`; nothing was enqueued then.
        """
        target = None if independent else self._current()
        if target is not None:
            target.add(envelopes)
            return
        if self._require_transaction and not independent:
            message = (
                f"{envelopes[0].task} was enqueued outside any transaction and outbox_require_transaction is set: "
                "use `with app.outbox.join(session):`, or track your sessionmaker with app.outbox.track()."
            )
            raise TransactionRequired(message)
        try:
            with self.engine.begin() as connection:
                outbox.add(connection, envelopes)
        except DBAPIError as error:
            _refuse_missing_table(error)
            message = (
                f"The outbox's database refused the message or didn't answer ({type(error.orig).__name__}); nothing was "
                "enqueued. Check outbox_url and that the server is up."
            )
            raise OutboxUnavailable(message) from error
        self.wake()

    def wake(self) -> None:
        """Wake the relays: something was committed."""
        if self._waker is None:
            _ = self.engine
        assert self._waker is not None  # noqa: S101 - made with the engine
        self._waker.wake()

    def _current(self) -> _Target | None:
        targets = self._targets.get()
        for target in reversed(targets):
            if target.alive():
                return target
        for registry in self._registries:
            if registry.registry.has() and registry().in_transaction():
                return _SessionTarget(self, registry())
        return None

    def _began(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None:
            return
        living = tuple(target for target in self._targets.get() if target.alive())
        self._targets.set((*living, _SessionTarget(self, session, transaction)))


def open_engine(source: Source) -> Engine:
    """Return the engine of `Catga(outbox=...)`; raise `ConfigurationError` that says what is wrong with it."""
    if isinstance(source, Engine):
        return source
    if isinstance(source, sessionmaker):
        bind = source.kw.get("bind")
        if isinstance(bind, Connection):
            bind = bind.engine
        if not isinstance(bind, Engine):
            message = "outbox: the sessionmaker has no bind: give it an Engine (sessionmaker(engine)), or pass the Engine itself."
            raise ConfigurationError(message)
        return bind
    if isinstance(source, (AsyncEngine, async_sessionmaker)):
        message = (
            "outbox: pass a synchronous URL such as 'postgresql+psycopg://localhost/shop' (relays and commands use it); "
            "AsyncSession and AsyncConnection join all the same."
        )
        raise ConfigurationError(message)
    try:
        url = make_url(source)
        dialect = url.get_dialect()
        if getattr(dialect, "is_async", False):
            message = f"outbox_url: {url.drivername} is an asynchronous driver; use postgresql+psycopg:// or sqlite://."
            raise ConfigurationError(message)
        arguments = {"connect_timeout": CONNECT_TIMEOUT} if dialect.driver == "psycopg" else {}
        if "connect_timeout" in url.query:
            arguments = {}
        return create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except NoSuchModuleError as error:
        message = f"outbox_url: unknown database in the URL ({error}); use postgresql+psycopg://... or sqlite:///..."
        raise ConfigurationError(message) from None
    except ArgumentError:
        # The URL may hold a password: it is not repeated.
        message = "outbox_url is not a SQLAlchemy URL; it looks like 'postgresql+psycopg://user@host/database'."
        raise ConfigurationError(message) from None
    except ModuleNotFoundError as error:
        message = f"outbox_url: the driver {error.name!r} is not installed; `pip install catga-tasks[postgres]` brings psycopg."
        raise ConfigurationError(message) from None


class _Target:
    """A transaction that messages are enqueued in."""

    def add(self, envelopes: Sequence[Envelope]) -> None:
        raise NotImplementedError

    def alive(self) -> bool:
        raise NotImplementedError


class _SessionTarget(_Target):
    """A session: joined for a block, or tracked for one transaction."""

    def __init__(self, owner: Outbox, session: Session, transaction: SessionTransaction | None = None) -> None:
        self._owner = owner
        self._session = weakref.ref(session)
        self._transaction = transaction

    def alive(self) -> bool:
        if self._transaction is None:
            return True
        session = self._session()
        return session is not None and session.get_transaction() is self._transaction and self._transaction.is_active

    def add(self, envelopes: Sequence[Envelope]) -> None:
        session = self._session()
        if session is None:
            message = "The joined session is gone: keep it open while tasks are enqueued in it."
            raise ConfigurationError(message)
        if not session.in_transaction():
            session.begin()
        _buffer(self._owner, session).add(session, envelopes)


class _SessionBuffer:
    """What is enqueued in a session's transaction, each message with the savepoint that it belongs to."""

    def __init__(self, owner: Outbox) -> None:
        self._owner = owner
        self._entries: list[tuple[SessionTransaction, Sequence[Envelope]]] = []
        self._written: SessionTransaction | None = None

    def add(self, session: Session, envelopes: Sequence[Envelope]) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        assert transaction is not None  # noqa: S101 - begun by the caller
        self._entries.append((transaction, envelopes))
        if self._written is not None and self._written is session.get_transaction():
            # The commit is under way, and a flush or a listener of the application enqueues: write it at once.
            self.write(session)

    def write(self, session: Session) -> None:
        """Insert everything with one statement, in the session's own transaction."""
        self._written = session.get_transaction()
        if not self._entries:
            return
        envelopes = [envelope for _, several in self._entries for envelope in several]
        self._entries.clear()
        try:
            connection = session.connection(bind_arguments={"clause": tables.outbox})
        except UnboundExecutionError:
            message = "The joined session has no bind for the table catga_outbox: give it one (bind=, or binds={...})."
            raise ConfigurationError(message) from None
        try:
            outbox.add(connection, envelopes)
        except DBAPIError as error:
            _refuse_missing_table(error)
            raise

    def committed(self) -> None:
        """Wake the relays after the commit."""
        if self._written is not None:
            self._owner.wake()

    def rolled_back(self, transaction: SessionTransaction) -> None:
        """Drop what was enqueued in this savepoint, or in the whole transaction."""
        self._entries = [entry for entry in self._entries if not _within(entry[0], transaction)]

    def ended(self, transaction: SessionTransaction) -> None:
        """Hand the messages of a released savepoint to what surrounds it; forget what was never committed."""
        if transaction.parent is None:
            self._entries.clear()
            self._written = None
            return
        outer = transaction.parent
        self._entries = [(outer if tag is transaction else tag, several) for tag, several in self._entries]


def _within(transaction: SessionTransaction | None, ancestor: SessionTransaction) -> bool:
    while transaction is not None and transaction is not ancestor:
        transaction = transaction.parent
    return transaction is not None


class _ConnectionTarget(_Target):
    """A connection without a session. A stack of savepoints, the whole transaction at its bottom."""

    def __init__(self, owner: Outbox, connection: Connection) -> None:
        self._owner = owner
        self._connection = connection
        self.frames: list[tuple[str, list[Envelope]]] = [("", [])]

    def alive(self) -> bool:
        return not self._connection.closed

    def add(self, envelopes: Sequence[Envelope]) -> None:
        self.frames[-1][1].extend(envelopes)
        if not self._connection.in_transaction():
            self._connection.begin()

    def write(self, connection: Connection) -> None:
        envelopes = [envelope for _, several in self.frames for envelope in several]
        self.frames = [("", [])]
        if not envelopes:
            return
        try:
            outbox.add(connection, envelopes)
        except DBAPIError as error:
            _refuse_missing_table(error)
            raise
        # The core has no event after the commit: this wake-up may come a moment early. It makes the relay poll
        # every few milliseconds for a while, which finds the rows.
        self._owner.wake()

    def savepoint(self, name: str) -> None:
        self.frames.append((name, []))

    def released(self, name: str) -> None:
        while len(self.frames) > 1:
            inner, several = self.frames.pop()
            self.frames[-1][1].extend(several)
            if inner == name:
                return

    def rolled_back(self, name: str) -> None:
        if all(known != name for known, _ in self.frames):
            # Begun before the join: everything here was enqueued within it.
            self.frames = [("", [])]
            return
        while self.frames.pop()[0] != name:
            continue


_sessions: weakref.WeakKeyDictionary[Session, dict[Outbox, _SessionBuffer]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Connection, dict[Outbox, _ConnectionTarget]] = weakref.WeakKeyDictionary()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_listening: list[bool] = []


def _target(owner: Outbox, transaction: object) -> _Target:
    if isinstance(transaction, AsyncSession):
        transaction = transaction.sync_session
    elif isinstance(transaction, scoped_session):
        transaction = transaction()
    elif isinstance(transaction, AsyncConnection):
        transaction = transaction.sync_connection
    if isinstance(transaction, Session):
        _listen_once()
        return _SessionTarget(owner, transaction)
    if isinstance(transaction, Connection):
        _listen_to(transaction.engine)
        return _connections.setdefault(transaction, {}).setdefault(owner, _ConnectionTarget(owner, transaction))
    message = (
        "app.outbox.join() takes a Session, AsyncSession, Connection or AsyncConnection of SQLAlchemy, "
        f"not {type(transaction).__name__}."
    )
    raise ConfigurationError(message)


def _buffer(owner: Outbox, session: Session) -> _SessionBuffer:
    buffers = _sessions.setdefault(session, {})
    buffer = buffers.get(owner)
    if buffer is None:
        buffer = buffers[owner] = _SessionBuffer(owner)
    return buffer


def _tracked_class(sessions: object) -> Any:
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


def _listen_once() -> None:
    """Listen to all sessions of the process, once: cheaper than a listener for each session that is joined."""
    if _listening:
        return
    _listening.append(True)
    event.listen(Session, "before_commit", _before_commit)
    event.listen(Session, "after_commit", _after_commit)
    event.listen(Session, "after_soft_rollback", _after_soft_rollback)
    event.listen(Session, "after_transaction_end", _after_transaction_end)


def _before_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for buffer in list(_sessions.get(session, {}).values()):
            buffer.write(session)


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for buffer in _sessions.get(session, {}).values():
            buffer.committed()


def _after_soft_rollback(session: Session, previous: SessionTransaction) -> None:
    for buffer in _sessions.get(session, {}).values():
        buffer.rolled_back(previous)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    for buffer in _sessions.get(session, {}).values():
        buffer.ended(transaction)


def _listen_to(engine: Engine) -> None:
    if engine in _engines:
        return
    _engines.add(engine)

    def each(connection: Connection, action: Callable[[_ConnectionTarget], None]) -> None:
        for target in list(_connections.get(connection, {}).values()):
            action(target)

    def forget(target: _ConnectionTarget) -> None:
        target.frames = [("", [])]

    event.listen(engine, "commit", lambda c: each(c, lambda target: target.write(c)))
    event.listen(engine, "prepare_twophase", lambda c, xid: each(c, lambda target: target.write(c)))
    event.listen(engine, "rollback", lambda c: each(c, forget))
    event.listen(engine, "savepoint", lambda c, name: each(c, lambda target: target.savepoint(name)))
    event.listen(engine, "release_savepoint", lambda c, name, context: each(c, lambda target: target.released(name)))
    event.listen(
        engine, "rollback_savepoint", lambda c, name, context: each(c, lambda target: target.rolled_back(name))
    )


def _refuse_missing_table(error: SQLAlchemyError) -> None:
    original = getattr(error, "orig", None)
    if getattr(original, "sqlstate", None) == "42P01" or "no such table" in str(original):
        message = f"The outbox's tables are missing: {_HINT}"
        raise MigrationRequired(message) from None
