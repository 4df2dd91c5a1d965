"""How are messages relayed and run in a test, until none is left?"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from celery import states

from catga_tasks import tables
from catga_tasks.inprocess import Delivery, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection, Engine

    from catga_tasks.app import Catga
    from catga_tasks.inprocess import Broker


class Draining:
    """One call of `drain`."""

    raise_errors = True
    duplicates = False

    def __init__(self, app: Catga, broker: Broker, limit: int, deadline: float) -> None:
        self._app = app
        self._broker = broker
        self._limit = limit
        self._deadline = deadline
        self._done: list[Delivery] = []

    def run(self, *, with_scheduled: bool) -> list[Delivery]:
        """Do it; raise what a task raised, or an `AssertionError`."""
        dead = self._dead()
        with Worker.running(self._app, self._broker) as worker:
            while True:
                self._app.relay().run_once()
                if self._taken(worker):
                    continue
                if not with_scheduled or not (self._come_due() or self._note(worker.take_held())):
                    break
        self._refuse_failed(dead)
        return self._done

    def _taken(self, worker: Worker) -> bool:
        """Run what the broker has; return whether it had something."""
        any_at_all = False
        while self._note(worker.take(duplicate=self.duplicates)):
            any_at_all = True
        return any_at_all

    def _note(self, deliveries: Sequence[Delivery]) -> bool:
        self._done += deliveries
        for delivery in deliveries:
            if self.raise_errors and delivery.state == states.FAILURE and delivery.error is not None:
                delivery.error.add_note(f"Raised by {_described(delivery)}, which outbox.drain() ran.")
                raise delivery.error
        self._refuse_endless()
        return bool(deliveries)

    def _come_due(self) -> bool:
        """Let the next moment come for which messages wait in the outbox; return whether there was one."""
        with self._app.outbox.engine.begin() as connection:
            now = tables.now(connection)
            statement = sa.text(
                f"UPDATE catga_outbox SET available_at = {now} WHERE scheduled AND attempts = 0 AND available_at = "
                "(SELECT min(available_at) FROM catga_outbox WHERE scheduled AND attempts = 0 AND not_before IS NULL)"
            )
            return connection.execute(statement).rowcount > 0

    def _refuse_endless(self) -> None:
        late = time.monotonic() > self._deadline
        if len(self._done) < self._limit and not late:
            return
        why = "The time is up" if late else "max_messages is reached"
        last = "\n".join(f"  {_described(delivery)}: {_outcome(delivery)}" for delivery in self._done[-5:])
        raise AssertionError(
            f"outbox.drain() comes to no end. {why} after {len(self._done)} deliveries; does a task enqueue itself, or "
            f"does its message go back for ever? The last ones:\n{last}"
        )

    def _dead(self) -> set[tuple[str, str, str]]:
        with connected(self._app.outbox.engine) as connection:
            return {
                (task, task_id, error)
                for task, task_id, error in connection.execute(
                    sa.text("SELECT task, task_id, error FROM catga_dead_letters")
                )
            }

    def _refuse_failed(self, dead: set[tuple[str, str, str]]) -> None:
        """Fail if the relay couldn't publish something; `dead` were dead letters before."""
        with connected(self._app.outbox.engine) as connection:
            due = f"attempts > 0 OR available_at <= {tables.now(connection)}"
            kept = connection.execute(sa.text(f"SELECT task, task_id, history FROM catga_outbox WHERE {due}")).all()
        # A worker buries messages too, and those are among the deliveries.
        delivered = {delivery.id for delivery in self._done}
        buried = sorted(each for each in self._dead() - dead if each[1] not in delivered)
        lines = [f"  {task}[{task_id}]: {why or 'nobody took it'}" for task, task_id, why in (*kept, *buried)]
        if lines:
            raise AssertionError("\n".join(["The relay couldn't publish:", *lines]))


def _described(delivery: Delivery) -> str:
    return f"task {called(delivery.task, delivery.args, delivery.kwargs)} [{delivery.id}]"


def _outcome(delivery: Delivery) -> str:
    return delivery.state if delivery.error is None else f"{delivery.state}, {delivery.error!r}"


def called(task: str | None, args: Any, kwargs: Any) -> str:
    """Write the call."""
    words = [*map(repr, args or ()), *(f"{name}={value!r}" for name, value in (kwargs or {}).items())]
    return f"{task or 'A task'}({', '.join(words)})"


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Connect; refuse if that were the connection that a transaction of the test is open on, and would roll it back."""
    with engine.connect() as connection:
        if getattr(connection.connection.driver_connection, "in_transaction", False):
            message = (
                "The database is SQLite in memory, on one connection, and a transaction is open on it: commit it "
                "before you look, pass within=, or use a file."
            )
            raise AssertionError(message)
        yield connection
