"""What does a worker's event tell of a run beside Celery's own fields, for Flower to count it as OpenTelemetry does?"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from catga_tasks import telemetry
from catga_tasks.envelope import DUE_AT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from catga_tasks.telemetry import Measurement

#: The field of the events that end a run.
FIELD = "catga"
ENDS = frozenset(("task-succeeded", "task-failed", "task-retried"))
#: The kind of an error, before its words.
_KIND = re.compile(r"[A-Za-z_]\w*(?=\()")


def told(request: Any, kind: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what Celery's request tells with this event; None if its task wasn't run, as a duplicate isn't."""
    seconds = fields.get("runtime") if kind == "task-succeeded" else time.time() - (request.time_start or 0)
    if not seconds or request.time_start is None:
        return None
    headers = request._request_dict
    since = headers.get(telemetry.READY_AT) or headers.get(DUE_AT)
    found = _KIND.match(str(fields.get("exception")))
    return {
        "system": request._app.messaging_system(headers.get("catga_broker") or ""),
        "queue": (request.delivery_info or {}).get("routing_key") or "",
        "task": request.name,
        "seconds": max(0.0, seconds),
        "waited": max(0.0, request.time_start - since) if isinstance(since, (int, float)) else None,
        "error": (found[0] if found else "_OTHER") if kind == "task-failed" else None,
    }


def measured(event: Mapping[str, Any]) -> list[Measurement]:
    """Measure the run that this event ends; nothing for others, and for those of workers without this package."""
    told = event.get(FIELD)
    if event.get("type") not in ENDS or not isinstance(told, dict):
        return []
    waited, error = told.get("waited"), told.get("error")
    try:
        return list(
            telemetry.running(
                str(told["system"]),
                str(told["queue"]),
                str(told["task"]),
                float(told["seconds"]),
                waited=None if waited is None else float(waited),
                error=None if error is None else str(error),
            )
        )
    except (KeyError, TypeError, ValueError):
        # Another release's.
        return []
