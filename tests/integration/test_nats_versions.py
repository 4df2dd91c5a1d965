"""Servers of every release line that the transport knows: an older one has less, and it is said."""

from __future__ import annotations

import os

import pytest
from kombu import Connection, Queue
from kombu.exceptions import ChannelError

from catga_tasks import Catga
from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import NatsServer

#: The last release of each line that changed what JetStream can do.
VERSIONS = ("2.10.26", "2.11.11", "2.12.8", "2.15.1")


@pytest.fixture(scope="session", params=VERSIONS)
def old_server(request):
    """A server of this version, from its wheel, where `make test` has put it."""
    found = list((ROOT / ".venv" / "nats-servers" / request.param).rglob("nats-server"))
    if not found:
        message = f"nats-server {request.param} is missing: `make servers` installs it."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    server = NatsServer(binary=str(found[0]))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def connection(old_server):
    with Connection(old_server.url, transport_options={"ack_wait": 1.0, "max_deliver": 2}) as connection:
        yield connection


def take(connection, queue):
    """Take a message: it is at hand a moment after its confirmation."""
    return wait_until(lambda: connection.default_channel.basic_get(queue), what="a message")


def test_41_messages(connection):
    """Publish, take, give back, end, count, priorities, duplicates, dead letters, in every version."""
    producer, channel = connection.Producer(), connection.default_channel
    Queue("q")(channel).declare()
    for body, priority in (("later", 9), ("first", 0), ("second", 3)):
        producer.publish(body, routing_key="q", priority=priority)
    wait_until(lambda: channel._size("q") == 3)
    assert [take(connection, "q").payload for _ in range(3)] == ["first", "second", "later"]
    connection.release()
    message = take(connection, "q")
    assert (message.payload, message.delivery_info["redelivered"]) == ("first", True)
    message.ack()
    take(connection, "q").reject()
    assert connection.default_channel.send([("q", 0, b"{}", "same"), ("q", 0, b"{}", "same")]) == [None, None]
    Queue("q")(connection.default_channel).purge()
    messages = []
    with connection.Consumer(Queue("q"), callbacks=[lambda _, message: messages.append(message)]):
        connection.Producer().publish("consumed", routing_key="q")
        connection.drain_events(timeout=10)
        messages[0].ack()
    with pytest.raises(ChannelError):
        Queue("missing")(connection.default_channel).queue_declare(passive=True)


def test_41_the_relay(old_server, engine):
    app = Catga("shop", broker=old_server.url, outbox=engine, set_as_current=False)
    app.task(name="charge", shared=False)(charge)
    app.tasks["charge"].delay_many([(number,) for number in range(50)])
    assert app.relay().run_once() == 50
    with Connection(old_server.url) as connection:
        assert Queue("celery")(connection.default_channel).purge() == 50


def test_41_compression(old_server):
    """Since 2.10, the oldest that is known."""
    with Connection(old_server.url, transport_options={"compression": True, "stream_prefix": "small"}) as connection:
        Queue("q")(connection.default_channel).declare()
        connection.Producer().publish("x" * 1000, routing_key="q")
        assert take(connection, "q").payload == "x" * 1000


def charge(order):
    return order
