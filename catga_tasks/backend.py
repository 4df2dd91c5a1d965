"""How do results commit with the task? `outbox://`, Celery's database backend in the outbox's own database.

Features
========
* The result of an effectively-once task, and its part of a chord, commit with the task's effects.
* A chord's body is enqueued in the transaction in which its last part returns: nothing polls.
* What a canvas keeps (a chord's size, a saved group) commits with the messages of that canvas.
* Expired results are deleted by the relays: no `celery.backend_cleanup`.

Connection string
=================
``outbox://``: it takes no address, for the database is the outbox's.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import BaseBackend
from celery.backends.database import DatabaseBackend
from celery.canvas import _chain, _chord, group, maybe_signature
from celery.exceptions import BackendStoreError, ChordError, Reject, TimeoutError  # noqa: A004 - Celery's name
from celery.result import GroupResult, result_from_tuple
from celery.utils.functional import _regen
from celery.utils.saferepr import saferepr
from celery.utils.time import maybe_timedelta
from kombu.exceptions import EncodeError
from kombu.utils.encoding import ensure_bytes
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from catga_tasks import current, deferral, results
from catga_tasks.database import refuse_missing_table, storable
from catga_tasks.errors import CatgaError, ConfigurationError, MigrationRequired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from sqlalchemy import Connection

logger = logging.getLogger("catga_tasks.backend")

#: The first pause between two looks at a result that isn't there yet, in seconds; it doubles up to `interval`.
POLL_SECONDS = 0.005
#: Rows that `celery.backend_cleanup` deletes at a time.
_CLEANUP_BATCH = 1000


class _Transaction:
    """One in which the backend writes, and whether a statement in it has failed: it can't commit then."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.error: SQLAlchemyError | None = None


_transaction: ContextVar[_Transaction | None] = ContextVar("catga_backend_transaction", default=None)


class OutboxBackend(DatabaseBackend):
    """The result backend `outbox://`."""

    #: An effectively-once task's outcome is written into the task's own transaction.
    commits_with_task = True
    supports_native_join = True
    #: Celery's beat needs no clean-up for it.
    supports_autoexpire = True

    def __init__(self, app: Any, url: str | None = None, **options: Any) -> None:
        # Celery's own would make an engine, and tables of its own.
        BaseBackend.__init__(self, app, url=url, expires_type=maybe_timedelta, **options)
        if url is not None and url.partition("://")[2].strip("/"):
            raise ConfigurationError("result_backend: outbox:// takes no address: it is the outbox's own database.")
        if not hasattr(app, "outbox"):
            raise ConfigurationError("result_backend: outbox:// needs an application made by Catga(...), not Celery.")
        # As Celery's database backend has it.
        self.always_retry = _chosen(app, "result_backend_always_retry", default=True)
        self.max_retries = _chosen(app, "result_backend_max_retries", default=3)

    def exception_safe_to_retry(self, exc: Exception) -> bool:
        """Return whether the database may be asked again; not within a transaction that has failed."""
        return _transaction.get() is None and not self._with_task() and isinstance(exc, SQLAlchemyError)

    def on_backend_retryable_error(self, exc: Exception) -> None:
        """Nothing is to be thrown away: the pool of connections looks after itself."""

    # Results.

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **options: Any) -> Any:
        """Store a result as Celery does; an effectively-once task whose result can't be stored is run again."""
        with self._or_doomed():
            return super().store_result(task_id, result, state, *args, **options)

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_options: Any
    ) -> None:
        row = self._row(task_id, result, state, traceback, request)
        with self._writing() as connection:
            results.store(connection, row)

    def _row(self, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> results.Result:
        meta = self._get_result_meta(result, state, traceback, request, format_date=False)
        stamped = meta.get("stamped_headers")
        stamps = {name: meta[name] for name in stamped or () if name in meta}
        return results.Result(
            task_id=str(task_id),
            status=state,
            result=self._encoded(result),
            traceback=_text(traceback),
            children=self._encoded(meta["children"]) if meta.get("children") else None,
            name=_text(meta.get("name")),
            args=self._shown(meta["args"]) if "args" in meta else None,
            kwargs=self._shown(meta["kwargs"]) if "kwargs" in meta else None,
            worker=_text(meta.get("worker")),
            retries=meta.get("retries"),
            queue=_text(meta.get("queue")),
            stamps=self._encoded({"stamped_headers": stamped, "stamps": stamps}) if stamped else None,
        )

    def _get_task_meta_for(self, task_id: str) -> Any:
        found = self._metas([task_id])
        if found:
            return found[0]
        return {
            "task_id": task_id, "status": states.PENDING, "result": None, "traceback": None, "children": None,
            "date_done": None,
        }  # fmt: skip

    def _task_result_exists(self, task_id: str) -> bool:
        with self._reading() as connection:
            return bool(results.load(connection, [str(task_id)]))

    def _metas(self, task_ids: Iterable[str]) -> list[dict[str, Any]]:
        with self._reading() as connection:
            found = results.load(connection, map(str, task_ids))
        return [self._meta(row, stored_at) for row, stored_at in found]

    def _meta(self, row: results.Result, stored_at: datetime) -> Any:
        coded = ("result", "children", "args", "kwargs")
        meta = {**row._asdict(), **{name: self._decoded(getattr(row, name)) for name in coded}}
        stamps = self._decoded(meta.pop("stamps"))
        if stamps:
            meta.update(stamps["stamps"], stamped_headers=stamps["stamped_headers"])
        meta["date_done"] = stored_at if row.status in states.READY_STATES else None
        return self.meta_from_decoded(meta)

    def _forget(self, task_id: str) -> None:
        self.app.commit_with(partial(results.forget, task_id=str(task_id)))

    # Waiting.

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,  # noqa: ARG002, FBT001, FBT002 - Celery's signature
        on_interval: Callable[[], Any] | None = None,
    ) -> Any:
        """Wait for a task and return what is stored of it; at first in short pauses, `interval` is the longest."""
        self._ensure_not_eager()
        for _ in _looks(timeout, interval, on_interval):
            meta = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
        return None

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,  # noqa: ARG002, FBT001, FBT002 - Celery's signature
        on_message: Callable[[Any], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        READY_STATES: Any = states.READY_STATES,  # noqa: N803 - Celery's name
    ) -> Iterator[tuple[str, Any]]:
        """Yield tasks that are done, with what is stored of them, as they come; one query asks for all of them."""
        waiting = set(map(str, task_ids))
        for count, _ in enumerate(_looks(timeout, interval, on_interval), 1):
            cached = [self._cache[each] for each in waiting if each in self._cache]
            cached = [meta for meta in cached if meta["status"] in READY_STATES]
            asked = waiting.difference(meta["task_id"] for meta in cached)
            found = self._ensure_retryable(self._metas, asked) if asked else []
            for meta in (*cached, *(each for each in found if each["status"] in READY_STATES)):
                waiting.discard(meta["task_id"])
                self._cache[meta["task_id"]] = meta
                if on_message is not None:
                    on_message(meta)
                yield meta["task_id"], meta
            if not waiting or count == max_iterations:
                return

    # Groups.

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = self._encoded(self.prepare_value(result))
        self.app.commit_with(partial(results.save_group, group_id=str(group_id), result=payload))
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        with self._reading() as connection:
            found = results.load_group(connection, str(group_id))
        if found is None:
            return None
        result, stored_at = found
        restored = result_from_tuple(self._decoded(result), self.app)
        return {"taskset_id": group_id, "result": restored, "date_done": stored_at}

    def _delete_group(self, group_id: str) -> None:
        self.app.commit_with(partial(results.delete_group, group_id=str(group_id)))

    # Chords.

    def apply_chord(self, header_result_args: Any, body: Any, **_options: Any) -> None:
        """Note what the chord's counter needs; it is written with the header's messages."""
        group_id, found = header_result_args
        header = None
        if not isinstance(found, _regen):
            parts = self.app.GroupResult(group_id, list(found))
            if any(isinstance(each, GroupResult) for each in parts.results):
                header = self._encoded(parts.as_tuple())
        deferral.announced.set({**(deferral.announced.get() or {}), group_id: (header, body)})

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Write the chord's counter with the message of its last part, which is sent next."""
        announced = dict(deferral.announced.get() or {})
        if group_id not in announced:
            # The group at the end of a part that is a chain: it counts towards the chord that the part is in.
            return
        header, body = announced.pop(group_id)
        deferral.announced.set(announced)
        self.app.commit_with(partial(self._open_chord, group_id, chord_size, header, body))

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_options: Any) -> None:
        """Count a part of a chord, once; enqueue the chord's body, in the same transaction, if it is the last."""
        if not request.id or not request.group:
            return
        outcome = self._encoded([state, self.encode_result(result, state)])
        part = results.Part(request.group, request.id, request.group_index, outcome)
        with self._or_doomed():
            self._ensure_retryable(self._return_part, part, request.chord)

    def _open_chord(self, group_id: str, size: int, header: bytes | None, body: Any, connection: Connection) -> None:
        if results.open_chord(connection, group_id, size, header):
            with self._in(connection):
                self._end_chord(connection, group_id, header, body)

    def _return_part(self, part: results.Part, body: Any) -> None:
        with self._writing() as connection:
            last, header = results.return_part(connection, part)
            if last:
                self._end_chord(connection, part.group_id, header, maybe_signature(body, app=self.app))

    def _end_chord(self, connection: Connection, group_id: str, header: bytes | None, body: Any) -> None:
        """Enqueue the body with the parts' results, or fail it with the first part that has failed."""
        try:
            values = self._joined(results.take_parts(connection, group_id), header)
            body.delay(values)
        except (SQLAlchemyError, CatgaError):
            raise
        except Exception as error:
            logger.exception("Chord %s: its body doesn't run.", group_id)
            known = isinstance(error, ChordError)
            self._fail_body(body, error if known else ChordError(f"Callback error: {error!r}"))

    def _fail_body(self, body: Any, error: ChordError) -> None:
        """Fail the body as Celery does, and what waits for it: the chord may be a part of another one."""
        outcome = self._encoded([states.FAILURE, self.encode_result(error, states.FAILURE)])
        for options in map(attrgetter("options"), _ends(body)):
            if options.get("chord") and options.get("group_id"):
                part = results.Part(options["group_id"], options["task_id"], options.get("group_index"), outcome)
                self._return_part(part, options["chord"])
        self.chord_error_from_stack(body, error)

    def _joined(self, parts: list[tuple[str, bytes]], header: bytes | None) -> list[Any]:
        values = {}
        for task_id, outcome in parts:
            state, value = self._decoded(outcome)
            if state in self.EXCEPTION_STATES:
                value = self.exception_to_python(value)
            if state in states.PROPAGATE_STATES:
                raise ChordError(f"Dependency {task_id} raised {value!r}") from value
            values[task_id] = value
        return list(values.values()) if header is None else _filled(self._decoded(header), values)

    # Expiry.

    def _cleanup(self) -> None:
        """Delete what is past `result_expires`, as relays do."""
        seconds = self.expires.total_seconds() if self.expires else 0
        for expire in (results.expire, results.expire_groups, results.expire_chords):
            deleted = _CLEANUP_BATCH if seconds else 0
            while deleted == _CLEANUP_BATCH:
                with self.app.outbox.engine.begin() as connection:
                    deleted = expire(connection, seconds, _CLEANUP_BATCH)

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        """Return how to make this backend again: by its URL."""
        return BaseBackend.__reduce__(self, args, {**(kwargs or {}), "url": self.url})

    # Transactions.

    def _with_task(self) -> bool:
        """Return whether what is written now belongs to the running task's transaction.

        Before the task has ended, its states have to be visible: they don't, but for SQLite, which has one writer.
        """
        delivery = current.delivery.get()
        return delivery is not None and (delivery.ended or self.app.outbox.engine.dialect.name == "sqlite")

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Yield a connection, and commit: with the task, with what the backend is at already, or here and now."""
        delivery, outer = current.delivery.get(), _transaction.get()
        if outer is not None:
            with _noted(outer):
                yield outer.connection
        elif delivery is not None and self._with_task():
            with self.app.outbox.join(delivery.session), self._in(delivery.session.connection()) as connection:
                yield connection
        else:
            with self.app.outbox.engine.begin() as connection, self.app.outbox.join(connection), self._in(connection):
                yield connection

    @contextmanager
    def _in(self, connection: Connection) -> Iterator[Connection]:
        """Let all that the backend writes in this block go to the connection; raise if some of it has failed.

        Celery goes on after some errors, and PostgreSQL would take a commit after one for a rollback, without a word.
        """
        transaction = _Transaction(connection)
        token = _transaction.set(transaction)
        try:
            with _noted(transaction):
                yield connection
        finally:
            _transaction.reset(token)
        if transaction.error is not None:
            raise transaction.error

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        delivery, outer = current.delivery.get(), _transaction.get()
        try:
            if outer is not None:
                yield outer.connection
            elif delivery is not None and self._with_task():
                yield delivery.session.connection()
            else:
                with self.app.outbox.engine.connect() as connection:
                    yield connection
        except DBAPIError as error:
            refuse_missing_table(error)
            raise

    @contextmanager
    def _or_doomed(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, BackendStoreError, MigrationRequired) as error:
            delivery = current.delivery.get()
            if delivery is None:
                raise
            delivery.doom(error)
            # Celery's tracer lets this pass, where it would make a failure of the task of other errors.
            raise Reject(str(error), requeue=True) from error

    # Serialization.

    def _encoded(self, value: Any) -> bytes:
        return bytes(ensure_bytes(self.encode(value)))

    def _shown(self, value: Any) -> bytes:
        """Serialize arguments to be looked at; those that came by another serializer as their representation."""
        try:
            return self._encoded(value)
        except EncodeError:
            return self._encoded(saferepr(value))

    def _decoded(self, payload: bytes | None) -> Any:
        return None if payload is None else self.decode(bytes(payload))


@contextmanager
def _noted(transaction: _Transaction) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        transaction.error = transaction.error or error
        if isinstance(error, DBAPIError):
            refuse_missing_table(error)
        raise


def _chosen(app: Any, name: str, *, default: Any) -> Any:
    value = app.conf.get(name) if app.conf.value_set_for(name) else None
    return default if value is None else value


def _looks(timeout: float | None, interval: float | None, on_interval: Callable[[], Any] | None) -> Iterator[None]:
    """Yield for each look, with a pause in between; raise Celery's `TimeoutError` after `timeout` seconds."""
    longest = 0.5 if interval is None else interval
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = min(POLL_SECONDS, longest)
    while True:
        yield
        if on_interval is not None:
            on_interval()
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("The operation timed out.")
        time.sleep(pause if left is None else min(pause, left))
        pause = min(longest, pause * 2)


def _ends(signature: Any) -> Iterator[Any]:
    """Yield the tasks that end a canvas; they count as parts of the chord that it is in."""
    if isinstance(signature, group):
        for each in signature.tasks:
            yield from _ends(each)
    elif isinstance(signature, _chain):
        yield from _ends(signature.tasks[-1])
    elif isinstance(signature, _chord):
        yield from _ends(signature.body)
    else:
        yield signature


def _filled(header: Any, values: dict[str, Any]) -> Any:
    """Return the values in the header's structure: a group's, nested in it, are a list of their own."""
    (task_id, _), children = header
    if children is not None:
        return [_filled(child, values) for child in children]
    if task_id not in values:
        raise ChordError(f"Dependency {task_id} has no result")
    return values[task_id]


def _text(value: Any) -> str | None:
    return None if value is None else storable(value)
