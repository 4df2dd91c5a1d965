"""What becomes of a message: its content, its order, its acknowledgement, and its consumer's end."""

from __future__ import annotations

import json
import logging
import time
from base64 import b64decode

import pytest
from kombu import Queue
from kombu.serialization import prepare_accept_content

from catga_tasks import Catga
from tests.conformance.messages import Steadfast, came, consuming, drained, idle, publish, size, taken
from tests.waiting import wait_until

WORKERS = 20
PREFETCH = 64


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"é": ["/", None, 1.5, {"": "\u2028"}]}, {"serializer": "json"}),
        ({"set": {1, 2}, "bytes": b"\x00\xff"}, {"serializer": "pickle"}),
        ("x" * 200_000, {"serializer": "json"}),
        ({"n": list(range(1000))}, {"serializer": "json", "compression": "zlib"}),
        ("é\n", {"serializer": None, "content_type": "application/json", "content_encoding": "utf-8"}),
        (b"\x00\xff", {"serializer": None, "content_type": "application/data", "content_encoding": "binary"}),
    ],
    ids=["json", "pickle", "large", "compressed", "text", "bytes"],
)
def test_04_content_headers_and_properties_are_intact(broker, body, options):
    headers = {"é": "/", "nested": {"list": [1, None, True]}}
    with broker.connect() as connection:
        publish(connection, [body], headers=headers, correlation_id="c-1", reply_to="r/é", priority=3, **options)
        message = wait_until(lambda: connection.default_channel.basic_get("q"))
        if options["serializer"] is not None:
            message.accept = prepare_accept_content(["json", "pickle"])
            assert message.decode() == body
        else:
            assert message.body in (body, body.encode() if isinstance(body, str) else body)
            assert (message.content_type, message.content_encoding) == (
                options["content_type"], options["content_encoding"],
            )  # fmt: skip
        assert {name: message.headers[name] for name in headers} == headers
        kept = {name: message.properties[name] for name in ("correlation_id", "reply_to", "priority", "delivery_mode")}
        assert kept == {"correlation_id": "c-1", "reply_to": "r/é", "priority": 3, "delivery_mode": 2}


def test_04_messages_come_in_order_and_once(broker):
    with broker.connect() as connection:
        publish(connection, range(200))
        wait_until(lambda: size(connection) == 200)
        assert taken(connection, 200) == list(range(200))
        wait_until(lambda: size(connection) == 0)
    with broker.connect() as connection:
        messages = consuming(connection)
        idle(connection, broker.REDELIVERY + 0.5)
        assert messages == []


def test_11_the_first_priority_comes_first(broker):
    """0 is the first, as Celery documents it for Redis; within a priority the order stays."""
    with broker.connect() as connection:
        for priority in (9, 0, 6, 3):
            publish(connection, [f"{priority}-1", f"{priority}-2"], priority=priority)
        messages = consuming(connection, prefetch=1)
        for count in range(1, 9):
            came(connection, messages, count)
            messages[-1].ack()
        bodies = [message.payload for message in messages]
        assert bodies == [f"{priority}-{number}" for priority in (0, 3, 6, 9) for number in (1, 2)]


def test_11_the_first_priority_is_got_first(broker):
    with broker.connect() as connection:
        publish(connection, ["low"], priority=9)
        publish(connection, ["high"], priority=0)
        channel = connection.default_channel
        assert [channel.basic_get("q").payload for _ in range(2)] == ["high", "low"]
        assert channel.basic_get("q") is None


def test_11_a_priority_outlasts_a_requeue(broker):
    with broker.connect() as connection:
        for priority in (9, 0):
            publish(connection, [priority], priority=priority)
        channel = connection.default_channel
        first, second = channel.basic_get("q"), channel.basic_get("q")
        assert (first.payload, second.payload) == (0, 9)
        second.requeue()
        publish(connection, [3], priority=3)
        first.requeue()
    with broker.connect() as connection:
        channel = connection.default_channel
        again = [wait_until(lambda: channel.basic_get("q")) for _ in range(3)]
        assert [message.payload for message in again] == [0, 3, 9]
        assert [message.properties["priority"] for message in again] == [0, 3, 9]


@pytest.mark.parametrize(
    ("settle", "again"),
    [("ack", False), ("reject", False), ("reject_with_requeue", True), ("requeue", True)],
)
def test_12_settled(broker, settle, again):
    """Acknowledged and rejected messages are gone, those that are given back come at once."""
    with broker.connect(**broker.redelivery(30)) as connection:
        publish(connection, ["x"])
        messages = consuming(connection)
        came(connection, messages, 1)
        if settle == "reject_with_requeue":
            messages[0].reject(requeue=True)
        else:
            getattr(messages[0], settle)()
        if again:
            assert came(connection, messages, 2, deadline=5) == ["x", "x"]
            messages[1].ack()
        idle(connection, 0.3)
        assert len(messages) == 1 + again
        wait_until(lambda: size(connection) == 0)
    with broker.connect(**broker.redelivery(30)) as connection:
        messages = consuming(connection)
        idle(connection, 0.3)
        assert messages == []


def test_12_what_is_held_at_the_end_goes_back_at_once(broker):
    with broker.connect(**broker.redelivery(30)) as connection:
        publish(connection, range(5))
        came(connection, consuming(connection), 5)
    with broker.connect(**broker.redelivery(30)) as connection:
        assert sorted(came(connection, consuming(connection), 5, deadline=5)) == list(range(5))


def test_12_what_is_on_its_way_at_the_end_goes_back_at_once(broker):
    """The broker sends it at the very moment that its consumer ends."""
    for number in range(20):
        with broker.connect(**broker.redelivery(30)) as connection:
            consuming(connection)
            idle(connection, 0.05)
            publish(connection, [number])
        with broker.connect(**broker.redelivery(30)) as connection:
            messages = consuming(connection)
            assert came(connection, messages, 1, deadline=5) == [number]
            messages[0].ack()


def test_12_without_acknowledgement_nothing_stays(broker):
    with broker.connect() as connection:
        publish(connection, range(3))
        assert came(connection, consuming(connection, no_ack=True), 3) == [0, 1, 2]
    with broker.connect() as connection:
        messages = consuming(connection)
        idle(connection, broker.REDELIVERY + 0.5)
        assert (messages, size(connection)) == ([], 0)


def test_16_the_prefetch_is_never_exceeded(broker):
    """Neither when it is set nor after it changed on the way, up and down."""
    with broker.connect() as connection:
        publish(connection, range(30))
        held, seen = [], []
        limit = [3]

        def take(body, message):
            held.append(message)
            seen.append(body)
            assert len(held) <= limit[0]

        def settle(count):
            for _ in range(count):
                held.pop(0).ack()

        def full():
            wait_until(lambda: drained(connection) or len(held) == limit[0], every=0)
            idle(connection, 0.2)
            assert len(held) == limit[0]

        with connection.Consumer(Queue("q"), callbacks=[take], prefetch_count=3) as consumer:
            full()
            settle(2)
            full()
            limit[0] = 10
            consumer.qos(prefetch_count=10)
            full()
            consumer.qos(prefetch_count=2)
            settle(8)
            limit[0] = 2
            idle(connection, 0.2)
            assert len(held) == 2
            while len(seen) < 30:
                settle(1)
                full()
            settle(2)
        assert seen == list(range(30))


def test_17_many_workers_with_full_hands_do_not_stall(broker):
    """20 consumers hold 64 messages each; what is behind those comes when one of them is done."""
    with broker.connect(**broker.redelivery(30)) as publishing:
        publish(publishing, range(WORKERS * PREFETCH))
        held = []
        for _ in range(WORKERS):
            connection = broker.connect(**broker.redelivery(30))
            messages = consuming(connection, prefetch=PREFETCH)
            came(connection, messages, PREFETCH)
            held.append((connection, messages))
        assert [len(messages) for _, messages in held] == [PREFETCH] * WORKERS
        assert size(publishing) == 0
        publish(publishing, range(WORKERS))
        for connection, messages in held:
            messages[0].ack()
            came(connection, messages, PREFETCH + 1)
        for _, messages in held:
            for message in messages[1:]:
                message.ack()


def test_18_tags_are_unique_and_a_redelivery_is_told(broker):
    with broker.connect() as connection:
        publish(connection, range(20))
        messages = consuming(connection)
        came(connection, messages, 20)
        first = list(messages)
        assert not any(message.delivery_info.get("redelivered") for message in first)
        for message in first:
            message.requeue()
        came(connection, messages, 40)
        again = messages[20:]
        assert all(message.delivery_info["redelivered"] for message in again)
        assert len({message.delivery_tag for message in first}) == 20
        assert len({message.delivery_tag for message in again}) == 20
        # An old tag says nothing about the new delivery.
        for message in again:
            message.ack()
        wait_until(lambda: size(connection) == 0)


def test_19_acknowledged_just_before_a_cut_is_not_delivered_again(broker, proxied):
    consumer = Steadfast(broker, url=broker.at(proxied.port))
    with broker.connect() as connection:
        for number in range(10):
            publish(connection, [number])
            wait_until(lambda: number in consumer.look())  # noqa: B023 - at once
            proxied.cut()
        end = time.monotonic() + broker.REDELIVERY + broker.LATE
        while time.monotonic() < end:
            consumer.look()
        assert consumer.seen == list(range(10))
        assert size(connection) == 0


@pytest.mark.needs("in progress")
def test_20_what_is_in_hand_is_not_delivered_again(broker, client):
    with broker.connect() as connection:
        publish(connection, range(5))
        client("hold", queue="q", count=5)
        messages = consuming(connection)
        idle(connection, broker.REDELIVERY * 4)
        assert messages == []


def test_21_a_killed_consumers_messages_come_in_time(broker, client):
    with broker.connect() as connection:
        publish(connection, range(5))
        holder = client("hold", queue="q", count=5)
        messages = consuming(connection)
        holder.kill()
        killed = time.monotonic()
        assert sorted(came(connection, messages, 5, deadline=30)) == list(range(5))
        assert time.monotonic() - killed < broker.REDELIVERY + broker.LATE
        assert all(message.delivery_info["redelivered"] for message in messages)
        for message in messages:
            message.ack()


def test_23_a_retry_with_the_same_task_id_survives(broker):
    """`self.retry` publishes the task's id again within moments: it is another message."""
    app = Catga("shop", broker=broker.url, outbox="sqlite://", set_as_current=False)
    app.conf.update(broker_transport_options=broker.options, task_delivery="at_most_once")
    for retries in range(3):
        app.send_task("charge", queue="q", task_id="order-1", retries=retries)
    with broker.connect() as connection:
        messages = consuming(connection)
        came(connection, messages, 3)
        assert [message.headers["retries"] for message in messages] == [0, 1, 2]
    app.close()


@pytest.mark.needs("ids")
def test_24_the_same_id_is_stored_once(broker):
    with broker.connect() as connection:
        publish(connection, [])
        for identity in ("order-1", "order-1", "order-2"):
            broker.put("q", b"{}", identity)
        wait_until(lambda: size(connection) == 2)


def test_24_garbage_is_kept_and_named(broker, caplog):
    """What can't be decoded stays where somebody finds it, and the next message comes."""
    with broker.connect() as connection, caplog.at_level(logging.ERROR):
        publish(connection, [])
        garbage = [b"no json", b'{"properties": 3}']
        for number, body in enumerate(garbage):
            broker.put("q", body, str(number))
        publish(connection, ["good"])
        assert taken(connection, 1) == ["good"]
        assert sorted(body for body, _ in wait_until(lambda: broker.dead("q"))) == sorted(garbage)
    assert "can't be decoded" in caplog.text


@pytest.mark.needs("max_deliver")
def test_30_poison_ends_as_a_dead_letter(broker):
    """Given back each time, it comes no more than `max_deliver` times; its source is gone."""
    with broker.connect(max_deliver=3) as connection:
        publish(connection, ["poison"])
        bodies = []

        def give_back(body, message):
            bodies.append(body)
            message.requeue()

        with connection.Consumer(Queue("q"), callbacks=[give_back]):
            ((kept, reason),) = wait_until(lambda: drained(connection) or broker.dead("q"))
        assert bodies == ["poison"] * 3
        assert "delivered 3 times" in reason
        assert b64decode(json.loads(kept)["body"]) == b'"poison"'
        wait_until(lambda: size(connection) == 0)
    with broker.connect() as connection:
        messages = consuming(connection)
        idle(connection, broker.REDELIVERY + 0.5)
        assert messages == []
