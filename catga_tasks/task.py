"""What does a task gain? Its delivery, a bulk call, and retries that survive the transaction they are raised in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task as CeleryTask
from celery.exceptions import Reject

from catga_tasks.config import check_delivery
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery.result import AsyncResult


class CatgaTask(CeleryTask):
    """The base class of a Catga application's tasks."""

    abstract = True
    #: "at_most_once" or "at_least_once"; None takes the application's `task_delivery`.
    delivery: str | None = None

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind the task to its application, and set how it is acknowledged by its delivery."""
        if choose_delivery(cls.delivery, app.catga_settings.task_delivery, cls.name) == "at_most_once":
            if cls.acks_late:
                message = (
                    f"Task {cls.name}: acks_late=True contradicts delivery='at_most_once', which acknowledges before "
                    "the task runs: leave one of them out."
                )
                raise ConfigurationError(message)
            cls.acks_late = cls.reject_on_worker_lost = False
        return super().bind(app)

    def delay_many(self, arguments: Iterable[tuple[Any, ...]], **options: Any) -> Sequence[AsyncResult]:
        """Enqueue one message for each tuple of positional arguments, and return their results in order.

        `options` are those of `apply_async`, the same for all of them. What is equal in all messages is built once, and
        one statement inserts them: all or none are enqueued, in the current transaction if there is one.

            charge.delay_many([(1,), (2,), (3,)])
        """
        results: Sequence[AsyncResult] = self.app.send_many(self, arguments, options)
        return results

    def retry(self, *args: Any, **options: Any) -> Any:
        """Retry the task as Celery does; if the retry can't be enqueued, the message goes back to the broker.

        Celery rejects such a message for good, which loses it.
        """
        try:
            return super().retry(*args, **options)
        except Reject as reject:
            if isinstance(reject.reason, Exception) and not reject.requeue:
                raise Reject(reject.reason, requeue=True) from reject.reason
            raise


def choose_delivery(own: object, default: str, name: str) -> str:
    """Return a task's delivery: its own, else the application's."""
    return default if own is None else check_delivery(f"delivery of task {name}", own)
