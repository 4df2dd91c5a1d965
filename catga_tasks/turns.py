"""One delivery of a message that holds keys: is it its turn, and who is next?"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import holding, outcome
from catga_tasks.database import in_one_line
from catga_tasks.worker import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from catga_tasks.holding import Held

logger = logging.getLogger("catga_tasks.worker")


def run(task: Any, task_id: str, request: Mapping[str, Any], held: Held, call: Callable[[], Any]) -> Any:
    """Run a delivery, and let go of its keys unless it goes on; return the tracer's answer.

    An effectively-once task lets go in its own transaction, and its inbox knows duplicates by itself. If the database
    is out the message goes back to the broker: its keys must not stay with a message that is gone.
    """
    once, outbox = task.delivery == "effectively_once", task.app.outbox
    try:
        if held.opens and not _starts(outbox, held, ask=not once):
            said_of = outcome.fields(task, task_id, request)
            logger.info("Task %s[%s] came again after its turn: it ended before.", task.name, task_id, extra=said_of)
            return outcome.ignored("a duplicate; its turn is over")
    except SQLAlchemyError as error:
        return give_back(task, task_id, request, error)
    with holding.as_current(held):
        answer = call()
    if once or held.goes_on(answer):
        return answer
    try:
        release(outbox, held)
    except SQLAlchemyError as error:
        return give_back(task, task_id, request, error)
    return answer


def release(outbox: Any, held: Held) -> None:
    """Let go in a transaction of its own."""
    with outbox.begin() as connection:
        passed_on = held.end(connection)
    if passed_on:
        outbox.wake()


def dismiss(app: Any, task_id: str, headers: Any) -> bool:
    """Let go of what a message holds that is over without having been run; return False if that must be tried again."""
    held = holding.held_by(task_id, headers)
    if held is None:
        return True
    try:
        release(app.outbox, held)
    except SQLAlchemyError as error:
        logger.warning("Message %s is over, and its keys aren't free: %s", task_id, in_one_line(error))
        return False
    return True


def _starts(outbox: Any, held: Held, *, ask: bool) -> bool:
    with outbox.begin() as connection:
        return held.start(connection, ask=ask)
