"""How do messages reach their tasks without a broker and without a worker, in the process of a test?

The broker is kombu's in memory, the worker Celery's own consumer, strategies, requests and tracers, with a pool that
runs each task at once: acknowledgements, retries, canvas and deliveries are the real ones.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import _state, signals, states
from celery.app import trace
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.concurrency.base import BasePool, apply_target
from celery.exceptions import InvalidTaskError, NotRegistered, TaskRevokedError
from celery.utils.imports import symbol_by_name
from celery.utils.objects import Bunch
from celery.worker import state as worker_state
from kombu.common import QoS
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.transport import memory
from kombu.transport.virtual import BrokerState

from catga_tasks import deferral

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kombu import Connection

    from catga_tasks.app import Catga

URL = "memory://"
#: What an application keeps of its connections to its broker.
_CACHED = ("_idle_connection", "_relays_backend", "_pool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message that was handed to a worker, and what became of it."""

    #: The task's name.
    task: str
    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: Celery's: SUCCESS, FAILURE, RETRY, REJECTED, IGNORED or REVOKED.
    state: str
    #: What the task returned.
    result: Any = None
    #: What the task raised; Celery's own `Retry`, `Reject` or `Ignore` too.
    error: BaseException | None = None
    #: Whether the task's code ran: not for a duplicate that the inbox suppressed.
    ran: bool = True


class Broker:
    """An application's broker in memory, whatever its URLs say; its named brokers are the same one."""

    def __init__(self, app: Catga) -> None:
        self._app = app
        self._transport = _transport_of(app)
        self.purge()

    def connect(self, _url: object = None, *_args: object, **options: Any) -> Connection:
        """Return a connection, in the place of `Celery._connection`."""
        kept = {name: options[name] for name in ("heartbeat", "connect_timeout") if options.get(name) is not None}
        return self._app.amqp.Connection(URL, transport=self._transport, **kept)

    def purge(self) -> None:
        """Drop all messages; queues and their bindings stay, for connections remember that they declared them."""
        for queue in self._transport.Channel.queues.values():
            queue.queue.clear()

    def queues(self) -> list[str]:
        """Return the names of the queues that aren't empty."""
        return [name for name, queue in self._transport.Channel.queues.items() if queue.qsize()]

    def waiting(self) -> list[tuple[str, Message]]:
        """Return the messages that no worker has taken yet, each after its queue's name."""
        with self.connect() as connection:
            channel = connection.default_channel
            return [
                (name, channel.Message(payload, channel))
                for name, queue in self._transport.Channel.queues.items()
                for payload in list(queue.queue)
            ]


class _Transport(memory.Transport):
    """kombu's, whose queues every application of the process shares; each of ours has a subclass of its own."""

    can_parse_url = True

    def as_uri(self, _uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: ARG002, FBT001, FBT002 - as kombu has it
        return URL


_transports: WeakKeyDictionary[Any, type[Any]] = WeakKeyDictionary()


def _transport_of(app: Catga) -> type[Any]:
    found = _transports.get(app)
    if found is None:
        channel = type("Channel", (memory.Channel,), {"queues": {}})
        found = type("Transport", (_Transport,), {"Channel": channel, "global_state": BrokerState()})
        _transports[app] = found
    return found


@contextmanager
def in_memory(app: Catga) -> Iterator[Broker]:
    """Give the application a broker in memory, and results in memory too if it keeps any outside the transaction.

    Everything is as before when the block ends.
    """
    app.finalize()
    broker = Broker(app)
    former = app.backend
    saved = {name: app.__dict__.pop(name) for name in _CACHED if name in app.__dict__}
    producers, app.amqp._producer_pool = app.amqp._producer_pool, None
    results = app._backend_cache
    app.__dict__["_connection"] = broker.connect
    try:
        if not isinstance(former, DisabledBackend) and not getattr(former, "commits_with_task", False):
            app._backend_cache = CacheBackend(app=app, url=URL)
            deferral.defer(app._backend_cache)
            app.__dict__["_relays_backend"] = app._backend_cache
        yield broker
    finally:
        app._backend_cache = results
        app.amqp._producer_pool = producers
        for name in ("_connection", *_CACHED):
            app.__dict__.pop(name, None)
        app.__dict__.update(saved)
        broker.purge()


class _Timer:
    """Keeps what a worker's timer would call later: messages with an ETA that didn't wait in the outbox."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Callable[..., Any], tuple[Any, ...]]] = []

    def call_at(self, moment: float, call: Callable[..., Any], args: tuple[Any, ...] = (), **_: Any) -> None:
        self.entries.append((moment, call, args))


class _Pool(BasePool):
    """Runs each task at once, in the thread that delivers it; what isn't an `Exception` goes on to the test."""

    def __init__(self, tracer: Callable[..., Any], **options: Any) -> None:
        super().__init__(**options)
        self._tracer = tracer

    def on_apply(self, _target: Any, args: Any = (), kwargs: Any = None, **options: Any) -> None:
        apply_target(self._tracer, args, kwargs, propagate=BaseException, **options)


class Worker:
    """Takes messages from the broker in memory and runs their tasks, as `celery worker` does."""

    def __init__(self, app: Catga, broker: Broker) -> None:
        self._app = app
        self._broker = broker
        self._connection = broker.connect()
        self._channel = self._connection.default_channel
        self._pool = _Pool(self._trace, app=app)
        self._timer = _Timer()
        self._accept = prepare_accept_content(app.conf.accept_content)
        self._answer: Any = None
        self._ran: set[str] = set()
        self._consumer = self._consume()
        self._receive = self._consumer.create_task_handler()

    @classmethod
    @contextmanager
    def running(cls, app: Catga, broker: Broker) -> Iterator[Worker]:
        """Yield a worker; its application is the current one, and its tasks are set up as a worker's."""
        before = getattr(_state._tls, "current_app", None)
        trace._install_stack_protection()
        app.set_current()
        worker = cls(app, broker)
        signals.task_prerun.connect(worker._note)
        try:
            yield worker
        finally:
            signals.task_prerun.disconnect(worker._note)
            worker._stop()
            trace.reset_worker_optimizations(app)
            _state._set_current_app(before)

    def take(self, *, duplicate: bool = False) -> list[Delivery]:
        """Deliver the next message, with `duplicate` a second time at once; an empty list if there is none to run.

        A message whose ETA hasn't come is held; see `take_held`.
        """
        for queue in self._broker.queues():
            message = self._channel.basic_get(queue)
            messages = [message, self._copy(message)] if duplicate else [message]
            found = [delivery for each in messages if (delivery := self._deliver(each, self._receive, each))]
            if found:
                return found
        return []

    def take_held(self) -> list[Delivery]:
        """Deliver the message with the next ETA of those that are held."""
        if not self._timer.entries:
            return []
        self._timer.entries.sort(key=lambda entry: entry[0])
        _, call, args = self._timer.entries.pop(0)
        found = self._deliver(args[0].message, call, *args)
        return [] if found is None else [found]

    def _copy(self, message: Any) -> Any:
        """Return the message as the broker sends it once more to a worker that has lost it."""
        payload = copy.deepcopy(message._raw)
        payload["properties"]["delivery_tag"] = f"{message.delivery_tag}-again"
        payload["properties"]["delivery_info"]["redelivered"] = True
        again = self._channel.Message(payload, self._channel)
        self._channel.qos.append(again, again.delivery_tag)
        return again

    def _deliver(self, message: Any, act: Callable[..., Any], *args: Any) -> Delivery | None:
        message.accept = self._accept
        held = len(self._timer.entries)
        self._answer = None
        self._ran.clear()
        act(*args)
        self._consumer.perform_pending_operations()
        return self._delivery(message) if held >= len(self._timer.entries) else None

    def _delivery(self, message: Any) -> Delivery:
        name, task_id, args, kwargs = contents(message, self._accept)
        common: dict[str, Any] = {"task": name, "id": task_id, "args": args, "kwargs": kwargs}
        common["ran"] = task_id in self._ran
        if self._answer is not None:
            value, information = self._answer[:2]
            if information is None:
                return Delivery(**common, state=states.SUCCESS, result=value)
            return Delivery(**common, state=information.state, error=information.retval)
        if task_id in worker_state.revoked:
            return Delivery(**common, state=states.REVOKED)
        error: Exception = NotRegistered(name)
        if name in self._app.tasks:
            error = InvalidTaskError(f"Celery refused the message of {name}: see its log.")
        return Delivery(**common, state=states.FAILURE, error=error)

    def _trace(self, name: str, task_id: str, request: dict[str, Any], body: Any, content_type: Any,
               content_encoding: Any) -> Any:  # fmt: skip
        """Do what `celery.app.trace.trace_task_ret` does, and keep the tracer's answer: Celery makes a text of it."""
        if content_type:
            body = trace.loads_message(body, content_type, content_encoding, accept=self._accept)
        args, kwargs, embed = body
        hostname = self._consumer.hostname
        request.update({"args": args, "kwargs": kwargs, "hostname": hostname, "is_eager": False}, **embed or {})
        answer = trace.trace_task(self._app.tasks[name], task_id, args, kwargs, request, app=self._app)
        self._answer = answer
        value, information, seconds, text = answer
        return (1, value, seconds) if information else (0, text, seconds)

    def _handle(self, request: Any) -> None:
        with suppress(TaskRevokedError):
            request.execute_using_pool(self._pool)

    def _note(self, task_id: str, **_: Any) -> None:
        self._ran.add(task_id)

    def _consume(self) -> Any:
        """Return Celery's consumer, without the steps that hold it to a broker."""
        base = symbol_by_name(self._app.conf.worker_consumer)
        blueprint = type("Blueprint", (base.Blueprint,), {"default_steps": []})
        kind = type("Consumer", (base,), {"Blueprint": blueprint})
        consumer = kind(
            self._handle,
            app=self._app,
            pool=self._pool,
            timer=self._timer,
            controller=Bunch(state=worker_state, app=self._app),
            disable_rate_limits=True,
        )
        consumer.qos = QoS(lambda **_: None, 0)
        consumer.event_dispatcher = None
        consumer.update_strategies()
        return consumer

    def _stop(self) -> None:
        """Give back what is held, and forget how the tasks are traced: they may be changed before the next worker."""
        for _, _, args in self._timer.entries:
            args[0].reject(requeue=True)
        self._consumer.perform_pending_operations()
        self._connection.release()
        for task in self._app.tasks.values():
            task.__trace__ = None


def contents(message: Any, accept: set[str]) -> tuple[str, str, tuple[Any, ...], dict[str, Any]]:
    """Return a message's task, id, arguments and keyword arguments; without the arguments if they can't be decoded."""
    headers = message.headers or {}
    readable = Message(
        body=message.body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=headers,
        accept=accept,
    )
    try:
        body = readable.payload
    except Exception:  # noqa: BLE001 - whatever the serializer says: this is for reports, the worker says it itself
        body = ((), {}, {})
    if "task" not in headers and isinstance(body, dict):
        # Celery's first protocol has everything in the body.
        headers, body = body, (body.get("args", ()), body.get("kwargs", {}))
    return str(headers.get("task")), str(headers.get("id")), tuple(body[0]), dict(body[1])
