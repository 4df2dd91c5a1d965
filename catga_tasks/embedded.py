"""What does `celery worker` do more than Celery's? It checks our settings, and may run a relay: `--outbox-relay`."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import click
from celery import bootsteps
from celery.apps.worker import Worker as CeleryWorker
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import migrate
from catga_tasks.database import in_one_line
from catga_tasks.errors import CatgaError
from catga_tasks.requests import tasks_with_database

logger = logging.getLogger("catga_tasks")

if TYPE_CHECKING:
    from catga_tasks.relay import Relay


class Worker(CeleryWorker):
    """The worker as a program: a wrong setting ends it with one line, before it takes a message."""

    def __init__(self, **options: Any) -> None:
        try:
            _ = self.app.catga_settings
            super().__init__(**options)
            self._check_tables()
            self._check_broker()
        except (CatgaError, SQLAlchemyError) as error:
            raise click.ClickException(in_one_line(error)) from None

    def _check_tables(self) -> None:
        """Raise `MigrationRequired`, or what is wrong with the database, if a task or the results need it."""
        if tasks_with_database(self.app) or getattr(self.app.backend, "commits_with_task", False):
            engine = self.app.outbox.engine
            with engine.connect() as connection:
                migrate.check(connection)
            # The pool's children are forked next: they inherit no connection.
            engine.dispose()

    def _check_broker(self) -> None:
        """Raise what Celery would end with, but without its traceback: a wrong password, a queue that isn't ours."""
        try:
            with self.app.connection_for_read() as connection:
                for queue in self.app.amqp.queues.consume_from.values():
                    queue(connection.default_channel).declare()
        except CatgaError as error:
            if not isinstance(error, connection.connection_errors):
                raise
        except Exception:  # noqa: BLE001 - Celery says it and tries again
            logger.debug("The broker didn't answer yet.")


class RelayStep(bootsteps.StartStopStep):
    """Runs a relay in a thread of the worker's main process, from its start to its shutdown.

    After the pool, so that the pool's first children are forked before there is a thread.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, *, outbox_relay: bool = False, **_options: Any) -> None:
        self.enabled = bool(outbox_relay)
        self._relay: Relay | None = None
        self._thread: threading.Thread | None = None
        self._paused: Relay | None = None
        if self.enabled:
            engine = worker.app.outbox.engine
            with engine.connect() as connection:
                migrate.check(connection)
            # The pool's children are forked next: they inherit no connection.
            engine.dispose()

    def start(self, worker: Any) -> None:
        """Start the thread."""
        self._relay = worker.app.relay()
        self._thread = threading.Thread(target=self._relay.run, name="catga-outbox-relay", daemon=True)
        engine = worker.app.outbox.engine
        if engine.dialect.name == "sqlite":
            # The pool forks again when it replaces a child.
            os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork)
        # A connection that this thread gave back to the pool isn't the child's.
        os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))
        self._thread.start()

    def stop(self, worker: Any) -> None:
        """Let the batch in hand end, bounded by the time that a publish may take."""
        if self._relay is not None and self._thread is not None:
            self._relay.stop()
            self._thread.join(worker.app.catga_settings.outbox_publish_timeout)

    terminate = stop

    def _before_fork(self) -> None:
        if self._relay is not None and self._thread is not None and self._thread.is_alive():
            self._paused = self._relay
            self._paused.pause()

    def _after_fork(self) -> None:
        if self._paused is not None:
            self._paused.resume()
            self._paused = None
