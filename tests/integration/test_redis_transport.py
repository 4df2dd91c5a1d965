"""kombu's transport for Redis as we change it: no message is lost when its consumer is killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import socket
import threading
import time
from queue import Empty

import pytest
from kombu import Connection, Queue
from redis import Redis

from catga_tasks import Catga
from catga_tasks.brokers.redis_transport import Transport
from tests.waiting import wait_until

KILLS = 25
MESSAGES = 5000
OPTIONS = {
    "visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 1,
}  # fmt: skip


@pytest.fixture
def server(redis_url):
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def connect(url, **options):
    return Connection(url, transport_options={**OPTIONS, **options})


def publish(url, bodies, *, queue="q", **options):
    with connect(url, **options.pop("transport_options", {})) as connection:
        producer = connection.Producer()
        Queue(queue)(connection.default_channel).declare()
        for body in bodies:
            producer.publish(body, routing_key=queue, serializer="json", **options)


def received(connection, count, *, queues=("q",), deadline=20, **options):
    """Consume until so many messages have come; return them, acknowledged."""
    bodies = []

    def take(body, message):
        bodies.append(body)
        if not options.get("no_ack"):
            message.ack()

    end = time.monotonic() + deadline
    with connection.Consumer([Queue(name) for name in queues], callbacks=[take], **options):
        while len(bodies) < count and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.2)
    return bodies


def test_the_name_means_our_transport(redis_url):
    assert isinstance(connect(redis_url).transport, Transport)
    app = Catga("shop", broker=redis_url, outbox="sqlite://", set_as_current=False)
    with app.connection_for_read() as connection:
        assert isinstance(connection.transport, Transport)
        assert connection.as_uri().startswith("redis://")


def consume_for_ever(url):
    client = Redis.from_url(url)
    with connect(url) as connection:

        def take(body, message):
            client.sadd("seen", body)
            message.ack()

        with connection.Consumer(Queue("q"), callbacks=[take], prefetch_count=8):
            while True:
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.5)


@contextlib.contextmanager
def consumer(url):
    """A consumer in a process of its own, which ends by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            consume_for_ever(url)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_21_killed_consumers_lose_nothing(redis_url, server):
    """kombu's own transport loses a message in one of five such kills."""
    publish(redis_url, map(str, range(MESSAGES)))
    luck = random.Random(7)
    for _ in range(KILLS):
        before = server.scard("seen")
        with consumer(redis_url):
            wait_until(lambda before=before: server.scard("seen") > before or not server.llen("q"))
            time.sleep(luck.uniform(0, 0.05))
    with consumer(redis_url):
        wait_until(lambda: server.llen("q") == server.hlen("unacked") == 0, deadline=60)
    assert server.scard("seen") == MESSAGES


def test_an_idle_consumer_is_woken(redis_url):
    """By Redis' push, within the tenth of a second, not at its next look a second later: the median of ten."""
    waits = []

    def send():
        for _ in range(10):
            time.sleep(0.15)
            publish(redis_url, [time.time()])

    with connect(redis_url) as connection:
        thread = threading.Thread(target=send)
        thread.start()

        def take(body, message):
            waits.append(time.time() - body)
            message.ack()

        with connection.Consumer(Queue("q"), callbacks=[take]):
            wait_until(lambda: drained(connection) or len(waits) == 10, every=0)
        thread.join()
    assert sorted(waits)[5] < 0.5


def drained(connection):
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=5)


def test_a_push_that_comes_with_the_answer_is_seen(redis_url):
    """A message that arrives right after the look finds the consumer looking again, though its socket is silent."""
    bodies = []
    take = [lambda body, message: bodies.append(body)]
    with connect(redis_url) as connection, connection.Consumer([Queue("q")], callbacks=take, no_ack=True):
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
        channel = connection.default_channel
        channel._armed = frozenset()
        channel._brpop_start()
        publish(redis_url, ["late"])
        sock = channel.client.connection._sock
        wait_until(lambda: b"invalidate" in sock.recv(4096, socket.MSG_PEEK), what="the answer and the push")
        with pytest.raises(Empty):
            channel._brpop_read()
        assert not channel._armed
        connection.drain_events(timeout=5)
    assert bodies == ["late"]


def test_unacknowledged_messages_are_in_kombus_table(redis_url, server):
    publish(redis_url, [{"n": 1}], headers={"é": "/"})
    with connect(redis_url) as connection:
        held = []
        with connection.Consumer(Queue("q"), callbacks=[lambda body, message: held.append(message)]):
            connection.drain_events(timeout=5)
        ((tag, stored),) = server.hgetall("unacked").items()
        message, exchange, routing_key = json.loads(stored)
        assert (tag, exchange, routing_key) == (held[0].delivery_tag, "", "q")
        assert message == json.loads(json.dumps(held[0]._raw))
        assert server.zscore("unacked_index", tag) == pytest.approx(time.time(), abs=60)
        held[0].ack()
        assert server.hlen("unacked") == server.zcard("unacked_index") == 0


def test_requeue_and_restore(redis_url, server):
    publish(redis_url, [1])
    with connect(redis_url) as connection:
        held = []
        with connection.Consumer(Queue("q"), callbacks=[lambda body, message: held.append(message)]):
            connection.drain_events(timeout=5)
            held[0].requeue()
            connection.drain_events(timeout=5)
            assert held[1].properties["delivery_tag"]
            assert server.hlen("unacked") == 1
    # The connection's end gave it back.
    assert (server.hlen("unacked"), server.llen("q")) == (0, 1)


def test_queues_take_turns(redis_url):
    publish(redis_url, ["a"] * 3, queue="a")
    publish(redis_url, ["b"] * 3, queue="b")
    with connect(redis_url) as connection:
        assert received(connection, 6, queues=("a", "b"))[:4] in (["a", "b"] * 2, ["b", "a"] * 2)


def test_without_acknowledgement_nothing_is_tracked(redis_url, server):
    publish(redis_url, [1, 2])
    with connect(redis_url) as connection:
        assert received(connection, 2, no_ack=True) == [1, 2]
        assert server.exists("unacked", "unacked_index") == 0


def test_a_key_prefix_is_kept(redis_url, server):
    options = {"global_keyprefix": "shop-"}
    publish(redis_url, [1], transport_options=options)
    with connect(redis_url, **options) as connection:
        held = []
        with connection.Consumer(Queue("q"), callbacks=[lambda body, message: held.append(message)]):
            connection.drain_events(timeout=5)
        assert server.hlen("shop-unacked") == 1
        held[0].ack()
        assert server.hlen("shop-unacked") == 0


def test_a_new_queue_is_consumed_at_once(redis_url):
    with connect(redis_url) as connection:
        assert received(connection, 1, deadline=0.5) == []
        publish(redis_url, ["a"], queue="a")
        assert received(connection, 1, queues=("q", "a"), deadline=5) == ["a"]


def test_scripts_that_were_flushed_are_loaded_again(redis_url, server):
    with connect(redis_url) as connection:
        publish(redis_url, [1])
        assert received(connection, 1) == [1]
        server.script_flush()
        publish(redis_url, [2])
        assert received(connection, 1) == [2]


def test_a_server_that_refuses_tracking_is_served_as_kombu_does(own_redis, caplog):
    broker = own_redis()
    with Redis.from_url(broker.url) as client:
        client.execute_command("ACL", "SETUSER", "shop", "on", ">word", "~*", "&*", "+@all", "-client")
    url = broker.url.replace("redis://", "redis://shop:word@")
    publish(url, [1, 2])
    with connect(url) as connection, caplog.at_level(logging.WARNING):
        assert received(connection, 2) == [1, 2]
    assert "may lose one" in caplog.text
    assert "word" not in caplog.text


def test_23_an_acknowledgement_after_the_connection_is_one_that_failed(redis_url, caplog):
    """Scenario 23: a task that ends when its connection was given up doesn't end the worker; it comes again."""
    publish(redis_url, ["x"])
    messages = []
    connection = connect(redis_url)
    with connection.Consumer([Queue("q")], callbacks=[lambda _body, message: messages.append(message)]):
        connection.drain_events(timeout=5)
    errors = connection.connection_errors + connection.channel_errors
    # As kombu leaves them when a lost connection was given up.
    channel = messages[0].channel
    channel._disconnect_pools()
    transport, channel.connection.client = channel.connection, None
    messages[0].ack_log_error(logging.getLogger("test"), errors)
    assert "Couldn't ack" in caplog.text
    transport.client = connection
    connection.release()
