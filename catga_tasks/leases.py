"""How is a message kept from running twice at a time, when its effects are outside the database?

A row of the inbox names the worker that runs it, for `inbox_lease` seconds; a thread leads that on while the task runs.
A second worker that gets the message puts it back into the outbox until the lease is over, and skips what is done.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from typing import TYPE_CHECKING, Any

from celery import states
from celery.app.task import Context
from kombu.exceptions import EncodeError
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import inbox, outcome
from catga_tasks.errors import OutboxUnavailable
from catga_tasks.worker import Untold, give_back, is_too_old, key_of, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from catga_tasks.enqueue import Outbox

logger = logging.getLogger("catga_tasks.worker")

#: A message that is postponed comes again this many seconds after the lease, by the database's clock.
MARGIN_SECONDS = 0.5


class Leased:
    """One delivery of an at-least-once task with `deduplicate=True`."""

    def __init__(self, task: Any, task_id: str, request: dict[str, Any]) -> None:
        self.task = task
        self._task_id = task_id
        self._request = request
        self._key = key_of(task_id, request)
        self._fields = outcome.fields(task, task_id, request)
        self._owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._outbox: Outbox = task.app.outbox
        self._seconds: float = task.app.catga_settings.inbox_lease

    def trace(self, tracer: Callable[[], Any]) -> Any:
        """Run Celery's tracer if nobody else runs the message, or has; return its answer."""
        try:
            if not self._taken():
                return self._met()
        except (SQLAlchemyError, OutboxUnavailable, Untold) as error:
            # Nobody else would bring it again: Celery takes an error here for the task's failure.
            return give_back(self.task, self._task_id, self._request, error)
        _renewer.add(self._outbox, self._key, self._owner, self._seconds)
        try:
            answer = tracer()
        except BaseException:
            self._finish(self._free)
            raise
        finally:
            _renewer.remove(self._owner)
        self._finish(lambda: self._end(answer))
        return answer

    def _taken(self) -> bool:
        with self._outbox.begin() as connection:
            name = self.task.name
            taken = inbox.take_lease(connection, self._key, name, owner=self._owner, seconds=self._seconds)
            if taken and is_too_old(self.task, self._request):
                inbox.count(connection, name, too_old=1)
            return taken

    def _met(self) -> Any:
        """Repeat the outcome of a message that is done; postpone one that somebody runs."""
        with self._outbox.begin() as connection:
            seen = inbox.seen(connection, self._key)
            left = inbox.lease_left(connection, self._key)
            if seen is not None and seen.state != inbox.STARTED:
                inbox.count(connection, self.task.name, suppressed=1)
        if seen is None or seen.state == inbox.STARTED:
            return self._postpone(left)
        answer = outcome.repeat(self.task, self._task_id, self._request, seen)
        tell([lambda: outcome.tell(self.task, self._task_id, self._request, seen)])
        return answer

    def _postpone(self, seconds: float) -> Any:
        """Put the message back into the outbox: if its worker dies, it runs when the lease is over."""
        context = Context(self._request)
        again = self.task.signature_from_request(
            context, context.args, context.kwargs, countdown=seconds + MARGIN_SECONDS, retries=context.retries
        )
        again.apply_async()
        logger.info(
            "Task %s[%s] runs elsewhere: it is looked at again in %.1f s.",
            self.task.name,
            self._task_id,
            seconds,
            extra=self._fields,
        )
        return outcome.ignored("another worker runs this message")

    def _end(self, answer: Any) -> None:
        state = states.SUCCESS if answer.info is None else answer.info.state
        if state == states.REJECTED and answer.info.retval.requeue:
            self._free()
            return
        content, error = None, None
        if answer.info is None:
            content = self._content(answer.retval)
        else:
            error = outcome.described(answer.info.retval)
        with self._outbox.begin() as connection:
            ours = inbox.end_lease(connection, self._key, owner=self._owner, state=state, content=content, error=error)
        if not ours:
            logger.warning(
                "Task %s[%s] was silent for longer than its lease (inbox_lease, %g s): another worker may have run it "
                "too.",
                self.task.name,
                self._task_id,
                self._seconds,
                extra=self._fields,
            )

    def _content(self, value: Any) -> inbox.Content | None:
        try:
            return outcome.content(self.task, self._request, value)
        except EncodeError:
            # Celery has said so: the task has failed.
            return None

    def _free(self) -> None:
        with self._outbox.begin() as connection:
            inbox.free(connection, self._key, owner=self._owner)

    def _finish(self, work: Callable[[], None]) -> None:
        try:
            work()
        except SQLAlchemyError as error:
            logger.warning(
                "Task %s[%s] is over, and the inbox doesn't know (%s): a duplicate would run again.",
                self.task.name,
                self._task_id,
                type(error).__name__,
                extra=self._fields,
            )


class _Renewer:
    """The thread of this process that leads leases on."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: a forked child runs none of its parent's tasks, and has none of its threads."""
        self._lock = threading.Condition()
        self._held: dict[str, tuple[Outbox, inbox.Key, float]] = {}
        self._thread: threading.Thread | None = None

    def add(self, outbox: Outbox, key: inbox.Key, owner: str, seconds: float) -> None:
        """Lead this lease on until `remove`."""
        with self._lock:
            self._held[owner] = (outbox, key, seconds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="catga-leases", daemon=True)
                self._thread.start()
            self._lock.notify()

    def remove(self, owner: str) -> None:
        """Let go of a lease."""
        with self._lock:
            self._held.pop(owner, None)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._held:
                    self._lock.wait()
                held = list(self._held.items())
            for owner, (outbox, key, seconds) in held:
                self._renew(outbox, key, owner, seconds)
            with self._lock:
                self._lock.wait(min(seconds for _, (_, _, seconds) in held) / 3)

    def _renew(self, outbox: Outbox, key: inbox.Key, owner: str, seconds: float) -> None:
        try:
            with outbox.begin() as connection:
                inbox.renew_lease(connection, key, owner=owner, seconds=seconds)
        except SQLAlchemyError as error:
            logger.warning("The lease of task %s can't be led on: %s", key.task_id, type(error).__name__)


_renewer = _Renewer()
os.register_at_fork(after_in_child=_renewer.forget)
