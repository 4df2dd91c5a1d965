"""kombu's publish batches on NATS (item 36): together or not at all, and confirmed each."""

from __future__ import annotations

import uuid

import pytest
from kombu import Connection, Exchange, Queue
from kombu.exceptions import BatchPublishError

from tests.waiting import wait_until
from workers.servers import NatsServer


@pytest.fixture
def options():
    return {"stream_prefix": f"test-{uuid.uuid4().hex[:8]}", "publish_timeout": 1.0}


@pytest.fixture
def connection(nats_server, options):
    with Connection(nats_server, transport_options=options) as connection:
        Queue("q")(connection.default_channel).declare()
        yield connection


def size(connection, queue="q"):
    return connection.default_channel._size(queue)


def test_36_a_batch_is_published_at_its_end(connection):
    producer = connection.Producer()
    assert producer.supports_batch_publish
    with producer.batch():
        for number in range(50):
            producer.publish(number, routing_key="q")
        assert size(connection) == 0
    wait_until(lambda: size(connection) == 50)
    assert [connection.default_channel.basic_get("q").payload for _ in range(50)] == list(range(50))


def test_36_flush_nested_and_full_batches(connection):
    producer = connection.Producer()
    with producer.batch(max_size=4) as batch:
        producer.publish(1, routing_key="q")
        batch.flush()
        wait_until(lambda: size(connection) == 1)
        with producer.batch():
            producer.publish(2, routing_key="q")
        assert size(connection) == 1
        for number in range(3):
            producer.publish(number, routing_key="q")
        wait_until(lambda: size(connection) == 5)


def test_36_an_aborted_batch_sends_nothing(connection):
    producer = connection.Producer()
    with pytest.raises(ZeroDivisionError), producer.batch():
        producer.publish(1, routing_key="q")
        _ = 1 / 0
    producer.publish(2, routing_key="q")
    wait_until(lambda: size(connection) == 1)


def test_36_a_part_that_fails_is_said(nats_server, options):
    """The others are stored."""
    with Connection(nats_server, transport_options={**options, "max_msg_size": 3000}) as connection:
        Queue("q")(connection.default_channel).declare()
        producer = connection.Producer()
        with pytest.raises(BatchPublishError, match="1 of 3 messages"), producer.batch():
            for body in ("a", "b" * 5000, "c"):
                producer.publish(body, routing_key="q")
        wait_until(lambda: size(connection) == 2)


def test_36_an_outage_is_an_error_in_time(options):
    with NatsServer() as server, Connection(server.url, transport_options=options) as connection:
        Queue("q")(connection.default_channel).declare()
        producer = connection.Producer()
        with pytest.raises(BatchPublishError, match="2 of 2"), producer.batch():
            producer.publish("a", routing_key="q")
            producer.publish("b", routing_key="q")
            server.pause()


def test_36_exchanges_and_priorities(connection):
    """Each message goes where it would go alone."""
    fanout = Exchange("news", "fanout")
    for name in ("one", "two"):
        Queue(name, fanout)(connection.default_channel).declare()
    producer = connection.Producer()
    with producer.batch():
        producer.publish("later", routing_key="q", priority=9)
        producer.publish("first", routing_key="q", priority=0)
        producer.publish("both", exchange=fanout)
    wait_until(lambda: [size(connection, name) for name in ("q", "one", "two")] == [2, 1, 1])
    assert connection.default_channel.basic_get("q").payload == "first"
