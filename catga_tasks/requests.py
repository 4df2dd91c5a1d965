"""What does a worker's main process do about a task that its pool's child can't end by itself?"""

from __future__ import annotations

import logging
from typing import Any

from celery.exceptions import TimeLimitExceeded
from celery.worker import state
from celery.worker.request import Request as CeleryRequest
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import inbox, outcome, sightings, turns
from catga_tasks.worker import VERDICT, key_of

logger = logging.getLogger("catga_tasks.worker")


class Request(CeleryRequest):
    """A message in a worker's hands. A hard time limit ends its task for good, as with Celery.

    What a message holds is let go here when no child of the pool can do it: it was revoked, it expired, its child died.
    """

    #: The message comes again, or another one goes on in its place.
    _goes_on = False

    def on_timeout(self, soft: bool, timeout: float) -> None:  # noqa: FBT001 - Celery's signature
        """Fail a task that ran into its hard time limit.

        The child that runs an effectively-once task still holds the inbox's row: it is killed after this. So the
        verdict goes the message's own way, through the outbox, and whoever gets it fails the task.
        """
        if soft or self.task.delivery != "effectively_once":
            super().on_timeout(soft, timeout)
            if not soft and self.task.deduplicate:
                self._end_lease(timeout)
            if not soft and not self._goes_on:
                self._dismiss()
            return
        state.task_ready(self)
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id, extra=self._fields)
        try:
            if state.should_terminate:
                # The worker ends, and cuts its tasks short: no fault of theirs.
                self.reject(requeue=True)
                return
            context = self._context
            headers = {**(context.headers or {}), VERDICT: timeout}
            self.task.signature_from_request(context, retries=context.retries, headers=headers).apply_async()
        except Exception as error:  # noqa: BLE001 - whatever it is, the message must not get lost
            reason = type(error).__name__
            logger.warning("Task %s[%s] goes back to the broker: %s", self.name, self.id, reason, extra=self._fields)
            self.reject(requeue=True)
        else:
            self.acknowledge()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:  # noqa: FBT001, FBT002 - Celery's signature
        """Let go of what the message holds, if it is over and its child couldn't say so."""
        answer = super().on_failure(exc_info, send_failed_event, return_ok)
        if not return_ok and self.acknowledged and not self._goes_on:
            self._dismiss()
        return answer

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's signature
        """Send Celery's event, with what Flower's metrics need if it ends a run and somebody hears it."""
        if type in sightings.ENDS and self._is_heard() and (told := sightings.told(self, type, fields)):
            fields[sightings.FIELD] = told
        super().send_event(type, **fields)

    def _is_heard(self) -> bool:
        events = self._eventer
        return bool(events and events.enabled and (not events.groups or "task" in events.groups))

    def reject(self, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - Celery's signature
        """Reject the message, and remember whether it comes again."""
        if not self.acknowledged:
            self._goes_on = requeue
        super().reject(requeue)

    def _retry_worker_lost(self, *args: Any) -> bool:
        self._goes_on = super()._retry_worker_lost(*args)
        return self._goes_on

    def _announce_revoked(self, *args: Any) -> None:
        if not self._dismiss():
            # It comes again, and is found revoked again.
            self.reject(requeue=True)
        super()._announce_revoked(*args)

    def _dismiss(self) -> bool:
        return turns.dismiss(self._app, self.id, self._request_dict)

    def _end_lease(self, timeout: float) -> None:
        key, error = key_of(self.id, self._request_dict), outcome.described(TimeLimitExceeded(timeout))
        try:
            with self._app.outbox.begin() as connection:
                inbox.end_lease(connection, key, state="FAILURE", error=error)
        except SQLAlchemyError as problem:
            logger.warning(
                "Task %s[%s] has failed, and the inbox doesn't know (%s): a duplicate would run after its lease.",
                self.name,
                self.id,
                type(problem).__name__,
                extra=self._fields,
            )

    @property
    def _fields(self) -> dict[str, Any]:
        return outcome.fields(self.task, self.id, self._request_dict)


def tasks_with_database(app: Any) -> list[str]:
    """Return the names of the tasks whose deliveries ask the database: the inbox, or for whom a key is."""
    return sorted(
        name
        for name, task in app.tasks.items()
        if task.delivery == "effectively_once" or task.deduplicate or task.unique is not None or task.key is not None
    )
