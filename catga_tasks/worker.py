"""One delivery of an effectively-once task: open the transaction, ask the inbox, run the task, commit.

What the task writes, what it enqueues, its result and the inbox's row commit together; then the worker acknowledges.
If the task raises, all of that is rolled back, and a second transaction keeps what became of it: the inbox's row with
the error, the retry, the errbacks.
"""

from __future__ import annotations

import logging
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from celery import states
from celery.exceptions import BackendStoreError, Ignore, Reject, TimeLimitExceeded
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session

from catga_tasks import current, holding, inbox, outcome, retry
from catga_tasks.database import in_one_line, is_aborted, is_passing
from catga_tasks.envelope import DUE_AT
from catga_tasks.errors import ConfigurationError, MigrationRequired
from catga_tasks.links import fix_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from catga_tasks.envelope import Envelope

logger = logging.getLogger("catga_tasks.worker")

#: A header of messages whose verdict is known: the worker's main process has killed the task for its time limit.
VERDICT = "catga_verdict"
#: Pauses before a message goes back because of the database, in seconds: from the first to the cap.
OUTAGE_SECONDS = (0.2, 10.0)
#: Deliveries in a row that went back because of the database, in this process.
_outages = [0]


class Once:
    """One delivery of an effectively-once task; `current.Delivery` says what others may ask of it."""

    def __init__(self, task: Any, task_id: str, request: dict[str, Any]) -> None:
        self.task = task
        self.running = False
        self.ended = False
        self.session: Session = task.app.outbox.session()
        self._task_id = task_id
        self._request = request
        self._key = key_of(task_id, request)
        self._transaction: Any = None
        self._kept: list[Envelope] = []
        self._after: list[Callable[[], object]] = []
        self._replaced = False
        self._committing = False
        self._doom: Exception | None = None

    def trace(self, tracer: Callable[[], Any]) -> Any:
        """Run Celery's tracer around the task in a transaction; return its answer."""
        try:
            with self._current():
                answer, committed = self._steps(tracer)
            if committed:
                tell(self._after)
        except (SQLAlchemyError, BackendStoreError, MigrationRequired, Untold) as error:
            # What is committed comes again as a duplicate, which tells it once more.
            return give_back(self.task, self._task_id, self._request, error)
        finally:
            _close(self.session)
        return answer

    def run(self, call: Callable[[], Any]) -> Any:
        """Run the task's own code; what it raises rolls back what it did."""
        self.running = True
        try:
            value = self._called(call)
            self._check(value)
        except BaseException as error:
            self.ended = True
            if self._replaced and isinstance(error, Ignore):
                # The task is over, and another one takes its place: what it did stays.
                inbox.replaced(self.session.connection(), self._key)
                self._end()
                raise
            self._undo(error)
            raise
        self.ended = True
        return value

    def keep(self, envelopes: Sequence[Envelope]) -> None:
        """Enqueue messages however the task ends; see `current.Delivery`."""
        self._kept += envelopes

    def doom(self, error: Exception) -> None:
        """Give the message back; see `current.Delivery`."""
        self._doom = self._doom or error

    def after_commit(self, work: Callable[[], object]) -> None:
        """Call the function once the transaction has committed; see `current.Delivery`."""
        self._after.append(work)

    def refuse_commit(self) -> NoReturn:
        """Raise: the task commits by itself what commits with its end."""
        message = (
            f"Task {self.task.name} commits current_session(), which commits by itself when the task returns, together "
            "with its result and its entry in the inbox: leave session.commit() out."
        )
        raise ConfigurationError(message)

    def replace(self) -> None:
        """Note that another task takes this one's place: its `Ignore` is no failure."""
        self._replaced = True

    @contextmanager
    def _current(self) -> Iterator[None]:
        _listen(self.task.app.outbox.engine)
        token = current.delivery.set(self)
        try:
            with self.task.app.outbox.join(self.session):
                yield
        finally:
            current.delivery.reset(token)

    def _steps(self, tracer: Callable[[], Any]) -> tuple[Any, bool]:
        fix_ids(self._task_id, self._request)
        seen = self._enter(states.SUCCESS)
        if seen is not None:
            self.ended = True
            inbox.count(self.session.connection(), self.task.name, suppressed=1)
            answer = outcome.repeat(self.task, self._task_id, self._request, seen)
            self._after.append(lambda: outcome.tell(self.task, self._task_id, self._request, seen))
        else:
            if is_too_old(self.task, self._request):
                inbox.count(self.session.connection(), self.task.name, too_old=1)
            answer = self._traced(tracer)
        if not self.session.in_transaction():
            return answer, False
        if seen is None:
            self._let_go(answer)
        try:
            self._commit()
        except SQLAlchemyError as error:
            if is_passing(error) or self._is_cut():
                raise
            answer = self._refused(error)
        _outages[0] = 0
        return answer, True

    def _traced(self, tracer: Callable[[], Any]) -> Any:
        """Run Celery's tracer; raise the error of a result that can't be stored."""
        try:
            answer = tracer()
        except Reject:
            if self._doom is None:
                raise
        if self._doom is not None:
            raise self._doom
        return answer

    def _enter(self, state: str, error: str | None = None) -> inbox.Seen | None:
        if not self.session.in_transaction():
            self.session.begin()
        seen = inbox.enter(self.session.connection(), self._key, self.task.name, state=state, error=error)
        self._transaction = self.session.get_transaction()
        return seen

    def _called(self, call: Callable[[], Any]) -> Any:
        verdict = (self._request.get("headers") or self._request).get(VERDICT)
        if verdict is not None:
            raise TimeLimitExceeded(verdict)
        return call()

    def _check(self, value: Any) -> None:
        """Refuse what can't be committed, before it is; write what is to be."""
        if self.session.get_transaction() is not self._transaction:
            message = (
                f"Task {self.task.name} ended current_session()'s transaction, which is the task's own, and went on: "
                "use session.begin_nested() around what may fail, or let the error out."
            )
            raise ConfigurationError(message)
        self.session.flush()
        self._refuse_aborted()
        kept = outcome.content(self.task, self._request, value)
        if kept is not None:
            inbox.keep(self.session.connection(), self._key, kept)
        self._end()

    def _end(self) -> None:
        if self._kept:
            envelopes, self._kept = self._kept, []
            self.task.app.outbox.add(envelopes)

    def _undo(self, error: BaseException) -> None:
        """Roll back, and begin the transaction that keeps what became of the task."""
        passing = isinstance(error, SQLAlchemyError) and (is_passing(error) or self._is_cut()) and not self._alive()
        self._roll_back()
        # What the task has sent is rolled back with it.
        self.task.request.children.clear()
        if passing:
            # No fault of the task: its database went away, or chose it as a deadlock's victim.
            self._give_back(error)
        if not isinstance(error, Exception) or (isinstance(error, Reject) and error.requeue):
            return
        try:
            seen = self._enter(outcome.state_of(error), outcome.described(error))
            if seen is None:
                self._keep_failure(error)
                return
        except SQLAlchemyError as problem:
            self._roll_back()
            self._give_back(problem)
        self._roll_back()
        message = f"a duplicate has ended as {seen.state if seen else 'nothing'} meanwhile"
        raise Ignore(message) from error

    def _keep_failure(self, error: Exception) -> None:
        self._end()
        if outcome.state_of(error) == states.FAILURE:
            kept = outcome.failure_content(self.task, self._request, error)
            if kept is not None:
                inbox.keep(self.session.connection(), self._key, kept)

    def _alive(self) -> bool:
        """Return whether the transaction is still good: then the error is another database's."""
        try:
            self.session.connection().exec_driver_sql("SELECT 1")
        except SQLAlchemyError:
            return False
        return True

    def _is_cut(self) -> bool:
        """Return whether the connection broke before, and somebody caught that error."""
        try:
            return self.session.connection().invalidated
        except SQLAlchemyError:
            return False

    def _roll_back(self) -> None:
        self._after.clear()
        try:
            self.session.rollback()
        except SQLAlchemyError:
            # The connection is gone, and the transaction with it.
            self.session.invalidate()

    def _refuse_aborted(self) -> None:
        """Refuse a transaction that would be rolled back, though it is committed and nothing says so."""
        if is_aborted(self.session.connection()):
            message = (
                f"A statement failed in the transaction of task {self.task.name}, and its error was caught: nothing of "
                "it can be committed. Use session.begin_nested() around what may fail, or let the error out."
            )
            raise PendingRollbackError(message)

    def _commit(self) -> None:
        self._refuse_aborted()
        self._committing = True
        try:
            self.session.commit()
        finally:
            self._committing = False

    def _refused(self, error: SQLAlchemyError) -> Any:
        """Fail the task after all: the database refuses the commit, as by a deferred constraint."""
        self._kept.clear()
        self._roll_back()
        seen = self._enter(states.FAILURE, outcome.described(error))
        if seen is not None:
            return outcome.repeat(self.task, self._task_id, self._request, seen)
        answer = outcome.failed(self.task, self._request, error)
        self._let_go(answer)
        self._commit()
        return answer

    def _let_go(self, answer: Any) -> None:
        """Free the message's keys in the transaction that ends the task, unless it goes on."""
        held = holding.current()
        if held is None or held.goes_on(answer):
            return
        if held.end(self.session.connection()):
            self._after.append(self.task.app.outbox.wake)

    def _give_back(self, error: BaseException) -> None:
        _wait(self.task, self._task_id, self._request, error)
        raise Reject(f"the database is out: {type(error).__name__}", requeue=True) from error


class Here(Once):
    """A task that the caller runs in its own process (`apply`, `task_always_eager`): a transaction, and no inbox."""

    def __init__(self, task: Any) -> None:
        super().__init__(task, "", {"ignore_result": True})

    def trace(self, tracer: Callable[[], Any]) -> Any:
        """Run Celery's `apply` in a transaction; raise the database's errors."""
        try:
            with self._current():
                self._enter(states.SUCCESS)
                answer = self._traced(tracer)
                if self.session.in_transaction():
                    self._commit()
            tell(self._after)
        finally:
            _close(self.session)
        return answer

    def _give_back(self, error: BaseException) -> None:
        raise error

    def _enter(self, state: str, error: str | None = None) -> None:  # noqa: ARG002 - as it is for messages
        if not self.session.in_transaction():
            self.session.begin()
        self._transaction = self.session.get_transaction()


class Untold(Exception):
    """The task is over, and the result backend doesn't know."""


def tell(works: Sequence[Callable[[], object]]) -> None:
    """Tell the result backend what has become certain; raise `Untold` if it can't be told."""
    try:
        for work in works:
            work()
    except Exception as error:
        raise Untold(f"the result backend failed: {type(error).__name__}") from error


def is_too_old(task: Any, request: Mapping[str, Any]) -> bool:
    """Return whether the inbox may have forgotten this message: it was due before what the inbox still remembers.

    It runs, for it may well be its first delivery. By the clocks of sender and worker: only a count depends on it.
    """
    due, retention = request.get(DUE_AT), task.app.catga_settings.inbox_retention
    return retention is not None and isinstance(due, (int, float)) and time.time() - due > retention


def key_of(task_id: str, request: dict[str, Any]) -> inbox.Key:
    """Return what names this delivery and its duplicates."""
    return inbox.Key(task_id, request.get("retries") or 0, request.get("replaced_task_nesting") or 0)


def give_back(task: Any, task_id: str, request: Mapping[str, Any], error: Exception) -> Any:
    """Return the answer that gives the message back to the broker, after a pause."""
    _wait(task, task_id, request, error)
    return outcome.given_back(in_one_line(error))


def _wait(task: Any, task_id: str, request: Mapping[str, Any], error: BaseException) -> None:
    """Say why a message goes back, and wait a little, longer each time: it comes again at once."""
    _outages[0] += 1
    reason = in_one_line(error) if isinstance(error, Exception) else type(error).__name__
    said_of = outcome.fields(task, task_id, request)
    logger.warning("Task %s[%s] goes back to the broker: %s", task.name, task_id, reason, extra=said_of)
    first, longest = OUTAGE_SECONDS
    time.sleep(retry.delay(_outages[0], base=first, maximum=longest))


def _close(session: Session) -> None:
    try:
        # A commit that SQLite refuses, because somebody reads, leaves the transaction open, and so does `close`.
        session.rollback()
        session.close()
    except SQLAlchemyError:
        session.invalidate()


_listening: list[bool] = []
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _listen(engine: Engine) -> None:
    """Listen to all sessions of the process, once: a listener for each delivery's own costs more."""
    if not _listening:
        _listening.append(True)
        event.listen(Session, "before_commit", _refuse_commit)
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "commit", _refuse_commit_past_session)


def _refuse_commit(session: Session) -> None:
    delivery = current.delivery.get()
    if not isinstance(delivery, Once) or delivery.session is not session:
        return
    if delivery._committing or session.in_nested_transaction():
        return
    delivery.refuse_commit()


def _refuse_commit_past_session(connection: Connection) -> None:
    delivery = current.delivery.get()
    if not isinstance(delivery, Once) or delivery._committing:
        return
    transaction = delivery.session.get_transaction()
    if transaction is not None and transaction.is_active and delivery.session.connection() is connection:
        delivery.refuse_commit()
