"""A kombu channel on NATS: queues are declared, messages published, arrivals delivered and settled."""

from __future__ import annotations

import itertools
import json
from queue import Empty
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ChannelError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.json import dumps, loads

from catga_tasks.brokers.batches import PublishBatch
from catga_tasks.brokers.bindings import subjects_of, wanted, wire_subject
from catga_tasks.brokers.intake import Intake
from catga_tasks.brokers.nats_qos import Message, QoS
from catga_tasks.brokers.pulling import times_delivered
from catga_tasks.brokers.taps import Tap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.nats import Transport

logger = get_logger("catga_tasks.nats")

#: A queue that isn't durable is stored all the same if it may wait this long for its reader (x-expires): replies of
#: `rpc://`. Celery's remote control and events expire within a minute.
KEPT_MILLISECONDS = 300_000
#: Gives a message back, to be delivered again after 5 seconds.
LATER = b'-NAK {"delay": 5000000000}'


class Unsure(str):
    """The id of a message whose publish failed, and is tried again. No message that came from somewhere has one."""

    __slots__ = ()


class Channel(virtual.Channel):
    """A channel. Its consumers pull; what has arrived is delivered by the transport."""

    QoS = QoS
    Message = Message
    supports_fanout = True
    supports_batch_publish = True
    do_restore = False

    def __init__(self, connection: Transport, **options: Any) -> None:
        super().__init__(connection, **options)
        self.nats = connection.nats
        self.settings = connection.settings
        self.intake = Intake(self)
        self._without_ack: set[str] = set()
        self._auto_delete: set[str] = set()
        self._deliveries: dict[str, tuple[str, int, str]] = {}
        self._numbers = itertools.count(1)

    # Queues

    def prepare_queue_arguments(self, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Return a queue's arguments by AMQP's names: kombu gives some by its own."""
        return dict(to_rabbitmq_queue_arguments(arguments, **options))

    def _new_queue(self, queue: str, *, durable: bool = True, exclusive: bool = False, auto_delete: bool = False,
                   arguments: dict[str, Any] | None = None, **_options: Any) -> None:  # fmt: skip
        arguments = arguments or {}
        expires = arguments.get("x-expires", 0)
        kept = expires >= KEPT_MILLISECONDS or (durable and (not auto_delete or expires))
        if kept and not exclusive:
            if queue not in self.connection.taps:
                self.nats.call(self.nats.streams.ensure(queue, arguments, durable=durable))
                if auto_delete:
                    self._auto_delete.add(queue)
            return
        if queue not in self.connection.taps:
            self.connection.taps[queue] = Tap(self.nats)
            self.intake.changed()
        self.connection.taps[queue].listen([wire_subject(self.settings, "", queue)])

    def exchange_declare(self, exchange: str | None = None, type: str = "direct", **options: Any) -> None:  # noqa: A002 - kombu's signature
        """Declare an exchange of a type that there is."""
        if (type or "direct") not in self.exchange_types:
            kinds = ", ".join(sorted(self.exchange_types))
            message = f"NOT_IMPLEMENTED - nats:// has exchanges of the types {kinds}, not {type}"
            raise ChannelError(message, (40, 10), "Channel.exchange_declare", "540")
        super().exchange_declare(exchange, type, **options)

    def exchange_delete(self, exchange: str, **_options: Any) -> None:
        """Delete the exchange and its bindings. Its queues stay, as with AMQP."""
        for _, routing_key, queue in self.connection.bindings.of(exchange):
            self.queue_unbind(queue, exchange, routing_key)
        self.state.exchanges.pop(exchange, None)

    def queue_bind(self, queue: str, exchange: str | None = None, routing_key: str = "",
                   arguments: dict[str, Any] | None = None, **_options: Any) -> None:  # fmt: skip
        """Bind the queue. kombu would take a binding that failed, or that another process has deleted, for there."""
        exchange = exchange or "amq.direct"
        self._queue_bind(exchange, *self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments))
        self.state.binding_declare(queue, exchange, routing_key, arguments)

    def _queue_bind(self, exchange: str, routing_key: str, _pattern: Any, queue: str) -> None:
        kind = self.typeof(exchange).type
        tap = self.connection.taps.get(queue)
        if tap is not None:
            tap.bind(exchange, kind, routing_key or "")
            tap.listen(subjects_of(self.settings, exchange, kind, routing_key or ""))
            return
        self.connection.bindings.add(exchange, kind, routing_key or "", queue)

    def queue_unbind(self, queue: str, exchange: str = "", routing_key: str = "", *args: Any, **options: Any) -> None:
        """Unbind the queue."""
        super().queue_unbind(queue, exchange, routing_key, *args, **options)
        self.connection.bindings.remove(exchange, routing_key, queue)

    def queue_delete(self, queue: str, _if_unused: bool = False, if_empty: bool = False, **_options: Any) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Delete the queue, its messages and its bindings."""
        if if_empty and self._size(queue):
            return
        self._delete(queue)
        self.connection.bindings.forget(queue)
        self.state.queue_bindings_delete(queue)

    def _has_queue(self, queue: str, **_options: Any) -> bool:
        return queue in self.connection.taps or bool(self.nats.call(self.nats.streams.exists(queue)))

    def _size(self, queue: str) -> int:
        tap = self.connection.taps.get(queue)
        return len(tap.messages) if tap else int(self.nats.call(self.nats.streams.size(queue)))

    def counts(self, queue: str) -> dict[str, int]:
        """Return a queue's messages: all, those that are ready, those that workers hold. By RabbitMQ's names."""
        ready, held = self.nats.call(self.nats.streams.counts(queue))
        return {"messages": ready + held, "messages_ready": ready, "messages_unacknowledged": held}

    def _purge(self, queue: str) -> int:
        tap = self.connection.taps.get(queue)
        if tap is None:
            return int(self.nats.call(self.nats.streams.purge(queue)))
        count = len(tap.messages)
        tap.messages.clear()
        return count

    def _delete(self, queue: str, *_args: Any, **_options: Any) -> None:
        tap = self.connection.taps.pop(queue, None)
        self.intake.changed()
        if tap is not None:
            tap.stop()
        else:
            self.nats.call(self.nats.streams.delete(queue))

    def get_table(self, exchange: str) -> list[tuple[str, Any, str]]:
        """Return the stored queues that are bound to the exchange, by whichever process."""
        return [
            self.exchange_types[kind].prepare_bind(queue, exchange, routing_key, None)
            for kind, routing_key, queue in self.connection.bindings.of(exchange)
        ]

    # Publishing

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **_options: Any) -> None:
        """Publish to the queue, or to whatever is bound to the exchange; return when it is stored."""
        entries, broadcasts = self.routes(message, exchange, routing_key)
        if entries:
            try:
                self.send(entries, raising=True)
            except Exception:
                # It may be stored all the same. kombu tries again with these very properties.
                message["properties"]["delivery_tag"] = Unsure(message["properties"]["delivery_tag"])
                raise
        for subject, body in broadcasts:
            self.broadcast(subject, body)

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """Return a batch, for kombu's `Producer.batch`."""
        return PublishBatch(self, max_size)

    def routes(
        self, message: dict[str, Any], exchange: str, routing_key: str
    ) -> tuple[list[tuple[str, int, bytes, str]], list[tuple[str, bytes]]]:
        """Return where a message goes: (queue, step, body, id) for stored queues, (subject, body) for passing ones."""
        identity = message["properties"].get("delivery_tag")
        self._inplace_augment_message(message, exchange, routing_key)
        if isinstance(identity, Unsure):
            message["properties"]["delivery_tag"] = str(identity)
        stored = self._routed(exchange, routing_key) if exchange else []
        if not exchange and routing_key not in self.connection.taps and self.connection.stored(routing_key):
            stored = [routing_key]
        body = dumps(message).encode()
        step = self._step(message)
        entries = [(queue, step, body, message["properties"]["delivery_tag"]) for queue in stored]
        passing = bool(exchange) or not stored
        return entries, [(wire_subject(self.settings, exchange, routing_key), body)] if passing else []

    def send(self, entries: Sequence[tuple[str, int, bytes, str]], *, raising: bool = False) -> list[Exception | None]:
        """Publish (queue, step, body, id) each; return each one's error or None."""
        found: list[Exception | None] = self.nats.call(
            self.nats.publishing.publish(entries), self.settings.publish_timeout + self.settings.connect_timeout
        )
        error = next((each for each in found if each is not None), None)
        if raising and error is not None:
            raise error
        return found

    def _put(self, queue: str, message: dict[str, Any], **_options: Any) -> None:
        self.basic_publish(message, "", queue)

    def broadcast(self, subject: str, body: bytes) -> None:
        """Publish to whoever listens now."""
        self.nats.call(self.nats.nats.publish(subject, body))

    def _routed(self, exchange: str, routing_key: str) -> list[str]:
        bound = self.connection.bindings.of(exchange)
        return list(dict.fromkeys(queue for kind, pattern, queue in bound if wanted(kind, pattern, routing_key)))

    def _step(self, message: dict[str, Any]) -> int:
        return self.settings.step(message["properties"].get("priority"))

    # Consuming

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> None:  # noqa: FBT001 - kombu's signature
        """Consume from the queue."""
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        if queue not in self.connection.taps:
            self.intake.start(queue)
        self.intake.changed()
        self.intake.top_up()
        self.nats.bell.ring()

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop consuming; what has arrived and nobody has seen goes back."""
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is None or queue in self._active_queues:
            return
        self.intake.changed()
        self.intake.stop(queue)
        if queue in self._auto_delete:
            self._auto_delete.discard(queue)
            self.nats.call(self.nats.streams.delete(queue))

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Change the prefetch, also while running."""
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        self.intake.top_up()
        self.nats.bell.ring()

    def settle(self, delivery_tag: str, verb: bytes) -> None:
        """Tell the server what became of a delivery; for any thread."""
        reply, delivered, _ = self._deliveries.pop(delivery_tag, ("", 0, ""))
        self.intake.top_up()
        if reply:
            if verb == b"-NAK" and self.settings.backoff:
                wait = self.settings.backoff[min(delivered, len(self.settings.backoff)) - 1]
                verb = b"-NAK " + json.dumps({"delay": int(wait * 1e9)}).encode()
            self.nats.settling.settle(reply, verb)
        self.intake.go_on()

    def bury(self, delivery_tag: str) -> None:
        """Move a delivery to the dead letters: its consumer rejected it."""
        reply, _, queue = self._deliveries.pop(delivery_tag, ("", 0, ""))
        self.intake.top_up()
        if reply:
            self.nats.dead.reject(queue, reply)
        self.intake.go_on()

    def hand_over(self, queue: str, msg: Msg) -> None:
        """Deliver a message that has come."""
        payload = self._decoded(queue, msg)
        if payload is not None:
            self.connection._deliver(payload, queue)

    def _decoded(self, queue: str, msg: Msg) -> dict[str, Any] | None:
        """Return the message under a tag of this delivery; None for garbage, which is kept as a dead letter."""
        tag = str(next(self._numbers))
        try:
            # kombu's own decoder is needed for its own types alone, and takes four times as long.
            payload: dict[str, Any] = (loads if b'"__type__"' in msg.data else json.loads)(msg.data)
            properties = payload["properties"]
            properties["delivery_tag"] = tag
            delivered = times_delivered(msg.reply) if msg.reply else 1
            info = properties["delivery_info"]
            info["redelivered"] = delivered > 1
            "".join((info["exchange"], info["routing_key"]))
        except Exception as error:
            reason = f"It can't be decoded: it is no message of kombu's ({type(error).__name__})."
            logger.error("A message of queue %s: %s", queue, reason)  # noqa: TRY400 - one line
            if msg.reply:
                self._hand_on(queue, msg, reason)
            return None
        if not msg.reply:
            tap = self.connection.taps.get(queue)
            if tap is None or not tap.takes(info["exchange"], info["routing_key"]):
                return None
        else:
            self._deliveries[tag] = (msg.reply, delivered, queue)
            if queue in self._without_ack:
                self.settle(tag, b"+ACK")
        return payload

    def _hand_on(self, queue: str, msg: Msg, reason: str) -> None:
        """Give what is no message to who keeps it in a better place than a stream; back to its queue if that is out."""
        keep = self.connection.on_garbage
        if keep is None:
            self.nats.call(self.nats.dead.bury(queue, msg.reply, msg.data, reason))
        else:
            self.nats.settling.settle(msg.reply, b"+ACK" if keep(queue, msg.data, reason) else LATER)

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:  # noqa: ARG002 - kombu's signature
        tap = self.connection.taps.get(queue)
        msg = (tap.messages.popleft() if tap.messages else None) if tap else self.nats.call(self.nats.fetch(queue))
        payload = None if msg is None else self._decoded(queue, msg)
        if payload is None:
            raise Empty
        return payload

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """Take one message now, or None."""
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        return super().basic_get(queue, no_ack, **options)

    @property
    def active_queues(self) -> list[str]:
        """The queues that are consumed from, once for each consumer."""
        return list(self._active_queues)

    def after_reply_message_received(self, queue: str) -> None:
        """Keep the reply's queue: its owner cancels it."""

    def close(self) -> None:
        """Close the channel; what is held goes back."""
        if not self.closed:
            if not self.nats.broken and self.connection is not None:
                self.intake.close()
                self.qos.restore_unacked()
            super().close()
