"""What does a task gain? Its delivery, a bulk call, and retries that survive the transaction they are raised in."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from celery import Signature
from celery import Task as CeleryTask
from celery.exceptions import Reject

from catga_tasks import current, holding, keys, leases, turns, worker
from catga_tasks.config import check_delivery
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from celery.result import AsyncResult
    from sqlalchemy.orm import Session


class _CurrentSession:
    """`self.session` of a bound task. Not a property: a class of the application's may have its own."""

    def __get__(self, task: Any, _owner: object = None) -> Session:
        return current.current_session()


class CatgaTask(CeleryTask):
    """The base class of a Catga application's tasks."""

    abstract = True
    #: "at_most_once", "at_least_once" or "effectively_once"; None takes the application's `task_delivery`.
    delivery: str | None = None
    #: With "at_least_once": keep a message that is running, or that is done, from running a second time.
    deduplicate: bool = False
    #: Keep a second message with the same key from being sent: True, or a dictionary with by, until and period.
    unique: Any = None
    #: Keep messages with the same key in order: a string, or a function of the task's arguments that returns one.
    key: Any = None
    #: The session whose transaction this task commits in; see `current_session`.
    session = _CurrentSession()

    Request = "catga_tasks.requests:Request"
    _bound_by_catga: bool
    _tracer: Callable[..., Any] | None = None

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind the task to its application, and set how it is acknowledged and run by its delivery."""
        if "_bound_by_catga" in cls.__dict__:
            # Celery binds a class more than once, and has filled in its own settings by then.
            return super().bind(app)
        cls._bound_by_catga = True
        chosen = cls.delivery is not None or "task_delivery" in app.conf
        cls.delivery = choose_delivery(cls.delivery, app.catga_settings.task_delivery, cls.name)
        _check(cls, chosen=chosen)
        _read_keys(cls)
        if cls.delivery == "at_most_once":
            cls.acks_late = cls.reject_on_worker_lost = False
        elif chosen or cls.deduplicate:
            cls.acks_late = cls.reject_on_worker_lost = True
        if cls.delivery == "effectively_once" and not getattr(cls.__call__, "catga_guards", False):
            cls.__call__ = _guarded(cls)
        return super().bind(app)

    @property
    def __trace__(self) -> Callable[..., Any] | None:
        """Return Celery's tracer, inside the inbox if the task's delivery asks for it."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, tracer: Callable[..., Any] | None) -> None:
        if tracer is None or self.delivery == "at_most_once":
            self._tracer = tracer
            return

        def trace(task_id: str, args: Any, kwargs: Any, request: Any = None) -> Any:
            request = request or {}

            def run() -> Any:
                return tracer(task_id, args, kwargs, request)

            def in_turn(call: Callable[[], Any]) -> Any:
                held = holding.held_by(task_id, request)
                return call() if held is None else turns.run(self, task_id, request, held, call)

            if self.delivery == "effectively_once":
                return in_turn(lambda: worker.Once(self, task_id, request).trace(run))
            if self.deduplicate:
                return leases.Leased(self, task_id, request).trace(lambda: in_turn(run))
            return in_turn(run)

        self._tracer = trace

    def delay_many(self, arguments: Iterable[tuple[Any, ...]], **options: Any) -> Sequence[AsyncResult]:
        """Enqueue one message for each tuple of positional arguments, and return their results in order.

        `options` are those of `apply_async`, the same for all of them. What is equal in all messages is built once, and
        one statement inserts them: all or none are enqueued, in the current transaction if there is one.

            charge.delay_many([(1,), (2,), (3,)])
        """
        results: Sequence[AsyncResult] = self.app.send_many(self, arguments, options)
        return results

    def apply(self, *args: Any, **options: Any) -> Any:
        """Run the task here and now, as Celery does; with "effectively_once" in a transaction of its own.

        No message, so no inbox.
        """
        if self.delivery != "effectively_once":
            return super().apply(*args, **options)
        return worker.Here(self).trace(lambda: CeleryTask.apply(self, *args, **options))

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

    def on_replace(self, sig: Any) -> Any:
        """Send the replacement as Celery does; what the task has done so far is kept, for it hasn't failed."""
        delivery = current.delivery.get()
        if isinstance(delivery, worker.Once) and delivery.task is self:
            delivery.replace()
        held = holding.current()
        if held is not None and type(sig) is Signature and not self.request.is_eager:
            # One task for another; the ids of a canvas's parts are others'.
            sig.set(headers={**(sig.options.get("headers") or {}), **held.hand_on()})
        return super().on_replace(sig)


def _read_keys(cls: type[CatgaTask]) -> None:
    """Check the options `unique` and `key`, and keep a function from becoming a method."""
    cls.unique = keys.read_unique(f"Task {cls.name}", cls.unique)
    rule = inspect.getattr_static(cls, "key")
    if inspect.isfunction(rule):
        cls.key = staticmethod(rule)
    elif cls.key is not None and not callable(cls.key):
        keys.check_key(f"Task {cls.name}: key", cls.key)
    if cls.delivery == "at_most_once" and (cls.unique is not None or cls.key is not None):
        raise ConfigurationError(
            f"Task {cls.name}: unique and key need the outbox, which delivery='at_most_once' goes past: leave them "
            "out, or take another delivery."
        )


def _check(cls: type[CatgaTask], *, chosen: bool) -> None:
    """Refuse options that contradict the delivery; `chosen` if it was named, and isn't the default."""
    name, delivery = cls.name, cls.delivery
    if delivery == "at_most_once" and cls.acks_late:
        raise ConfigurationError(
            f"Task {name}: acks_late=True contradicts delivery='at_most_once', which acknowledges before the task "
            "runs: leave one of them out."
        )
    for option in ("acks_late", "reject_on_worker_lost"):
        if delivery != "at_most_once" and (chosen or cls.deduplicate) and getattr(cls, option) is False:
            raise ConfigurationError(
                f"Task {name}: {option}=False contradicts delivery={delivery!r}: a message whose worker dies would be "
                "lost. Leave it out, or take delivery='at_most_once'."
            )
    if cls.deduplicate and delivery != "at_least_once":
        raise ConfigurationError(
            f"Task {name}: deduplicate=True goes with delivery='at_least_once'; {delivery!r} "
            f"{'has no outbox to rely on' if delivery == 'at_most_once' else 'deduplicates by itself'}."
        )
    if delivery == "effectively_once" and inspect.iscoroutinefunction(cls.run):
        raise ConfigurationError(
            f"Task {name} is an `async def` with delivery='effectively_once': its transaction belongs to a "
            "synchronous session. Write `def`, and asyncio.run() what has to be awaited."
        )


def _guarded(cls: type[CatgaTask]) -> Callable[..., Any]:
    """Return the task's call, whose errors roll back the delivery's transaction before Celery looks at them."""
    own = cls.__call__
    plain = own is CeleryTask.__call__

    def call(self: CatgaTask, *args: Any, **kwargs: Any) -> Any:
        delivery = current.delivery.get()
        if not isinstance(delivery, worker.Once) or delivery.task is not self or delivery.ended or delivery.running:
            return own(self, *args, **kwargs)
        return delivery.run(lambda: self.run(*args, **kwargs) if plain else own(self, *args, **kwargs))

    call.catga_guards = True  # type: ignore[attr-defined]
    return call


def choose_delivery(own: object, default: str, name: str) -> str:
    """Return a task's delivery: its own, else the application's."""
    return default if own is None else check_delivery(f"delivery of task {name}", own)
