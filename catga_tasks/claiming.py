"""Which keys does a call take, and what does its result become if another message has them?

Works on Celery's built message, just before it is enqueued.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery import current_task
from kombu.utils.json import dumps

from catga_tasks import keys
from catga_tasks.errors import ConfigurationError
from catga_tasks.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPTIONS = ("unique", "unique_key", "key")
#: The ticket of the message that is being sent.
_sent: ContextVar[Ticket | None] = ContextVar("catga_ticket", default=None)


class Ticket:
    """A message's claim to its unique key; if the key is another's, the call's result becomes that one's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._holder: str | None = None
        self._result: Callable[[], Any] = lambda: None
        _sent.set(self)

    def refused(self, holder: str) -> None:
        """Point the result at the message that has the key."""
        self._holder = holder
        self._turn()

    def bind(self, result: Any) -> None:
        """Name the result, which is made after the message."""
        self._result = weakref.ref(result)
        self._turn()

    def _turn(self) -> None:
        result = self._result()
        if result is not None and self._holder is not None:
            result.id = self._holder


@contextmanager
def ticket_of_call() -> Iterator[Callable[[Any], None]]:
    """Yield what binds the result of the call that is made in this block to its ticket."""
    token = _sent.set(None)

    def bind(result: Any) -> None:
        ticket = _sent.get()
        if ticket is not None:
            ticket.bind(result)

    try:
        yield bind
    finally:
        _sent.reset(token)


def take(app: Any, name: str, message: Any, options: dict[str, Any], *, straight: bool = False) -> Keys:
    """Take our options out of the call's, and return the keys that its message holds, which are in its headers now.

    `straight` to the broker, without the outbox, nothing can hold a key: that is a `ConfigurationError`. A message of
    the running task's own (its retry, its replacement) goes on with the keys that it has.
    """
    unique, given_unique, given_order = (options.pop(option, None) for option in _OPTIONS)
    task = app._tasks.get(name) if isinstance(app._tasks, dict) else None
    rule, order = getattr(task, "unique", None), getattr(task, "key", None)
    headers = options.get("headers") or {}
    args, kwargs, embed = _body(message)
    if embed.get("chain"):
        _refuse_in_chain(app, embed["chain"])
    if keys.UNIQUE in headers or keys.ORDER in headers:
        return keys.read_headers(headers)
    if rule is order is unique is given_unique is given_order is None:
        return Keys()
    if unique is not None:
        rule = keys.read_unique(name, unique)
    elif given_unique is not None and rule is None:
        rule = keys.Unique()
    found = Keys(order=_ordering_key(name, order, given_order, args, kwargs))
    if rule is not None and not is_own(message.properties["correlation_id"]):
        key = _unique_key(name, getattr(task, "run", None), rule, given_unique, args, kwargs)
        found = found._replace(unique=key, until=rule.until, seconds=rule.seconds)
    if found and straight:
        raise ConfigurationError(
            f"{name} goes straight to its broker, so nothing keeps it unique or in order: leave unique, unique_key and "
            "key out, or take delivery='at_least_once'."
        )
    if found.unique is not None:
        _refuse_part(name, message, embed)
    if found:
        options["headers"] = {**headers, **found.headers()}
    return found


def _unique_key(name: str, run: Any, rule: keys.Unique, given: Any, args: Any, kwargs: Any) -> str | None:
    """Return the unique key of a call of the task `name`: one that was given, or by the rule; None for none."""
    if given is not None:
        found: Any = given
    elif rule.by == "task":
        return name
    elif rule.by == "arguments":
        found = _digest(name, run, args, kwargs)
    else:
        found = rule.by(*args, **kwargs)  # type: ignore[operator]
    return None if found is None else f"{name}:{keys.check_key(f'{name}: the unique key', found)}"


def _ordering_key(name: str, rule: Any, given: Any, args: Any, kwargs: Any) -> str | None:
    """Return the ordering key of a call: one that was given, or the task's own; None for none."""
    found = given if given is not None else rule(*args, **kwargs) if callable(rule) else rule
    return None if found is None else keys.check_key(f"{name}: key", found)


def _digest(name: str, run: Any, args: Any, kwargs: Any) -> str:
    """Return what is equal for equal arguments, however they are passed."""
    try:
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = (), bound.arguments
    except (TypeError, ValueError):
        # They don't fit, and the task will say so.
        pass
    try:
        text = dumps([args, kwargs], sort_keys=True)
    except Exception as error:
        raise ConfigurationError(
            f"{name}: unique by arguments needs arguments that JSON can hold ({type(error).__name__}): give a function "
            "of them, such as unique={'by': lambda order: order.id}."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def is_own(task_id: str) -> bool:
    """Return whether the message is the running task's own: its retry, or what replaces it."""
    return bool(current_task) and current_task.request.id == task_id and not current_task.request.called_directly


def _body(message: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the arguments, and what follows the task, in either of Celery's protocols."""
    if isinstance(message.body, dict):
        return message.body["args"], message.body["kwargs"], message.body
    args, kwargs, embed = message.body
    return args, kwargs, embed


def _refuse_part(name: str, message: Any, embed: dict[str, Any]) -> None:
    """Refuse a message that would take along what waits for it, if it were not sent."""
    followed = embed.get("chord") or embed.get("chain") or embed.get("callbacks")
    if followed or message.headers.get("group") or embed.get("taskset"):
        raise ConfigurationError(
            f"{name} is unique, and part of a chain, a group or a chord, or has a link: if its key were another's, "
            "what follows it would never run. Send it by itself or as a chain's last step, or with unique=False."
        )


def _refuse_in_chain(app: Any, steps: Any) -> None:
    """Refuse a chain at its first step if a later one would be refused; Celery has the last step first."""
    for step in steps[1:]:
        task = app._tasks.get(step.get("task")) if isinstance(app._tasks, dict) else None
        if getattr(task, "unique", None) is not None and (step.get("options") or {}).get("unique") is not False:
            raise ConfigurationError(
                f"{step['task']} is unique, and not the last step of its chain: if its key were another's, the steps "
                "after it would never run. Take it with .set(unique=False)."
            )
