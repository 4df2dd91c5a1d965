"""kombu's transport for NATS JetStream.

Features
========
* Type: Virtual
* Supports Direct: Yes
* Supports Topic: Yes
* Supports Fanout: Yes
* Supports Priority: Yes
* Supports TTL: No

Connection String
=================
``nats://HOST[:PORT][,HOST[:PORT]...]``, ``tls://...`` or ``nats+tls://...``, with ``USER:PASSWORD@`` or ``TOKEN@``.

Transport Options
=================
The fields of `catga_tasks.brokers.nats_settings.NatsSettings`.

A durable queue is a stream of its own with a durable pull consumer for each priority. A queue that is exclusive, not
durable, or deletes itself (Celery's remote control, events) is a plain subscription: its messages aren't stored.
"""

from __future__ import annotations

import itertools
import json
import select
import time
from collections import OrderedDict
from queue import Empty
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ChannelError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from kombu.utils.url import maybe_sanitize_url
from kombu.utils.uuid import uuid

from catga_tasks.brokers.bindings import Bindings, subjects_of, wanted, wire_subject
from catga_tasks.brokers.jetstream import Connection
from catga_tasks.brokers.nats_errors import Unreachable
from catga_tasks.brokers.nats_settings import NatsSettings
from catga_tasks.brokers.pulling import Buffer, Pull

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.msg import Msg

logger = get_logger("catga_tasks.nats")

#: Messages that are asked for when the prefetch has no limit.
WINDOW = 256
#: Messages that are delivered at most before other events of the hub get their turn.
BURST = 200


class QoS(virtual.QoS):
    """Acknowledgements: the server keeps what isn't settled, so nothing is restored by publishing it again."""

    restore_at_shutdown = False

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge."""
        super().ack(delivery_tag)
        self.channel.settle(delivery_tag, b"+ACK")

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """End the message, or give it back."""
        super().ack(delivery_tag)
        self.channel.settle(delivery_tag, b"-NAK" if requeue else b"+TERM")

    def restore_unacked(self) -> list[Any]:
        """Give back everything that is held."""
        self._flush()
        for delivery_tag in list(self._delivered):
            self.reject(delivery_tag, requeue=True)
        self._flush()
        return []


class Tap(Buffer):
    """A queue that isn't stored: what comes on its subjects while it is open."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._subscriptions: dict[str, Any] = {}
        self._bound: list[tuple[str, str, str]] = []

    def bind(self, exchange: str, kind: str, routing_key: str) -> None:
        """Take what this binding wants of the exchange's messages."""
        self._bound.append((exchange, kind, routing_key))

    def takes(self, exchange: str, routing_key: str) -> bool:
        """Return whether a message is for this queue: a subject may let more through."""
        if not exchange:
            return True
        bound = [(kind, pattern) for name, kind, pattern in self._bound if name == exchange]
        return any(wanted(kind, pattern, routing_key) for kind, pattern in bound)

    def listen(self, subjects: Sequence[str]) -> None:
        """Subscribe, and return when the server knows of it: a broadcast may follow at once."""
        fresh = [subject for subject in subjects if subject not in self._subscriptions]
        if fresh:
            self._connection.call(self._subscribe(fresh))

    def stop(self) -> None:
        """Unsubscribe."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        if subscriptions:
            self._connection.call(self._unsubscribe(list(subscriptions.values())))

    async def _subscribe(self, subjects: Sequence[str]) -> None:
        for subject in subjects:
            self._subscriptions[subject] = await self._connection.nats.subscribe(subject, cb=self._arrived)
        await self._connection.nats.flush()

    async def _unsubscribe(self, subscriptions: Sequence[Any]) -> None:
        for subscription in subscriptions:
            await subscription.unsubscribe()

    async def _arrived(self, msg: Msg) -> None:
        self.messages.append(msg)
        self._connection.signal()


class Channel(virtual.Channel):
    """A channel. Its consumers pull; what has arrived is delivered by the transport."""

    QoS = QoS
    supports_fanout = True
    do_restore = False

    def __init__(self, connection: Transport, **options: Any) -> None:
        super().__init__(connection, **options)
        self.nats = connection.nats
        self.settings = connection.settings
        self._pulls: OrderedDict[str, list[tuple[Pull, Buffer]]] = OrderedDict()
        self._without_ack: set[str] = set()
        self._deliveries: dict[str, tuple[str, int]] = {}
        self._numbers = itertools.count(1)

    # Queues

    def _new_queue(self, queue: str, *, durable: bool = True, exclusive: bool = False, auto_delete: bool = False,
                   arguments: dict[str, Any] | None = None, **_options: Any) -> None:  # fmt: skip
        stored = durable and not exclusive and (not auto_delete or "x-expires" in (arguments or {}))
        if stored:
            if queue not in self.connection.taps:
                self.nats.call(self.nats.ensure(queue))
            return
        if queue not in self.connection.taps:
            self.connection.taps[queue] = Tap(self.nats)
        self.connection.taps[queue].listen([wire_subject(self.settings, "", queue)])

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
        return queue in self.connection.taps or bool(self.nats.call(self.nats.exists(queue)))

    def _size(self, queue: str) -> int:
        tap = self.connection.taps.get(queue)
        return len(tap.messages) if tap else int(self.nats.call(self.nats.size(queue)))

    def _purge(self, queue: str) -> int:
        tap = self.connection.taps.get(queue)
        if tap is None:
            return int(self.nats.call(self.nats.purge(queue)))
        count = len(tap.messages)
        tap.messages.clear()
        return count

    def _delete(self, queue: str, *_args: Any, **_options: Any) -> None:
        tap = self.connection.taps.pop(queue, None)
        if tap is not None:
            tap.stop()
        else:
            self.nats.call(self.nats.delete(queue))

    def get_table(self, exchange: str) -> list[tuple[str, Any, str]]:
        """Return the stored queues that are bound to the exchange, by whichever process."""
        return [
            self.exchange_types[kind].prepare_bind(queue, exchange, routing_key, None)
            for kind, routing_key, queue in self.connection.bindings.of(exchange)
        ]

    # Publishing

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **options: Any) -> None:
        """Publish to the queue, or to whatever is bound to the exchange; return when it is stored."""
        self._inplace_augment_message(message, exchange, routing_key)
        if not exchange:
            self._put(routing_key, message, **options)
            return
        queues = self._routed(exchange, routing_key)
        if queues:
            self.publish_many([(queue, message) for queue in queues])
        self._broadcast(wire_subject(self.settings, exchange, routing_key), message)

    def publish_many(self, messages: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Publish to stored queues in one go; raise the first error."""
        entries = [(queue, self._step(message), dumps(message).encode(), uuid()) for queue, message in messages]
        self.send(entries, raising=True)

    def send(self, entries: Sequence[tuple[str, int, bytes, str]], *, raising: bool = False) -> list[Exception | None]:
        """Publish (queue, step, body, id) each; return each one's error or None."""
        found: list[Exception | None] = self.nats.call(
            self.nats.publish(entries), self.settings.publish_timeout + self.settings.connect_timeout
        )
        error = next((each for each in found if each is not None), None)
        if raising and error is not None:
            raise error
        return found

    def _put(self, queue: str, message: dict[str, Any], **_options: Any) -> None:
        if queue in self.connection.taps or not self.connection.stored(queue):
            self._broadcast(wire_subject(self.settings, "", queue), message)
            return
        self.publish_many([(queue, message)])

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **_options: Any) -> None:
        self._broadcast(wire_subject(self.settings, exchange, routing_key), message)

    def _broadcast(self, subject: str, message: dict[str, Any]) -> None:
        self.nats.call(self.nats.nats.publish(subject, dumps(message).encode()))

    def _routed(self, exchange: str, routing_key: str) -> list[str]:
        bound = self.connection.bindings.of(exchange)
        return list(dict.fromkeys(queue for kind, pattern, queue in bound if wanted(kind, pattern, routing_key)))

    def _step(self, message: dict[str, Any]) -> int:
        return step_of(self.settings, message["properties"].get("priority"))

    # Consuming

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> None:  # noqa: FBT001 - kombu's signature
        """Consume from the queue."""
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        if queue not in self.connection.taps and queue not in self._pulls:
            self.nats.call(self.nats.ensure(queue))
            pulls = []
            for rank, step in enumerate(self.settings.priority_steps):
                buffer = Buffer(rank)
                pull = Pull(self.nats, queue, step, buffer)
                self.nats.call(pull.start())
                pulls.append((pull, buffer))
            self._pulls[queue] = pulls
        self.top_up()
        self.nats.signal()

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop consuming; what has arrived and nobody has seen goes back."""
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is None or queue in self._active_queues:
            return
        for pull, _ in self._pulls.pop(queue, []):
            self.nats.call(pull.stop())

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Change the prefetch, also while running."""
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        self.top_up()
        self.nats.signal()

    def top_up(self) -> None:
        """Ask for as many messages as the prefetch has room for."""
        room = self.qos.can_consume_max_estimate()
        for pulls in self._pulls.values():
            for pull, _ in pulls:
                pull.want(WINDOW if room is None else room)

    def settle(self, delivery_tag: str, verb: bytes) -> None:
        """Tell the server what became of a delivery; for any thread."""
        reply, delivered = self._deliveries.pop(delivery_tag, ("", 0))
        if reply:
            if verb == b"-NAK" and self.settings.backoff:
                wait = self.settings.backoff[min(delivered, len(self.settings.backoff)) - 1]
                verb = b"-NAK " + json.dumps({"delay": int(wait * 1e9)}).encode()
            self.nats.settle(reply, verb)
        self.top_up()
        if any(buffer.messages for buffer in self._buffers()):
            self.nats.signal()

    def deliver(self, limit: int) -> int:
        """Deliver what has arrived, the first priority first, queues in turn; return how many messages."""
        count = 0
        while count < limit:
            waiting = [
                (buffer.rank, queue, buffer)
                for queue, buffers in self._by_queue()
                for buffer in buffers
                if buffer.messages
            ]
            if not waiting:
                break
            rank = min(each[0] for each in waiting)
            before = count
            for _, queue, buffer in [each for each in waiting if each[0] == rank]:
                if self.qos.can_consume() and count < limit:
                    count += self._hand_over(queue, buffer.messages.popleft())
            if count == before:
                break
        if count:
            self.top_up()
        return count

    def _buffers(self) -> list[Buffer]:
        return [buffer for _, buffers in self._by_queue() for buffer in buffers]

    def _by_queue(self) -> list[tuple[str, list[Buffer]]]:
        found = [(queue, [buffer for _, buffer in pulls]) for queue, pulls in self._pulls.items()]
        taps = self.connection.taps
        return found + [(queue, [taps[queue]]) for queue in dict.fromkeys(self._active_queues) if queue in taps]

    def _hand_over(self, queue: str, msg: Msg) -> int:
        payload = self._decoded(queue, msg)
        if payload is None:
            return 1
        self.connection._deliver(payload, queue)
        return 1

    def _decoded(self, queue: str, msg: Msg) -> dict[str, Any] | None:
        """Return the message under a tag of this delivery; None for garbage, which is kept as a dead letter."""
        tag = str(next(self._numbers))
        try:
            payload: dict[str, Any] = loads(msg.data)
            properties = payload["properties"]
            properties["delivery_tag"] = tag
            delivered = msg.metadata.num_delivered if msg.reply else 1
            properties["delivery_info"]["redelivered"] = delivered > 1
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.error("A message of queue %s can't be decoded (%s).", queue, type(error).__name__)  # noqa: TRY400 - one line
            if msg.reply:
                self.nats.call(self.nats.bury(queue, msg, "the message can't be decoded"))
            return None
        if not msg.reply:
            info = properties["delivery_info"]
            tap = self.connection.taps.get(queue)
            if tap is None or not tap.takes(info["exchange"], info["routing_key"]):
                return None
        else:
            self._deliveries[tag] = (msg.reply, delivered)
            if queue in self._without_ack:
                self.settle(tag, b"+ACK")
        return payload

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

    def after_reply_message_received(self, queue: str) -> None:
        """Keep the reply's queue: its owner cancels it."""

    def close(self) -> None:
        """Close the channel; what is held goes back."""
        if not self.closed:
            if not self.nats.broken and self.connection is not None:
                for queue in list(self._pulls):
                    for pull, _ in self._pulls.pop(queue):
                        self.nats.call(pull.stop())
                self.qos.restore_unacked()
            super().close()


class Transport(virtual.Transport):
    """NATS JetStream. kombu and Celery see every outage that lasts as an error that they recover from."""

    Channel = Channel
    default_port = 4222
    driver_type = "nats"
    driver_name = "nats-py"
    can_parse_url = True
    connection_errors = (*virtual.Transport.connection_errors, Unreachable)
    channel_errors = (*virtual.Transport.channel_errors, ChannelError)
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Any, **options: Any) -> None:
        self.settings = NatsSettings.read(client.transport_options)
        super().__init__(client, **options)
        self.taps: dict[str, Tap] = {}
        self.nats = Connection(*servers_of(client.hostname or ""), self.settings)
        self.bindings = Bindings(self.nats)
        self._stored: dict[str, float] = {}

    def driver_version(self) -> str:
        """Return nats-py's version."""
        from importlib.metadata import version

        return version("nats-py")

    def establish_connection(self) -> Any:
        """Connect within `connect_timeout`."""
        if self.nats.js is None:
            self.nats.connect()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        """Give back what is held, and disconnect."""
        try:
            super().close_connection(connection)
        except Unreachable:
            logger.debug("NATS was away when the connection was closed.")
        finally:
            self.nats.close()

    def verify_connection(self, _connection: Any) -> bool:
        """Return whether the server answers now."""
        return bool(self.nats.nats.is_connected) and self.nats.broken is None

    def stored(self, queue: str) -> bool:
        """Return whether the queue has a stream; asked anew after a while if it hasn't."""
        now = time.monotonic()
        if queue in self.nats._known or self._stored.get(queue, 0.0) > now:
            return queue in self.nats._known
        if self.nats.call(self.nats.exists(queue)):
            self.nats.call(self.nats.ensure(queue))
            return True
        self._stored[queue] = now + 1.0
        return False

    def drain_events(self, _connection: Any, timeout: float | None = None) -> None:
        """Deliver what has arrived, or wait for it; raise `socket.timeout` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._deliver_arrived():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            select.select([self.nats.fileno()], [], [], left)
            self.nats.quieten()

    def register_with_event_loop(self, _connection: Any, loop: Any) -> None:
        """Let kombu's hub watch for arrivals."""
        loop.add_reader(self.nats.fileno(), self.on_readable)
        self.nats.signal()

    def on_readable(self, *_arguments: Any) -> None:
        """Deliver what has arrived; the rest after the hub's other events."""
        self.nats.quieten()
        if self._deliver_arrived() >= BURST:
            self.nats.signal()

    def _deliver_arrived(self) -> int:
        if self.nats.broken is not None:
            raise self.nats.broken
        return sum(channel.deliver(BURST) for channel in list(self.channels))

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: FBT001, FBT002 - kombu's signature
        """Return the URL, its password or token masked."""
        if include_password:
            return uri
        scheme, _, rest = uri.partition("://")
        hosts = [
            f"{scheme}://{part}" if "@" not in part else maybe_sanitize_url(f"{scheme}://{_masked(part, mask)}", mask)
            for part in rest.split(",")
        ]
        return ",".join([hosts[0], *(host.partition("://")[2] for host in hosts[1:])])


def _masked(part: str, mask: str) -> str:
    access, _, host = part.rpartition("@")
    return f"{access.partition(':')[0] if ':' in access else mask}:{mask}@{host}" if ":" in access else f"{mask}@{host}"


def servers_of(url: str) -> tuple[list[str], bool]:
    """Return the cluster's servers and whether TLS is wanted."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "nats", url
    hosts = [part.strip().rstrip("/") for part in rest.split(",") if part.strip()]
    return [f"nats://{host}" for host in hosts or ["localhost"]], scheme == "tls"


def step_of(settings: NatsSettings, priority: int | None) -> int:
    """Return the step that a priority belongs to: the greatest one that isn't above it."""
    steps = settings.priority_steps
    return max((step for step in steps if step <= (priority or 0)), default=steps[0])
