"""What becomes of a message that a worker can make no task of?

Celery logs it and discards it. A worker of ours keeps it in `catga_dead_letters`, where `outbox dead` shows and replays
it, and acknowledges it then. While the database is out the message goes back to its queue.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer.connection import Connection as ConnectionStep
from kombu import Connection
from kombu.utils.json import JSONEncoder
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import holds, keys, outbox
from catga_tasks.brokers.generic import describe
from catga_tasks.database import in_one_line, storable
from catga_tasks.envelope import Envelope
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kombu import Message

logger = logging.getLogger("catga_tasks")

#: A message that can't be kept now goes back after this many seconds.
PAUSE = 5.0
#: What Celery stumbles over when a header isn't what it should be: a name that is a list, no id, a strange time limit.
GARBAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: What stands for the name of a task that has none.
UNKNOWN = "unknown"
#: The greatest priority that a broker knows.
MAX_PRIORITY = 255
#: Properties that say how a message travelled; it may travel another way the next time.
_TRAVEL = frozenset((
    "application_headers", "body_encoding", "content_encoding", "content_type", "delivery_info", "delivery_tag",
    "expiration", "priority",
))  # fmt: skip


class Consumer(CeleryConsumer):
    """Celery's consumer, which loses no message that it doesn't understand. Without an outbox it is Celery's own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for step in self.steps:
            if isinstance(step, ConnectionStep):
                step.info = _broker_info

    def connect(self) -> Connection:
        """Connect; whatever arrives that is no message at all is kept too."""
        connection = super().connect()
        if self._has_outbox():
            connection.transport.on_garbage = self.keep_bytes
        return connection

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Message], None]:
        """Return what each message is handed to; garbage among its headers, which would end the worker, is kept."""
        handle = super().create_task_handler(*args, **options)

        def on_task_received(message: Message) -> None:
            try:
                handle(message)
            except GARBAGE as error:
                self.on_invalid_task(None, message, error)

        return on_task_received

    def on_unknown_message(self, _body: Any, message: Message) -> None:
        """Keep what isn't a task's message."""
        if self._keep(message, "It is no message of a task: it names none."):
            signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_invalid_task(self, _body: Any, message: Message, exc: Exception) -> None:
        """Keep a message whose parts don't make a task, or whose serializer isn't accepted."""
        if self._keep(message, f"It is no valid task: {describe(exc)}"):
            signals.task_rejected.send(sender=self, message=message, exc=exc)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Keep a message that can't be read."""
        self._keep(message, f"It can't be decoded: {describe(exc)}")

    def on_unknown_task(self, _body: Any, message: Message, exc: Exception) -> None:
        """Keep a message whose task isn't registered here; whoever waits for its result is told, as Celery does."""
        source = message.headers if "task" in message.headers else message.payload
        name, number = source["task"], source.get("id")
        if not self._keep(message, f"The task {name} isn't registered with this worker: import its module."):
            return
        request = Bunch(
            name=name,
            chord=None,
            root_id=source.get("root_id"),
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            errbacks=None,
        )
        try:
            self.app.backend.mark_as_failure(number, NotRegistered(name), request=request)
        except Exception as error:  # noqa: BLE001 - a result is worth no worker
            logger.warning("The result backend wasn't told that %s isn't registered: %s", name, type(error).__name__)
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=number, exception=f"NotRegistered({name!r})")
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=number)

    def keep_bytes(self, queue: str, body: bytes, reason: str) -> bool:
        """Keep what a transport couldn't decode; return False if the database is out."""
        envelope = Envelope(
            task_id="",
            task=UNKNOWN,
            queue=queue,
            exchange="",
            routing_key=queue,
            priority=None,
            content_type="application/data",
            content_encoding="binary",
            headers="{}",
            properties="{}",
            body=bytes(body),
            broker=self._broker({}),
        )
        return self._store(envelope, reason)

    def _keep(self, message: Message, reason: str) -> bool:
        """Move the message to the dead letters; return False if it goes back because the database is out."""
        if not self._has_outbox():
            message.reject_log_error(logger, self.connection_errors)
            return True
        if self._store(self._envelope(message), reason):
            # Not by the message itself: one on NATS that can't be read goes to the dead letters there.
            message.channel.basic_ack(message.delivery_tag)
            return True
        self.timer.call_after(PAUSE, message.reject_log_error, (logger, self.connection_errors, True))
        return False

    def _store(self, envelope: Envelope, reason: str) -> bool:
        reason = storable(reason)
        try:
            with self.app.outbox.engine.begin() as connection:
                number = outbox.add_dead(connection, envelope, error=reason)
                passed_on = holds.let_go(
                    connection,
                    envelope.task_id,
                    unique_key=envelope.unique_key,
                    ordering_key=envelope.ordering_key,
                )
            if passed_on:
                self.app.outbox.wake()
        except SQLAlchemyError as error:
            logger.error(  # noqa: TRY400 - one line
                "A message of queue %s can't be kept as a dead letter and goes back in %g s: %s (%s)",
                envelope.queue, PAUSE, reason, in_one_line(error),
            )  # fmt: skip
            return False
        logger.error("A message of queue %s is kept as dead letter %d: %s", envelope.queue, number, reason)
        return True

    def _envelope(self, message: Message) -> Envelope:
        headers, info = dict(message.headers), message.delivery_info or {}
        if not message.errors:
            # kombu has unpacked the body.
            headers.pop("compression", None)
        properties = {name: value for name, value in message.properties.items() if name not in _TRAVEL}
        priority = message.properties.get("priority")
        held = keys.read_headers(headers)
        exchange, routing_key = storable(info.get("exchange") or ""), storable(info.get("routing_key") or "")
        return Envelope(
            task_id=storable(headers.get("id") or message.properties.get("correlation_id") or ""),
            task=storable(headers.get("task") or UNKNOWN),
            queue=self._queue(exchange, routing_key),
            exchange=exchange,
            routing_key=routing_key,
            priority=priority if isinstance(priority, int) and 0 < priority <= MAX_PRIORITY else None,
            content_type=storable(message.content_type or "application/data"),
            content_encoding=storable(message.content_encoding or "binary"),
            headers=_json(headers),
            properties=_json(properties),
            body=_bytes(message.body),
            broker=self._broker(headers),
            unique_key=held.unique,
            ordering_key=held.order,
        )

    def _queue(self, exchange: str, routing_key: str) -> str:
        """Return the queue that a message came from, as far as its address tells."""
        for queue in self.app.amqp.queues.consume_from.values():
            if exchange and (queue.exchange.name, queue.routing_key) == (exchange, routing_key):
                return str(queue.name)
        return routing_key

    def _broker(self, headers: dict[str, Any]) -> str:
        """Return the name of the broker that this worker takes messages from; empty for the application's own."""
        for name in (headers.get("catga_broker"), self.app.conf.broker_read_url):
            if isinstance(name, str) and name in self.app.catga_settings.outbox_brokers:
                return name
        return ""

    def _has_outbox(self) -> bool:
        try:
            return self.app.outbox is not None
        except ConfigurationError:
            return False


def _broker_info(consumer: Any) -> dict[str, Any]:
    """Tell `inspect stats` of the broker; Celery masks no token of a URL, and fails at one of several servers."""
    if not consumer.connection:
        return {"broker": "N/A"}
    found = consumer.connection.info()
    found.pop("password", None)
    if found.get("alternates"):
        found["alternates"] = [Connection(url).as_uri() for url in found["alternates"]]
    return {"broker": found}


def _json(value: dict[str, Any]) -> str:
    try:
        return str(JSONEncoder().encode(value))
    except (TypeError, ValueError):
        return json.dumps(value, default=repr, skipkeys=True)


def _bytes(body: Any) -> bytes:
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body or b"")
