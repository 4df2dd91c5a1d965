"""How does a web page ask the outbox's database without keeping Flower's loop waiting?

In threads of its own, few of them, and for a bounded time: a database that is down costs the other pages nothing.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import migrate
from catga_tasks.app import Catga
from catga_tasks.database import in_one_line, refuse_missing_table
from catga_tasks.errors import CatgaError, ConfigurationError, OutboxUnavailable
from catga_tasks.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery
    from sqlalchemy import Connection

T = TypeVar("T")

#: A page waits no longer than this for the database, in seconds; a change may take longer, for it may be large.
READ_SECONDS, CHANGE_SECONDS = 3.0, 60.0
#: A page doesn't wait longer than this for rows to be counted: it shows the counts when there are some.
COUNT_SECONDS = 0.1
_THREADS = 4


class Desk:
    """The outbox of one application, for one Flower."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self.watch = Watch()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="catga-web")
        self._checked = threading.Event()
        self._counting: asyncio.Future[None] | None = None

    @property
    def app(self) -> Catga:
        """The application; raises `ConfigurationError` if it isn't ours."""
        if not isinstance(self._app, Catga):
            message = "This application has no outbox: put Catga(...) where Celery(...) is."
            raise ConfigurationError(message)
        return self._app

    async def change(self, change: Callable[[Connection], T], *, seconds: float = READ_SECONDS) -> T:
        """Return what a change returned, of a transaction that is committed; raise `CatgaError`."""
        try:
            return await self.ask(change, seconds=seconds)
        except OutboxUnavailable as error:
            message = f"{error} Whether it was done, the record of changes says."
            raise OutboxUnavailable(message) from None
        finally:
            self.watch.changed()

    async def ask(self, question: Callable[[Connection], T], *, seconds: float = READ_SECONDS) -> T:
        """Return the answer, of a transaction that is committed; raise `CatgaError` that says what is wrong."""
        answer = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, question, seconds)
        try:
            return await asyncio.wait_for(answer, seconds + 0.5)
        except TimeoutError:
            message = f"The database hasn't answered for {seconds:g} s."
            raise OutboxUnavailable(message) from None

    async def count(self) -> None:
        """Count the messages, or begin to, if it is time again."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.ensure_future(self.ask(self.watch.count, seconds=CHANGE_SECONDS))
            # Whoever asks next meets the error itself.
            self._counting.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([self._counting], timeout=COUNT_SECONDS)

    async def sample(self) -> None:
        """Take down the counters for the rates; a database that is down leaves a gap."""
        try:
            await self.ask(self.watch.sample)
        except CatgaError:
            return

    async def wake(self) -> None:
        """Wake the relays: something was committed for them."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.app.outbox.wake)

    def _ask(self, question: Callable[[Connection], T], seconds: float) -> T:
        try:
            with self.app.outbox.engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(text(f"SET LOCAL statement_timeout = {int(seconds * 1000)}"))
                if not self._checked.is_set():
                    migrate.check(connection)
                    self._checked.set()
                return question(connection)
        except SQLAlchemyError as error:
            refuse_missing_table(error)
            raise OutboxUnavailable(in_one_line(error)) from None
