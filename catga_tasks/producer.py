"""Where Celery's sender meets the outbox.

Every message of Celery passes `AMQP.send_task_message`, which ends in a producer's `publish`. The producer here
lets kombu prepare the message as always and keeps it as an envelope instead of sending it.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from celery.app.amqp import AMQP, task_message
from celery.utils.time import maybe_iso8601
from kombu import Connection, Exchange, Producer
from kombu.exceptions import OperationalError
from kombu.utils.json import JSONEncoder

from catga_tasks import claiming, deferral, telemetry
from catga_tasks.brokers import generic
from catga_tasks.envelope import DUE_AT, Envelope
from catga_tasks.errors import OutboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from catga_tasks.app import Catga
    from catga_tasks.keys import Keys

#: kombu's JSON, without making an encoder for each message.
_encode = JSONEncoder().encode


class OutboxOperationalError(OutboxUnavailable, OperationalError):
    """The outbox's database is out, for callers that know Celery's `OperationalError`."""


class OutboxProducer(Producer):
    """A producer that returns each message as kombu prepared it, and sends nothing."""

    def __init__(self, connection: Callable[[], Connection]) -> None:
        super().__init__(None, auto_declare=False)
        self._lazy = connection

    @property
    def connection(self) -> Connection:
        """The broker's connection, never opened: Celery asks it which errors may be recovered from."""
        return self._lazy()

    def revive(self, channel: object) -> None:
        """There is nothing to revive."""

    def _publish(
        self,
        body: Any,
        priority: Any,
        content_type: str,
        content_encoding: str,
        headers: Any,
        properties: Any,
        routing_key: str,
        _mandatory: Any,
        _immediate: Any,
        exchange: str,
        declare: Any,
        *_timeouts: Any,
    ) -> dict[str, Any]:
        return {
            "body": body.encode(content_encoding) if isinstance(body, str) else bytes(body),
            "priority": priority or None,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "headers": headers,
            "properties": properties,
            "routing_key": routing_key,
            "exchange": exchange,
            "declare": declare,
        }


class _Recording:
    """The producer of one message: hands what `OutboxProducer` prepared to `keep`."""

    def __init__(self, producer: OutboxProducer, keep: Callable[[dict[str, Any]], None]) -> None:
        self._producer = producer
        self._keep = keep

    @property
    def connection(self) -> Connection:
        return self._producer.connection

    @property
    def serializer(self) -> Any:
        return self._producer.serializer

    def revive(self, channel: object) -> None:
        """There is nothing to revive."""

    def publish(self, body: Any, exchange: Any = None, **options: Any) -> None:
        name = exchange.name if isinstance(exchange, Exchange) else exchange
        if name == "celeryev":
            # The task-sent event: the relay sends it when the message is really published.
            return
        options["retry"] = False
        self._keep(self._producer.publish(body, exchange=exchange, **options))


class _Scheduled(task_message):
    """A message with its countdown beside the ETA that Celery computed by this machine's clock."""

    countdown: float | None = None


class OutboxAMQP(AMQP):
    """Celery's AMQP with the outbox at the end of its sender."""

    app: Catga

    def as_task_v2(self, task_id: str, name: str, args: Any = None, kwargs: Any = None, countdown: Any = None,
                   *rest: Any, **options: Any) -> Any:  # fmt: skip
        """Build the message as Celery does, and keep the countdown: the database's clock will count it."""
        message = super().as_task_v2(task_id, name, args, kwargs, countdown, *rest, **options)
        if not countdown:
            return message
        scheduled = _Scheduled(*message)
        scheduled.countdown = countdown
        return scheduled

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()
        app = self.app
        producer = app.outbox_producer

        def send_task_message(given: Any, name: str, message: Any, **options: Any) -> Any:
            riding = deferral.taken()
            broker = _broker(options)
            if broker:
                app.catga_settings.broker(broker)
            straight = app.bypasses_outbox(name, given)
            held = claiming.take(app, name, message, options, straight=straight)

            def keep(prepared: dict[str, Any]) -> None:
                if held:
                    # The broker must not drop it: a worker finds it expired, and lets its keys go.
                    prepared["properties"].pop("expiration", None)
                envelope = self.envelope(prepared, message, queue_name(options.get("queue")), riding)
                if broker or creation:
                    envelope = envelope._replace(broker=broker, creation=creation)
                app.enqueue([_holding(envelope, held) if held else envelope])

            with self._creation(name, options, broker, straight=straight) as creation:
                if not straight:
                    return send(_Recording(producer, keep), name, message, **options)
                started = time.perf_counter()
                with app.direct_producer(broker) if given is producer else nullcontext(given) as direct:
                    calls, backend = riding
                    if calls:
                        app.call_backend(_encode(calls))
                    if backend is not None:
                        backend.catga_on_task_call(direct, message.properties["correlation_id"])
                    answer = send(direct, name, message, **options)
                seconds = time.perf_counter() - started
                telemetry.record(telemetry.sending(app.messaging_system(broker), {_destination(options): 1}, seconds))
                if creation:
                    creation.end([message.properties["correlation_id"]])
                return answer

        return send_task_message

    def _creation(self, name: str, options: dict[str, Any], broker: str, *, straight: bool) -> Any:
        """Put the trace into the message's headers; return its creation, or None, as a context manager."""
        headers = options.get("headers") or {}
        if telemetry.READY_AT in headers or telemetry.MESSAGE_ID in headers:
            # A retry has its message's own headers, but another row.
            own = (telemetry.READY_AT, telemetry.MESSAGE_ID)
            headers = options["headers"] = {name: value for name, value in headers.items() if name not in own}
        if telemetry.tracer() is None:
            return nullcontext()
        from catga_tasks import tracing

        creation = tracing.create(
            "send" if straight else "create",
            name,
            _destination(options),
            system=self.app.messaging_system(broker),
            carried=headers,
            target=None if straight else self.app.outbox.current_target(),
        )
        if creation is None:
            return nullcontext()
        options["headers"] = {**headers, **creation.headers}
        return creation

    def envelope(self, prepared: dict[str, Any], message: Any, queue: str | None, riding: tuple[Any, Any]) -> Envelope:
        """Turn a prepared message into an envelope, with what `deferral.taken` gave."""
        headers, properties = prepared["headers"], prepared["properties"]
        expiration = properties.get("expiration")
        queue = queue or prepared["routing_key"]
        countdown = getattr(message, "countdown", None)
        eta = None if countdown else _eta(headers.get("eta"))
        calls, backend = riding
        task_id = headers.get("id") or properties["correlation_id"]
        task = headers.get("task") or message.body["task"]
        if self.app.asks_inbox(task):
            # Not before it is due: that is when its life on brokers and workers begins.
            due = time.time() + (countdown or 0) if eta is None else eta.timestamp()
            headers = {**headers, DUE_AT: round(due, 3)}
        return Envelope(
            task_id=task_id,
            task=task,
            queue=queue,
            exchange=prepared["exchange"],
            routing_key=prepared["routing_key"] or "",
            priority=prepared["priority"],
            content_type=prepared["content_type"],
            content_encoding=prepared["content_encoding"],
            headers=_encode(headers),
            properties=_encode(properties),
            body=prepared["body"],
            declarations=self._declarations(queue, prepared["declare"] or [], backend),
            backend_calls=_encode(calls) if calls else None,
            send_event=message.sent_event is not None,
            expiration=None if expiration is None else int(expiration) / 1000,
            delay=max(0.0, float(countdown or 0)),
            eta=eta,
        )

    def entities(self, queue: str) -> list[Any]:
        """Return what to declare for a queue of the application's own, also if this process hasn't met it yet.

        It is not added to the application's queues: a worker with a relay would consume from it after a reconnect.
        """
        found = self.queues.get(queue)
        if found is None and self.queues.create_missing:
            found = self.queues.new_missing(queue)
        return [found] if found is not None else []

    def _declarations(self, queue: str, declare: list[Any], backend: Any) -> str | None:
        if backend is not None:
            return generic.dump([*declare, backend.binding])
        own = self.queues.get(queue)
        if own is not None and (not declare or (len(declare) == 1 and declare[0] is own)):
            return None
        return generic.dump(declare)


def _broker(options: dict[str, Any]) -> str:
    """Take the option `broker` out of the options and return it; a retry goes where its message came from.

    Celery hands a message's own headers on to its retries.
    """
    chosen = options.pop("broker", None)
    headers = options.get("headers") or {}
    name = headers.get("catga_broker") or chosen
    if not name:
        return ""
    options["headers"] = {**headers, "catga_broker": name}
    return str(name)


def _destination(options: dict[str, Any]) -> str:
    return queue_name(options.get("queue")) or options.get("routing_key") or ""


def _holding(envelope: Envelope, held: Keys) -> Envelope:
    claim = claiming.Ticket(held.seconds) if held.fresh and held.unique is not None else None
    return envelope._replace(unique_key=held.unique, ordering_key=held.order, claim=claim, resumed=not held.fresh)


def queue_name(queue: Any) -> str | None:
    """Return the name of a queue given by name or as an object."""
    return queue if queue is None or isinstance(queue, str) else str(queue.name)


def _eta(value: Any) -> Any:
    return maybe_iso8601(value) if value else None
