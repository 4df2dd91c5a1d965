"""How does a task call leave the result backend alone?

The backend may be out, and the transaction may roll back. What a call would write rides with its message, and the relay
writes it; what it would listen to is listened to by whoever waits for the result.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any

from celery.backends.base import Backend

from catga_tasks import current

#: Calls to the result backend that ride with the next message: a chord's size must be known before its last part runs.
backend_calls: ContextVar[tuple[list[Any], ...]] = ContextVar("catga_backend_calls", default=())
#: The backend whose reply queue (`rpc://`) must be there before the next message's task runs.
replying: ContextVar[Any] = ContextVar("catga_replying", default=None)
#: Chords whose headers are about to be sent, by their groups' ids, with what their backend must know: their counters
#: commit with the headers' messages.
announced: ContextVar[dict[str, Any] | None] = ContextVar("catga_announced", default=None)


def taken() -> tuple[tuple[list[Any], ...], Any]:
    """Return what rides with the message that is being sent now, whichever way it goes, and forget it."""
    riding = backend_calls.get(), replying.get()
    if riding[0]:
        backend_calls.set(())
    if riding[1] is not None:
        replying.set(None)
    return riding


def defer(backend: Any) -> None:
    """Change this backend so; its own methods stay reachable under their names with `catga_` before them.

    A backend that writes into the transaction itself (`outbox://`) is left as it is.
    """
    if getattr(backend, "commits_with_task", False):
        return
    backend.catga_set_chord_size = backend.set_chord_size
    backend.catga_apply_chord = backend.apply_chord
    backend.catga_on_task_call = backend.on_task_call
    native = getattr(backend.apply_chord, "__func__", None) is not Backend.apply_chord

    def set_chord_size(group_id: str, size: int) -> None:
        if type(backend).set_chord_size is not Backend.set_chord_size:
            backend_calls.set((*backend_calls.get(), ["set_chord_size", group_id, size]))

    def apply_chord(header: Any, body: Any, **options: Any) -> None:
        if not native:
            # The fallback sends a task, celery.chord_unlock: through the outbox like every other.
            backend.catga_apply_chord(header, body, **options)
            return
        backend.ensure_chords_allowed()
        group = backend.app.GroupResult(header[0], list(header[1]))
        backend_calls.set((*backend_calls.get(), ["apply_chord", group.as_tuple()]))

    def on_task_call(_producer: Any, _task_id: str) -> dict[str, Any]:
        if hasattr(backend, "oid") and hasattr(backend, "binding"):
            replying.set(backend)
        return {}

    backend.set_chord_size = set_chord_size
    backend.apply_chord = apply_chord
    backend.on_task_call = on_task_call
    if hasattr(backend, "result_consumer"):
        _subscribe_late(backend)
    _tell_late(backend)


def _tell_late(backend: Any) -> None:
    """Let the outcome of an effectively-once task wait for its commit: who reads it may look for the task's effects."""
    store_result, on_chord_part_return = backend.store_result, backend.on_chord_part_return

    def stored(task_id: str, result: Any, *args: Any, **options: Any) -> Any:
        delivery = current.delivery.get()
        if delivery is None or not delivery.ended:
            return store_result(task_id, result, *args, **options)
        delivery.after_commit(partial(store_result, task_id, result, *args, **options))
        return result

    def part_returned(*args: Any, **options: Any) -> None:
        delivery = current.delivery.get()
        if delivery is None or not delivery.ended:
            on_chord_part_return(*args, **options)
        else:
            delivery.after_commit(partial(on_chord_part_return, *args, **options))

    backend.store_result = stored
    backend.on_chord_part_return = part_returned


def _subscribe_late(backend: Any) -> None:
    """Subscribe to results when somebody waits: Celery does it as soon as a group's result is made."""
    consumer = backend.result_consumer
    subscribe, cancel, wait = consumer.consume_from, consumer.cancel_for, backend._wait_for_pending
    wanted: dict[str, None] = {}

    def cancel_for(task_id: str) -> None:
        if wanted.pop(task_id, False) is False:
            cancel(task_id)

    def wait_for_pending(result: Any, **options: Any) -> Any:
        for task_id in list(wanted):
            if wanted.pop(task_id, False) is None:
                subscribe(task_id)
        return wait(result, **options)

    def consume_from(task_id: str) -> None:
        wanted[task_id] = None

    consumer.consume_from = consume_from
    consumer.cancel_for = cancel_for
    backend._wait_for_pending = wait_for_pending
