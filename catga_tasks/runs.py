"""What is told of a task that runs? Its span, its duration, and how long its message had waited.

By Celery's own signals, in the process that runs the task.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals, states
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import outbox, telemetry

if TYPE_CHECKING:
    from sqlalchemy import Engine

#: The worker's clock is compared with the database's so often, in seconds.
CLOCK_SECONDS = 60.0
_GOOD = (states.SUCCESS, states.IGNORED, states.REJECTED, states.RETRY)


class RunsStep(bootsteps.Step):
    """Lets a worker follow its tasks if an SDK is configured when it starts, or when a process of its pool does.

    Else nothing is connected: Celery's signals would take some microseconds of each task.
    """

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        _follow()
        # Behind the application's own receivers, one of which may configure the SDK.
        signals.worker_process_init.connect(_follow, dispatch_uid="catga_tasks.runs")


def _follow(**_sender: object) -> None:
    if telemetry.on():
        signals.task_prerun.connect(_began, dispatch_uid="catga_tasks.runs")
        signals.task_postrun.connect(_ended, dispatch_uid="catga_tasks.runs")


def _began(task: Any = None, **_others: object) -> None:
    request = task.request
    if not telemetry.on() or request.is_eager or not hasattr(task.app, "messaging_system"):
        return
    from catga_tasks import tracing

    queue = (request.delivery_info or {}).get("routing_key") or ""
    headers = {name: getattr(request, name, None) for name in (*tracing.CARRIED, telemetry.MESSAGE_ID)}
    request.catga_run = tracing.Run(
        task.name,
        request.id,
        queue,
        system=task.app.messaging_system(getattr(request, "catga_broker", None) or ""),
        headers=headers,
        waited=_waited(task.app, getattr(request, telemetry.READY_AT, None)),
    )


def _ended(task: Any = None, retval: Any = None, state: str | None = None, **_others: object) -> None:
    run = task.request.__dict__.pop("catga_run", None)
    if run is not None:
        run.end(None if state in _GOOD else type(retval).__name__)


def _waited(app: Any, ready_at: Any) -> float | None:
    if not isinstance(ready_at, (int, float)):
        return None
    return max(0.0, time.time() + _clock.ahead(app.outbox.engine) - ready_at)


class _Clock:
    """How far the database's clock is ahead of this machine's, in seconds.

    A thread compares them, for no task waits for it; until it has, they are taken to agree.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._ahead = 0.0

    def ahead(self, engine: Engine) -> float:
        if engine.dialect.name != "sqlite" and self._pid != os.getpid():
            self._pid = os.getpid()
            threading.Thread(target=self._follow, args=(engine,), name="catga-clock", daemon=True).start()
        return self._ahead

    def _follow(self, engine: Engine) -> None:
        while True:
            try:
                with engine.connect() as connection:
                    outbox.clock(connection)  # the first statement of a connection takes longer
                    before = time.time()
                    theirs = outbox.clock(connection)
                    self._ahead = theirs - (before + time.time()) / 2
            except SQLAlchemyError:
                pass  # it is asked again
            time.sleep(CLOCK_SECONDS)


_clock = _Clock()
