"""What goes by itself: messages after their time, queues that nobody uses, and what a queue has no room for."""

from __future__ import annotations

import time
import uuid

import pytest
from kombu import Connection, Queue
from kombu.exceptions import ChannelError

from tests.waiting import wait_until


@pytest.fixture
def connect(nats_server):
    """Open connections; each process looks for expired queues by itself, and so does each of these."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    opened = []

    def connect():
        opened.append(Connection(nats_server, transport_options={"stream_prefix": prefix}))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.release()


def exists(connection, queue):
    try:
        Queue(queue)(connection.default_channel).queue_declare(passive=True)
    except ChannelError:
        return False
    return True


def expired(connect, queue):
    """Whether the queue is gone once somebody else has declared an expiring queue."""
    with connect() as other:
        Queue("another", expires=300)(other.default_channel).declare()
        return not exists(other, queue)


def test_13_messages_have_their_time(connect):
    with connect() as connection:
        queue = Queue("short", message_ttl=1.0)(connection.default_channel)
        queue.declare()
        connection.Producer().publish("x", routing_key="short")
        assert connection.default_channel._size("short") == 1
        wait_until(lambda: connection.default_channel._size("short") == 0, deadline=10)


def test_a_full_queue_refuses(connect):
    with connect() as connection:
        Queue("small", max_length=2)(connection.default_channel).declare()
        for body in ("one", "two"):
            connection.Producer().publish(body, routing_key="small")
        with pytest.raises(ChannelError, match="maximum messages"):
            connection.Producer().publish("three", routing_key="small")


def test_14_an_unused_queue_goes(connect):
    with connect() as connection:
        Queue("idle", expires=1.0)(connection.default_channel).declare()
        assert not expired(connect, "idle")
    wait_until(lambda: expired(connect, "idle"), deadline=10, every=0.3)
    # Whoever publishes to it doesn't make it again.
    with connect() as connection:
        connection.Producer().publish("late", routing_key="idle")
        assert not exists(connection, "idle")


def test_14_use_keeps_it(connect):
    """A consumer that waits, and a message that came."""
    with connect() as connection:
        channel = connection.default_channel
        Queue("read", expires=1.0)(channel).declare()
        Queue("written", expires=3.0)(channel).declare()
        with connection.Consumer(Queue("read", expires=1.0), callbacks=[print]):
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                connection.Producer().publish("x", routing_key="written")
                assert not expired(connect, "read")
        assert not expired(connect, "written")
        wait_until(lambda: expired(connect, "read") and expired(connect, "written"), deadline=15, every=0.3)


def test_a_queue_that_deletes_itself_goes_with_its_consumer(connect):
    with connect() as connection:
        queue = Queue("mine", auto_delete=True, expires=600)
        with connection.Consumer(queue, callbacks=[print]):
            assert exists(connection, "mine")
        with connect() as other:
            assert not exists(other, "mine")
