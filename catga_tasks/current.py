"""Which delivery is this thread at, and which transaction does its task commit in?"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.orm import Session

    from catga_tasks.envelope import Envelope


class Delivery(Protocol):
    """An effectively-once task that is being run."""

    #: Whose transaction the task's effects, its result and what it enqueues commit in.
    session: Session
    #: The task's own code is over: what is written from now on is about its outcome.
    ended: bool

    def keep(self, envelopes: Sequence[Envelope]) -> None:
        """Enqueue messages however the task ends: its own retry must survive the rollback."""

    def doom(self, error: Exception) -> None:
        """Give the message back instead of committing: the outcome can't be stored."""

    def after_commit(self, work: Callable[[], object]) -> None:
        """Call the function once the delivery's transaction has committed; not at all if it doesn't."""


#: The delivery that this thread is at; None outside an effectively-once task.
delivery: ContextVar[Delivery | None] = ContextVar("catga_delivery", default=None)


def current_session() -> Session:
    """Return the session whose transaction the running task commits in.

    It belongs to the task: what it writes is committed, together with the tasks that it enqueues, its result and its
    entry in the inbox, when the task returns, and rolled back when it raises. Raises `ConfigurationError` outside a
    task with `delivery="effectively_once"`.
    """
    found = delivery.get()
    if found is None:
        raise ConfigurationError(
            "current_session() is there inside a running task with delivery='effectively_once' only: give the task "
            "that delivery, or open a session of your own."
        )
    return found.session
