"""What the tests do with a broker: publish, consume, count."""

from __future__ import annotations

import contextlib
import time

from kombu import Queue

from tests.waiting import wait_until


def publish(connection, bodies, queue="q", **options):
    Queue(queue)(connection.default_channel).declare()
    producer = connection.Producer()
    for body in bodies:
        producer.publish(body, **{"routing_key": queue, "serializer": "json", "retry": False, **options})


def drained(connection, timeout=0.1):
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=timeout)


def consuming(connection, *queues, prefetch=0, no_ack=False):
    """Start a consumer; return the list that its messages come to, unacknowledged."""
    messages = []
    consumer = connection.Consumer(
        [queue if isinstance(queue, Queue) else Queue(queue) for queue in queues or ("q",)],
        callbacks=[lambda _, message: messages.append(message)],
        prefetch_count=prefetch or None, no_ack=no_ack, accept=["json", "pickle"],
    )  # fmt: skip
    consumer.consume()
    return messages


def came(connection, messages, count, deadline=15):
    """Wait until so many messages have come; return their bodies."""
    wait_until(lambda: len(messages) >= count or drained(connection), deadline=deadline, what=f"{count} messages",
               every=0)  # fmt: skip
    return [message.payload for message in messages]


def idle(connection, seconds=0.5):
    """Let whatever would come have come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        drained(connection)


def taken(connection, count, *queues, deadline=15):
    """Consume and acknowledge so many messages; return their bodies."""
    messages = consuming(connection, *queues)
    bodies = came(connection, messages, count, deadline)
    for message in messages:
        message.ack()
    return bodies


def size(connection, queue="q"):
    return connection.default_channel._size(queue)


class Steadfast:
    """A consumer as Celery's: what its broker calls recoverable makes it connect again. With a hub it lives in it."""

    def __init__(self, broker, *queues, hub=None, **options):
        self._broker, self._queues, self._hub, self._options = broker, queues, hub, options
        #: The bodies that came, acknowledged.
        self.seen = []
        self.reconnects = 0
        self._start()

    def look(self):
        """Take what comes within a moment; return all that has come."""
        try:
            if self._hub is None:
                drained(self.connection)
            else:
                next(self._loop)
            while self._messages:
                message = self._messages.pop(0)
                self.seen.append(message.payload)
                message.ack()
        except (*self.connection.recoverable_connection_errors, *self.connection.recoverable_channel_errors):
            self.reconnects += 1
            self.connection.collect()
            if self._hub is not None:
                self._hub.reset()
                self._hub.timer.clear()
            self._start()
        return self.seen

    def _start(self):
        self.connection = self._broker.connect(**self._options)
        self.connection.ensure_connection(max_retries=40, interval_start=0.1, interval_step=0.1, interval_max=0.5)
        if self._hub is not None:
            self._hub.call_repeatedly(0.02, int)  # a loop of the hub lasts until the next timer
            self.connection.transport.register_with_event_loop(self.connection.connection, self._hub)
            self._loop = self._hub.create_loop()
        self._messages = consuming(self.connection, *self._queues)
