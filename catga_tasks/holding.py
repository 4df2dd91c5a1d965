"""When does a delivery let go of the keys that its message holds?

A key that is held until the start is freed by a transaction of its own before the task runs. Everything else is let go
when the task has ended: in the task's own transaction if it is effectively-once, right after it otherwise. A retry, a
message that goes back to the broker and a replacement (`self.replace`) keep what they have.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery import states

from catga_tasks import holds, keys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection


class Held:
    """What the message of one delivery holds."""

    def __init__(self, task_id: str, held: keys.Keys) -> None:
        self._task_id = task_id
        self._keys = held
        self._handed_on = False

    @property
    def opens(self) -> bool:
        """Whether there is something to do before the task runs."""
        return self._keys.order is not None or self._keys.until == "start"

    def start(self, connection: Connection, *, ask: bool) -> bool:
        """Free what is held until the start; return False if it isn't the message's turn, where `ask` wants to know.

        A message that is out of its turn has ended before: it was sent in its turn, and has come a second time.
        """
        order = self._keys.order
        if ask and order is not None and not holds.has_turn(connection, order, self._task_id):
            return False
        if self._keys.unique is not None and self._keys.until == "start":
            holds.leave(connection, self._keys.unique, self._task_id)
        return True

    def hand_on(self) -> dict[str, Any]:
        """Return the headers by which another message goes on with these keys: this one lets go of nothing."""
        self._handed_on = True
        return self._keys.headers()

    def goes_on(self, answer: Any) -> bool:
        """Return whether the keys are held on to, by what Celery's tracer answered."""
        if self._handed_on:
            return True
        if answer.info is None:
            return False
        state = answer.info.state
        return bool(state == states.RETRY or (state == states.REJECTED and answer.info.retval.requeue))

    def end(self, connection: Connection) -> bool:
        """Let go; return whether another message is due by that."""
        unique = self._keys.unique if self._keys.until != "period" else None
        return holds.let_go(connection, self._task_id, unique_key=unique, ordering_key=self._keys.order)


#: What the message that this thread is at holds.
_current: ContextVar[Held | None] = ContextVar("catga_held", default=None)


def held_by(task_id: str, request: Mapping[str, Any]) -> Held | None:
    """Return what the message of this request holds; None for nothing, which is most messages."""
    headers = request.get("headers") or request
    if keys.UNIQUE not in headers and keys.ORDER not in headers:
        return None
    return Held(task_id, keys.read_headers(headers))


def current() -> Held | None:
    """Return what the message that this thread is at holds."""
    return _current.get()


@contextmanager
def as_current(held: Held) -> Iterator[None]:
    """Let `current` return it in this block."""
    token = _current.set(held)
    try:
        yield
    finally:
        _current.reset(token)
