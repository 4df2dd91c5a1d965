"""What does a task gain? Its delivery, a bulk call, and retries that survive the transaction they are raised in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task as CeleryTask
from celery.exceptions import Reject

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery.result import AsyncResult


class CatgaTask(CeleryTask):
    """The base class of a Catga application's tasks."""

    abstract = True
    #: "at_most_once" or "at_least_once"; None takes the application's `task_delivery`.
    delivery: str | None = None

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
