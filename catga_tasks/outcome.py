"""How does a delivery end for Celery, and what of it does the inbox keep for a duplicate?

Celery's tracer answers (value, information, seconds, representation); a worker acknowledges, or gives back, by it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.task import Context
from celery.app.trace import TraceInfo, get_actual_ignore_result, trace_ok_t
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.saferepr import saferepr
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads

from catga_tasks import telemetry
from catga_tasks.database import storable
from catga_tasks.inbox import Content
from catga_tasks.links import send_again

if TYPE_CHECKING:
    from collections.abc import Mapping

    from catga_tasks.inbox import Seen

logger = logging.getLogger("catga_tasks.worker")


def fields(task: Any, task_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return which message a log line speaks of, where no task runs that could tell (see `logs`)."""
    carried = request.get("traceparent")
    return {
        "task_id": task_id,
        "task_name": task.name,
        "message_id": request.get(telemetry.MESSAGE_ID),
        "trace_id": carried[3:35] if isinstance(carried, str) else None,
    }


def ignored(reason: str) -> Any:
    """Return the answer that acknowledges the message, and says nothing else of it."""
    return _raised(Ignore(reason), states.IGNORED)


def given_back(reason: str) -> Any:
    """Return the answer that gives the message back to the broker."""
    return _raised(Reject(reason, requeue=True), states.REJECTED)


def succeeded(value: Any, longest: int) -> Any:
    """Return the answer of a task that succeeded."""
    return trace_ok_t(value, None, 0.0, saferepr(value, longest))


def state_of(error: BaseException) -> str:
    """Return the state that a task ends in when it raises this."""
    kinds = ((Retry, states.RETRY), (Reject, states.REJECTED), (Ignore, states.IGNORED))
    return str(next((state for kind, state in kinds if isinstance(error, kind)), states.FAILURE))


def described(error: BaseException) -> str:
    """Return the error in one line, for those who look into the inbox."""
    cause = error.exc if isinstance(error, Retry) and error.exc is not None else error
    return storable(" ".join(f"{type(cause).__name__}: {cause}".split())[:1000])


def failed(task: Any, request: Mapping[str, Any], error: Exception) -> Any:
    """Let Celery do what it does when a task fails, and return its answer."""
    information = TraceInfo(states.FAILURE, error)
    context = Context(request)
    return trace_ok_t(information.handle_error_state(task, context), information, 0.0, None)


def content(task: Any, request: Mapping[str, Any], value: Any) -> Content | None:
    """Serialize a result; return it if a duplicate will be asked for it, else None.

    Raises `EncodeError` for a value that `result_serializer` can't hold.
    """
    wanted = _stored(task, request) or request.get("chord") or request.get("callbacks") or request.get("chain")
    backend = task.app.backend
    if not wanted and (not _commits(backend) or get_actual_ignore_result(task, Context(request))):
        return None
    prepared = backend.prepare_value(value)
    try:
        content_type, encoding, payload = dumps(prepared, serializer=backend.serializer)
    except EncodeError as error:
        message = (
            f"Task {task.name} returned something that result_serializer ({backend.serializer}) can't hold: {error}. "
            "Return what it can, or set ignore_result=True."
        )
        raise EncodeError(message) from error
    return (
        Content(content_type, encoding, payload.encode() if isinstance(payload, str) else payload) if wanted else None
    )


def failure_content(task: Any, request: Mapping[str, Any], error: Exception) -> Content | None:
    """Serialize the error for a result backend that learns of it after the commit."""
    if not (_apart(task.app.backend) and (_stored(task, request) or request.get("chord"))):
        return None
    return content(task, {**request, "chord": True}, task.app.backend.prepare_exception(error))


def repeat(task: Any, task_id: str, request: Mapping[str, Any], seen: Seen) -> Any:
    """Return the answer for a duplicate; what follows the task goes out once more, under the same ids.

    That is only for tasks that tell their duplicates apart: what follows was committed with the task's own effects, or
    its result is (see `tell`), so nothing depends on it.
    """
    logger.info(
        "Task %s[%s] came again: its first delivery ended as %s, it doesn't run twice.",
        task.name,
        task_id,
        seen.state,
        extra=fields(task, task_id, request),
    )
    if seen.state != states.SUCCESS or seen.content is None:
        return ignored(f"a duplicate; the first one ended as {seen.state}")
    value = _loaded(task, seen.content)
    send_again(task.app, task_id, request, value)
    return succeeded(value, task.resultrepr_maxsize)


def tell(task: Any, task_id: str, request: Mapping[str, Any], seen: Seen) -> None:
    """Tell a result backend that isn't part of the transaction once more how the task ended.

    The first delivery's worker may have died before it did. A chord's part is counted by its own id, so twice is once.
    """
    backend = task.app.backend
    if seen.content is None or not _apart(backend):
        return
    value, context = _loaded(task, seen.content), Context(request)
    stored = _stored(task, request)
    if seen.state == states.SUCCESS:
        backend.mark_as_done(task_id, value, context, stored)
    elif seen.state == states.FAILURE:
        error = backend.exception_to_python(value)
        backend.mark_as_failure(task_id, error, request=context, store_result=stored, call_errbacks=False)


def _apart(backend: Any) -> bool:
    """Return whether results are kept somewhere else than in the task's own transaction."""
    return not (isinstance(backend, DisabledBackend) or _commits(backend))


def _commits(backend: Any) -> bool:
    return bool(getattr(backend, "commits_with_task", False))


def _stored(task: Any, request: Mapping[str, Any]) -> bool:
    return _apart(task.app.backend) and not get_actual_ignore_result(task, Context(request))


def _loaded(task: Any, kept: Content) -> Any:
    return loads(kept.result, kept.content_type, kept.content_encoding, accept=task.app.backend.accept)


def _raised(error: Exception, state: str) -> Any:
    try:
        raise error
    except type(error):
        return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(state, error), 0.0, None)
