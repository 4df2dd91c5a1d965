"""How does somebody test an application whose tasks go through the outbox? A plugin for pytest.

    # conftest.py
    pytest_plugins = ["catga_tasks.testing"]

    @pytest.fixture
    def catga_app():
        return shop.app

    # test_orders.py
    def test_an_order_is_charged(outbox):
        place_order(7)
        outbox.assert_enqueued(charge, args=(7,))
        outbox.drain()
        assert paid(7)

The database is real: the application's own outbox, whose rows the fixture deletes before and after each test. The
broker is in memory, and the worker in the test's own process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, scoped_session

from catga_tasks import joining, liveness, migrate, tables
from catga_tasks.app import Catga
from catga_tasks.draining import Draining, called, connected
from catga_tasks.errors import ConfigurationError
from catga_tasks.inprocess import Broker, Delivery, contents, in_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection, Engine

    from catga_tasks.enqueue import Joinable
    from catga_tasks.envelope import Envelope

__all__ = ["Delivery", "Enqueued", "OutboxFixture", "catga_app", "outbox", "outbox_of"]


@pytest.fixture
def catga_app() -> Catga:
    """Return the application under test: define a fixture of this name that does."""
    message = "The fixture `outbox` needs your application: define a fixture `catga_app` that returns your Catga(...)."
    raise ConfigurationError(message)


@pytest.fixture
def outbox(catga_app: Catga) -> Iterator[OutboxFixture]:
    """Yield the application's outbox, empty, with a broker in memory."""
    with outbox_of(catga_app) as found:
        yield found


@contextmanager
def outbox_of(app: Catga) -> Iterator[OutboxFixture]:
    """Do what the fixture `outbox` does, for this application: for fixtures of another scope, and for unittest.

    Makes the tables if they are missing. Raises `ConfigurationError` if the database doesn't look like a test's.
    """
    _refuse_others(app)
    engine = app.outbox.engine
    _refuse_strangers_database(engine)
    migrate.upgrade(engine)
    _refuse_living_relays(engine)
    _empty(engine)
    with in_memory(app) as broker:
        try:
            yield OutboxFixture(app, broker)
        finally:
            _empty(engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enqueued:
    """One message that waits for its task to run."""

    #: The task's name.
    task: str
    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    queue: str
    #: When it is due, by the database's clock, if it was sent with `eta` or `countdown`.
    eta: datetime | None
    priority: int | None
    headers: dict[str, Any]

    def __str__(self) -> str:
        """Write it as a call."""
        due = f", due {self.eta:%Y-%m-%d %H:%M:%S}Z" if self.eta else ""
        return f"{called(self.task, self.args, self.kwargs)} in queue {self.queue!r}{due}"


class OutboxFixture:
    """The application's outbox in a test."""

    def __init__(self, app: Catga, broker: Broker) -> None:
        self.app = app
        self._broker = broker
        self._accept = prepare_accept_content(app.conf.accept_content)

    def enqueued(
        self, task: Any = None, *, args: Any = None, kwargs: Any = None, queue: str | None = None,
        within: Joinable | None = None,
    ) -> list[Enqueued]:  # fmt: skip
        """Return the messages that are committed and haven't run, in the order of their commit.

        `task` is a task or a task's name; `args`, `kwargs` and `queue` keep only what is equal to them. Tuples equal
        lists, which is what a serializer makes of them. `within` is an open transaction, as `app.outbox.join` takes it:
        what it has enqueued so far is seen too.
        """
        found = self._all(within)
        return [message for message in found if _matches(message, _name(task), args, kwargs, queue)]

    def assert_enqueued(
        self, task: Any, *, args: Any = None, kwargs: Any = None, queue: str | None = None, count: int | None = None,
        within: Joinable | None = None,
    ) -> list[Enqueued]:  # fmt: skip
        """Fail unless such a message is enqueued, with `count` exactly so many; return them. See `enqueued`."""
        __tracebackhide__ = True
        found = self.enqueued(task, args=args, kwargs=kwargs, queue=queue, within=within)
        if len(found) == count or (found and count is None):
            return found
        wanted = _wanted(_name(task), args, kwargs, queue)
        problem = "is not enqueued" if count is None else f"is enqueued {len(found)} times, not {count}"
        raise AssertionError("\n".join([f"{wanted} {problem}.", *self._near(_name(task), within)]))

    def assert_not_enqueued(
        self, task: Any = None, *, args: Any = None, kwargs: Any = None, queue: str | None = None,
        within: Joinable | None = None,
    ) -> None:  # fmt: skip
        """Fail if such a message, or any at all, is enqueued. See `enqueued`."""
        __tracebackhide__ = True
        found = self.enqueued(task, args=args, kwargs=kwargs, queue=queue, within=within)
        if found:
            wanted = _wanted(_name(task), args, kwargs, queue)
            raise AssertionError("\n".join([f"{wanted} is enqueued:", *(f"  {message}" for message in found)]))

    def drain(
        self, *, with_scheduled: bool = False, duplicates: bool = False, raise_errors: bool = True,
        max_messages: int = 1000, timeout: float = 60.0,
    ) -> list[Delivery]:  # fmt: skip
        """Relay what is due and run its tasks, and what they enqueue, until nothing is left; return what ran.

        A task that fails raises its exception here, unless `raise_errors` is false. `with_scheduled` runs what has an
        ETA or a countdown too, retries among it, the next one first. `duplicates` delivers every message twice, as to a
        worker that lost the first one after its commit: the effects must be those of one. More than `max_messages`
        deliveries, or `timeout` seconds, raise an `AssertionError`.
        """
        draining = Draining(self.app, self._broker, max_messages, time.monotonic() + timeout)
        draining.raise_errors, draining.duplicates = raise_errors, duplicates
        # A worker knows nothing of the transactions that the test has open.
        return Context().run(draining.run, with_scheduled=with_scheduled)

    def _all(self, within: Joinable | None) -> list[Enqueued]:
        joined = _synchronous(within)
        if within is None or isinstance(within, (AsyncSession, AsyncConnection)):
            with connected(self.app.outbox.engine) as connection:
                rows = _rows(connection)
        elif isinstance(joined, Session):
            rows = _rows(joined.connection(bind_arguments={"clause": tables.outbox}))
        else:
            rows = _rows(joined)
        stored = [self._from_row(row) for row in rows]
        pending = [] if joined is None else joining.pending(self.app.outbox, joined)
        return [*stored, *self._sent(), *map(self._from_envelope, pending)]

    def _sent(self) -> list[Enqueued]:
        """Return what is with the broker: tasks that are delivered at most once don't wait in the outbox."""
        found = []
        for queue, message in self._broker.waiting():
            eta = message.headers.get("eta")
            found.append(
                self._enqueued(
                    message,
                    queue=queue,
                    eta=datetime.fromisoformat(eta) if eta else None,
                    priority=message.properties.get("priority") or None,
                )
            )
        return found

    def _from_row(self, row: Any) -> Enqueued:
        return self._enqueued(
            _message(row), queue=row.queue, eta=row.available_at if row.scheduled else None, priority=row.priority
        )

    def _from_envelope(self, envelope: Envelope) -> Enqueued:
        eta = datetime.now(UTC) + timedelta(seconds=envelope.delay) if envelope.delay else envelope.eta
        return self._enqueued(_message(envelope), queue=envelope.queue, eta=eta, priority=envelope.priority)

    def _enqueued(self, message: Any, *, queue: str, eta: datetime | None, priority: int | None) -> Enqueued:
        task, task_id, args, kwargs = contents(message, self._accept)
        return Enqueued(task=task, id=task_id, args=args, kwargs=kwargs, queue=queue, eta=eta, priority=priority,
                        headers=dict(message.headers))  # fmt: skip

    def _near(self, task: str | None, within: Joinable | None) -> list[str]:
        """Say what is enqueued instead: of this task, of others, and in transactions that are still open."""
        found = self._all(within)
        seen = {message.id for message in found}
        open_ones = [each for each in map(self._from_envelope, joining.pending(self.app.outbox)) if each.id not in seen]
        parts = {
            f"Enqueued for {task}:": [message for message in found if message.task == task],
            "Enqueued for other tasks:": [message for message in found if message.task != task],
            "Not committed yet (commit first, or pass within=):": open_ones,
        }
        lines = [line for title, several in parts.items() if several for line in (title, *(f"  {m}" for m in several))]
        return lines or ["Nothing is enqueued."]


def _wanted(task: str | None, args: Any, kwargs: Any, queue: str | None) -> str:
    call = task or "A message"
    if args is not None or kwargs is not None:
        call = called(task, args, kwargs)
    return call if queue is None else f"{call} in queue {queue!r}"


def _name(task: Any) -> str | None:
    return task if task is None or isinstance(task, str) else str(task.name)


def _matches(message: Enqueued, task: str | None, args: Any, kwargs: Any, queue: str | None) -> bool:
    return (
        task in (None, message.task)
        and (args is None or _same(args, message.args))
        and (kwargs is None or _same(kwargs, message.kwargs))
        and queue in (None, message.queue)
    )


def _same(expected: Any, actual: Any) -> bool:
    """Compare as the task would: a tuple arrives as a list, at any depth; what compares itself (`mock.ANY`) may."""
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        return len(expected) == len(actual) and all(map(_same, expected, actual))
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        return expected.keys() == actual.keys() and all(_same(expected[key], actual[key]) for key in expected)
    return bool(expected == actual)


def _message(stored: Any) -> Message:
    """Return a row, or an envelope, as kombu's message."""
    return Message(
        body=stored.body,
        content_type=stored.content_type,
        content_encoding=stored.content_encoding,
        headers=loads(stored.headers),
        properties=loads(stored.properties),
    )


def _rows(connection: Connection) -> Sequence[Any]:
    return connection.execute(sa.select(tables.outbox).order_by(tables.outbox.c.id)).all()


def _synchronous(transaction: Any) -> Any:
    if isinstance(transaction, AsyncSession):
        return transaction.sync_session
    if isinstance(transaction, AsyncConnection):
        return transaction.sync_connection
    return transaction() if isinstance(transaction, scoped_session) else transaction


def _refuse_others(app: object) -> None:
    if not isinstance(app, Catga):
        message = f"The fixture catga_app must return your Catga(...), not {type(app).__name__}."
        raise ConfigurationError(message)


def _refuse_strangers_database(engine: Engine) -> None:
    """Refuse a database whose name doesn't say that it is a test's, and whose tables of ours hold something."""
    database = engine.url.database or ""
    in_memory = engine.dialect.name == "sqlite" and database in ("", ":memory:")
    if in_memory or "test" in database.lower() or database.startswith(gettempdir()):
        return
    names = set(sa.inspect(engine).get_table_names())
    with engine.connect() as connection:
        for table in ("catga_outbox", "catga_dead_letters", "catga_inbox"):
            if table in names and connection.execute(sa.text(f"SELECT 1 FROM {table} LIMIT 1")).first() is not None:
                message = (
                    f"The fixture `outbox` deletes what is in {table}, and the database {database!r} doesn't look like "
                    "a test's: use one with 'test' in its name, or empty the table by hand."
                )
                raise ConfigurationError(message)


def _refuse_living_relays(engine: Engine) -> None:
    with engine.connect() as connection:
        alive = liveness.alive(connection)
    if alive:
        message = (
            f"The relay {alive[0]['id']} is at work on this database, and would take the tests' messages: stop it, or "
            "use a database of the tests' own (each worker of pytest-xdist its own)."
        )
        raise ConfigurationError(message)


def _empty(engine: Engine) -> None:
    """Delete the rows of our own tables."""
    with engine.begin() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(table.delete())
