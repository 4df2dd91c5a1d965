"""Which transaction does the running task commit in?"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

#: The session of the delivery that this thread is at; None outside an effectively-once task.
session: ContextVar[Session | None] = ContextVar("catga_current_session", default=None)


def current_session() -> Session:
    """Return the session whose transaction the running task commits in.

    It belongs to the task: what it writes is committed, together with the tasks that it enqueues, its result and its
    entry in the inbox, when the task returns, and rolled back when it raises. Raises `ConfigurationError` outside a
    task with `delivery="effectively_once"`.
    """
    found = session.get()
    if found is None:
        raise ConfigurationError(
            "current_session() is there inside a running task with delivery='effectively_once' only: give the task "
            "that delivery, or open a session of your own."
        )
    return found
