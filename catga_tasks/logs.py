"""Which message does a line of ours speak of? Its task, its row and its trace, as fields and in the words.

The fields `task_id`, `task_name`, `message_id`, `trace_id` are on the records of our loggers, where a JSON formatter or
structlog finds them; what the words of a line don't say yet of them stands behind it.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import current_task

from catga_tasks import telemetry

#: Our loggers. A filter isn't inherited.
LOGGERS = ("catga_tasks", "catga_tasks.relay", "catga_tasks.worker", "catga_tasks.nats", "catga_tasks.redis")
SHOWN = ("task_id", "message_id", "trace_id")


class Fields(logging.Filter):
    """Completes records by what is known of the task that runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete the record, and let it pass."""
        for name, value in _known().items():
            if getattr(record, name, None) is None:
                setattr(record, name, value)
        try:
            words = record.getMessage()
        except (TypeError, ValueError):
            return True  # the handlers say that its words and arguments don't fit
        missing = {name: str(value) for name in SHOWN if (value := getattr(record, name, None)) is not None}
        missing = {name: value for name, value in missing.items() if value not in words}
        if missing:
            added = ", ".join(f"{name}={value}" for name, value in missing.items())
            template, args = _template(record)
            record.msg, record.args = f"{template} [%s]", (*args, added)
        return True


def install() -> None:
    """Complete the records of all our loggers."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, Fields) for each in logger.filters):
            logger.addFilter(Fields())


def _known() -> dict[str, Any]:
    request = current_task.request if current_task else None
    if request is None or not request.id:
        return {"trace_id": telemetry.trace_id()}
    carried = getattr(request, "traceparent", None)
    return {
        "task_id": request.id,
        "task_name": current_task.name,
        "message_id": getattr(request, telemetry.MESSAGE_ID, None),
        "trace_id": telemetry.trace_id() or (carried[3:35] if isinstance(carried, str) else None),
    }


def _template(record: logging.LogRecord) -> tuple[str, tuple[Any, ...]]:
    """Return the words and their arguments; without any, logging takes a percent sign for itself."""
    if not record.args:
        return str(record.msg).replace("%", "%%"), ()
    return str(record.msg), record.args if isinstance(record.args, tuple) else (record.args,)
