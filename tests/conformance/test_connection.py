"""Connecting, and what becomes of it when the server goes, comes back, or never was."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
from kombu.asynchronous import Hub
from kombu.exceptions import OperationalError

from catga_tasks import Catga
from tests.conformance.messages import Steadfast, came, consuming, idle, publish, size, taken
from tests.waiting import wait_until
from workers.servers import free_port

RECONNECTS = 100


def test_01_connect_close_and_connect_again(broker):
    connection = broker.connect()
    assert not connection.connected
    connection.connect()
    assert connection.connected
    assert connection.default_channel is connection.default_channel
    publish(connection, ["x"])
    connection.close()
    assert not connection.connected
    connection.connect()
    assert taken(connection, 1) == ["x"]
    connection.release()
    connection.release()


def test_02_a_refused_port_is_an_error_in_time(broker):
    connection = broker.connect(broker.at(free_port()), **broker.patience(2))
    started = time.monotonic()
    with pytest.raises(connection.connection_errors):
        connection.transport.establish_connection()
    assert time.monotonic() - started < 2


def test_02_a_server_that_never_answers_is_an_error_in_time(broker):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = broker.connect(broker.at(silent.getsockname()[1]), **broker.patience(0.5))
        started = time.monotonic()
        with pytest.raises(connection.connection_errors):
            connection.transport.establish_connection()
        assert time.monotonic() - started < 10


def test_02_the_try_after_a_refused_one_is_as_good_as_the_first(start):
    """Scenario 23: of one and the same connection, as Celery's worker does it while the server is away."""
    broker = start()
    broker.server.kill()
    connection = broker.connect(**broker.patience(1))
    for _ in range(2):
        with pytest.raises(connection.connection_errors):
            connection.transport.establish_connection()
    broker.server.start()
    connection.ensure_connection(max_retries=40, interval_start=0.1)
    publish(connection, ["x"])
    assert taken(connection, 1) == ["x"]


def test_03_wrong_credentials_are_an_authorization_error(start):
    broker = start(password="geheim")
    with pytest.raises(broker.REFUSED):
        broker.connect(broker.at(broker.server.port, "falsch")).connect()


@pytest.mark.needs("final refusal")
def test_03_wrong_credentials_are_not_tried_again(start):
    """Celery tries again for ever what is among the recoverable errors."""
    broker = start(password="geheim")
    connection = broker.connect(broker.at(broker.server.port, "falsch"))
    tries = []
    with pytest.raises(broker.REFUSED):
        connection.ensure_connection(errback=lambda *error: tries.append(error), max_retries=3, interval_start=0)
    assert tries == []


@pytest.mark.parametrize("asked", [0.2, 0.5])
def test_05_an_empty_queue_times_out_when_asked(broker, asked):
    """Within a tenth; the best of three, for a machine that is busy with something else."""
    with broker.connect() as connection:
        messages = consuming(connection)
        idle(connection, 0.2)
        waited = []
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(socket.timeout):
                connection.drain_events(timeout=asked)
            waited.append(time.monotonic() - started)
        assert messages == []
        assert min(waited) == pytest.approx(asked, rel=0.1)
        assert min(waited) >= asked * 0.99


def test_06_a_simple_queue(broker):
    with broker.connect() as connection, connection.SimpleQueue("simple") as queue:
        queue.put({"n": "cleared"})
        wait_until(lambda: queue.qsize() == 1)
        assert queue.clear() == 1
        for number in range(3):
            queue.put({"n": number})
        wait_until(lambda: queue.qsize() == len(queue) == 3)
        first = queue.get(timeout=10)
        assert first.payload == {"n": 0}
        first.ack()
        second = queue.get(timeout=10)
        second.requeue()
        found = [queue.get(timeout=10) for _ in range(2)]
        assert sorted(message.payload["n"] for message in found) == [1, 2]
        for message in found:
            message.ack()
        with pytest.raises(queue.Empty):
            queue.get(timeout=0.2)
        with pytest.raises(queue.Empty):
            queue.get_nowait()


def test_06_a_simple_buffer(broker):
    """It isn't stored, and nothing waits for an acknowledgement."""
    with broker.connect() as connection, connection.SimpleBuffer("simple") as buffer:
        with pytest.raises(buffer.Empty):
            buffer.get(timeout=0.2)
        for number in range(3):
            buffer.put(number)
        assert [buffer.get(timeout=10).payload for _ in range(3)] == [0, 1, 2]
        with pytest.raises(buffer.Empty):
            buffer.get_nowait()


def test_25_a_publish_to_a_server_that_is_gone_is_an_error_in_time(start):
    broker = start()
    with broker.connect(**broker.patience(1)) as connection:
        publish(connection, ["before"])
        broker.server.kill()
        started = time.monotonic()
        with pytest.raises(connection.recoverable_connection_errors):
            connection.Producer().publish("lost", routing_key="q", serializer="json", retry=False)
        assert time.monotonic() - started < 10
        broker.server.start()
    with broker.connect() as connection:
        assert "before" in taken(connection, 1)


def test_25_a_publish_to_a_frozen_server_is_an_error_in_time_and_not_doubled(start):
    """Its answer may be lost, so it may be stored; but once."""
    broker = start()
    with broker.connect(**broker.patience(1)) as connection:
        publish(connection, ["before"])
        broker.server.pause()
        started = time.monotonic()
        with pytest.raises(connection.recoverable_connection_errors):
            connection.Producer().publish("unsure", routing_key="q", serializer="json", retry=False)
        assert time.monotonic() - started < 15
        broker.server.resume()
    with broker.connect() as connection:
        publish(connection, ["after"])
        messages = consuming(connection)
        wait_until(lambda: "after" in came(connection, messages, len(messages) + 1))
        idle(connection)
        bodies = [message.payload for message in messages]
        assert bodies.count("unsure") <= 1
        assert (bodies.count("before"), bodies.count("after")) == (1, 1)


def test_25_publishes_through_an_outage_are_answered_and_not_doubled(start):
    """The server is frozen for longer than a message waits for its answer, and goes on."""
    broker = start()
    with broker.connect(**broker.patience(1)) as connection:
        publish(connection, [])
        confirmed, unsure = [], []
        thread = threading.Timer(2.5, broker.server.resume)
        broker.server.pause()
        thread.start()
        number = 0
        while thread.is_alive() or len(confirmed) < 3:
            number += 1
            try:
                connection.Producer().publish(number, routing_key="q", serializer="json", retry=False)
                confirmed.append(number)
            except connection.recoverable_connection_errors:
                unsure.append(number)
                with contextlib.suppress(*connection.recoverable_connection_errors):
                    connection.collect()
            assert number < 1000
        thread.join()
    with broker.connect() as connection:
        publish(connection, ["end"])
        messages = consuming(connection)
        wait_until(lambda: "end" in came(connection, messages, len(messages) + 1))
        idle(connection)
        bodies = [message.payload for message in messages]
    assert sorted(bodies, key=str) == sorted(set(bodies), key=str)
    assert set(confirmed) <= set(bodies) <= {*confirmed, *unsure, "end"}
    assert unsure


def test_26_a_restart_while_idle(start):
    broker = start()
    consumer = Steadfast(broker)
    with broker.connect() as connection:
        publish(connection, ["before"])
        wait_until(lambda: consumer.look() == ["before"])
    broker.server.restart()
    with broker.connect() as connection:
        publish(connection, ["after"])
    wait_until(lambda: "after" in consumer.look())
    assert consumer.seen == ["before", "after"]


def test_26_a_restart_under_load(start):
    """Scenario 23: what was confirmed is consumed, though the server is killed three times on the way."""
    broker = start()
    confirmed = []
    stop = threading.Event()

    def load():
        connection = broker.connect(**broker.patience(2))
        number = 0
        while not stop.is_set():
            number += 1
            try:
                publish(connection, [number])
                confirmed.append(number)
            except connection.recoverable_connection_errors:
                connection.collect()
        connection.release()

    thread = threading.Thread(target=load)
    thread.start()
    consumer = Steadfast(broker)
    try:
        for _ in range(3):
            before, seen = len(confirmed), len(consumer.seen)
            wait_until(lambda: len(consumer.look()) > seen and len(confirmed) > before + 20)  # noqa: B023 - at once
            broker.server.kill()
            broker.server.start()
        before = len(confirmed)
        wait_until(lambda: consumer.look() and len(confirmed) > before + 20)
    finally:
        stop.set()
        thread.join(30)
    wait_until(lambda: set(confirmed) <= set(consumer.look()), deadline=30)


def test_26_a_restart_in_mid_acknowledgement(start):
    """Scenario 23: what was taken before and is acknowledged in the outage or after it doesn't stay for ever."""
    broker = start()
    connection = broker.connect(**broker.patience(2), **broker.redelivery(3))
    publish(connection, range(10))
    messages = consuming(connection)
    assert came(connection, messages, 10) == list(range(10))
    errors = connection.recoverable_connection_errors
    for message in messages[:4]:
        message.ack()
    wait_until(lambda: broker.kept("q") == 6, what="four acknowledgements at the server")
    broker.server.kill()
    for message in messages[4:7]:
        with contextlib.suppress(*errors):
            message.ack()
    broker.server.start()
    for message in messages[7:]:
        with contextlib.suppress(*errors):
            message.ack()
    with contextlib.suppress(*errors):
        idle(connection, 1)
        connection.release()
    consumer = Steadfast(broker, **broker.redelivery(3))
    end = time.monotonic() + 3 + broker.LATE
    while time.monotonic() < end:
        consumer.look()
    # Each comes again once at most; the first ones were acknowledged for good.
    assert len(consumer.seen) == len(set(consumer.seen))
    assert set(consumer.seen) <= set(range(4, 10))
    consumer.connection.release()
    with broker.connect() as connection:
        again = consuming(connection)
        idle(connection)
        assert (again, size(connection)) == ([], 0)


def _held_open():
    gc.collect()
    return {"files": len(list(Path("/proc/self/fd").iterdir())), "threads": threading.active_count()}


def _no_more_than(before):
    wait_until(
        lambda: all(count <= before[name] for name, count in _held_open().items()),
        what=f"no more than {before}", deadline=10,
    )  # fmt: skip


def test_28_a_hundred_connections_leave_nothing_behind(start):
    """Neither files nor threads here, nor connections and subscriptions on the server."""
    broker = start()

    def once():
        with broker.connect() as connection:
            taken(connection, 1)
            publish(connection, ["x"])

    with broker.connect() as connection:
        publish(connection, ["x"])
    once()
    before, clients = _held_open(), broker.clients()
    for _ in range(RECONNECTS):
        once()
    _no_more_than(before)
    wait_until(lambda: broker.clients() <= clients, what="clients as before", deadline=10)


def test_28_a_hundred_cuts_leave_nothing_behind(broker, proxied):
    """A consumer in a hub, as Celery's, whose connection is cut a hundred times holds no more than at first."""
    hub = Hub()
    consumer = Steadfast(broker, hub=hub, url=broker.at(proxied.port))

    def held():
        return len(hub.readers), len(hub.timer)

    with broker.connect() as publishing:
        publish(publishing, ["start"])
        wait_until(lambda: consumer.look() == ["start"], every=0)
        before, registered = _held_open(), held()
        for number in range(RECONNECTS):
            connections = proxied.accepted
            proxied.cut()
            publish(publishing, [number])
            wait_until(lambda: number in consumer.look() and proxied.accepted > connections, every=0)  # noqa: B023 - at once
    assert len(consumer.seen) <= RECONNECTS * 2
    _no_more_than(before)
    assert held() == registered
    hub.close()


def test_35_threads_have_connections_of_their_own(broker):
    failed = []

    def work():
        try:
            with broker.connect() as connection:
                publish(connection, range(20))
        except Exception as error:  # noqa: BLE001 - told to the main thread
            failed.append(error)

    with broker.connect() as connection:
        publish(connection, [])
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with broker.connect() as connection:
        wait_until(lambda: failed or size(connection) == 100)
        assert failed == []


def test_35_threads_share_a_pool(broker):
    """As web processes do: `app.send_task` from many threads takes producers from one pool."""
    app = Catga("shop", broker=broker.url, outbox="sqlite://", set_as_current=False)
    app.conf.update(broker_transport_options=broker.options, broker_pool_limit=3, task_delivery="at_most_once")
    failed = []

    def work():
        try:
            for _ in range(20):
                app.send_task("charge", queue="q")
        except Exception as error:  # noqa: BLE001 - told to the main thread
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with broker.connect() as connection:
        wait_until(lambda: failed or size(connection) == 160)
        assert failed == []
    app.close()


def test_35_several_connections_do_not_mix(broker):
    """Connections with other prefixes have other queues, and each its own messages."""
    other = type(broker)(broker.url)
    with broker.connect() as ours, other.connect() as theirs:
        publish(ours, ["ours"])
        publish(theirs, ["theirs"])
        assert taken(ours, 1) == ["ours"]
        assert taken(theirs, 1) == ["theirs"]
        wait_until(lambda: size(ours) == size(theirs) == 0)
    other.clean()


def test_35_a_coroutine_publishes_and_consumes(broker):
    """Code inside a running loop calls the same synchronous methods."""

    async def work():
        await asyncio.sleep(0)
        with broker.connect() as connection:
            publish(connection, ["from a coroutine"])
            await asyncio.sleep(0)
            return taken(connection, 1)

    assert asyncio.run(work()) == ["from a coroutine"]


def test_42_secrets_are_never_shown(start, caplog):
    """Scenario 26: not in a connection's address, nor in logs and errors of one that fails, is made, and is lost."""
    broker = start(password="geheim")
    shown = []
    with caplog.at_level(logging.DEBUG):
        for password in ("geheim", "falsch"):
            connection = broker.connect(broker.at(broker.server.port, password), **broker.patience(1))
            assert password in connection.as_uri(include_password=True)
            shown += [connection.as_uri(), repr(connection), str(connection)]
            if password == "falsch":
                with pytest.raises(broker.REFUSED) as refused:
                    connection.connect()
                shown.append(repr(refused.value))
                continue
            publish(connection, ["x"])
            broker.server.kill()
            with pytest.raises((*connection.connection_errors, OperationalError)) as lost:
                publish(connection, ["y"])
            shown.append(repr(lost.value))
            broker.server.start()
    for text in [*shown, caplog.text]:
        assert "geheim" not in text
        assert "falsch" not in text
