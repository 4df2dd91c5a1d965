"""What follows a task, under which ids?

Celery gives the tasks of `link` their ids when it sends them. A task that is delivered twice would send them under two
ids, which no inbox could tell apart; so they are given ids that follow from the task's own.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from celery.canvas import maybe_signature

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping


def fix_ids(task_id: str, request: MutableMapping[str, Any]) -> None:
    """Give the callbacks of this request ids that are the same for each of its deliveries."""
    for number, callback in enumerate(request.get("callbacks") or ()):
        _fix(callback, f"{task_id}/{number}")


def send_again(app: Any, task_id: str, request: Mapping[str, Any], value: Any) -> None:
    """Send what follows the task, where every task of it tells its duplicates apart."""
    delivery_info = request.get("delivery_info") or {}
    options = {
        "parent_id": task_id,
        "root_id": request.get("root_id") or task_id,
        "priority": delivery_info.get("priority") if app.conf.task_inherit_parent_priority else None,
    }
    chain = list(request.get("chain") or ())
    following: list[tuple[Any, dict[str, Any]]] = [(callback, {}) for callback in request.get("callbacks") or ()]
    if chain:
        following.append((chain[-1], {"chain": chain[:-1]}))
    for each, more in following:
        if all(_deduplicates(app, name) for name in _names(each)):
            maybe_signature(each, app=app).apply_async((value,), **options, **more)


def _fix(signature: Any, path: str) -> None:
    options = signature.setdefault("options", {})
    options.setdefault("task_id", str(uuid.uuid5(uuid.NAMESPACE_OID, path)))
    for number, nested in enumerate(_nested(signature)):
        _fix(nested, f"{path}/{number}")


def _nested(signature: Any) -> Iterator[Any]:
    kwargs = signature.get("kwargs") or {}
    for name in ("header", "tasks"):
        found = kwargs.get(name) or ()
        yield from _nested(found) if isinstance(found, dict) else found
    if isinstance(kwargs.get("body"), dict):
        yield kwargs["body"]


def _names(signature: Any) -> Iterator[str]:
    """Return the names of the tasks in a signature; a canvas is one, with others in it."""
    nested = list(_nested(signature))
    if not nested:
        yield signature["task"]
    for each in nested:
        yield from _names(each)


def _deduplicates(app: Any, name: str) -> bool:
    task = app.tasks.get(name)
    return task is not None and (task.delivery == "effectively_once" or task.deduplicate)
