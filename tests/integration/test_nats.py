"""kombu's transport for NATS JetStream, on a real server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
import uuid

import pytest
from kombu import Connection, Exchange, Queue
from kombu.exceptions import ChannelError

from catga_tasks import Catga, ConfigurationError
from catga_tasks.brokers.nats_errors import AccessRefused
from catga_tasks.errors import MessageRejected
from tests.waiting import wait_until

APP = """
import os, time
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox="sqlite:///shop.db")
app.conf.update(task_acks_late=True, broker_transport_options={"ack_wait": 1.0}, result_backend="rpc://")

@app.task(name="nap", delivery="at_most_once", acks_late=None)
def nap(path, seconds):
    with open(path, "a") as file:
        file.write("x")
    time.sleep(seconds)

@app.task(name="late", acks_late=True)
def late(path, seconds):
    with open(path, "a") as file:
        file.write("x")
    time.sleep(seconds)

@app.task(name="add")
def add(a, b):
    return a + b
"""


@pytest.fixture
def options():
    """Streams of this test's own."""
    return {"stream_prefix": f"test-{uuid.uuid4().hex[:8]}", "ack_wait": 1.0, "publish_timeout": 5.0}


@pytest.fixture
def connect(nats_server, options):
    opened = []

    def connect(url=nats_server, **changes):
        connection = Connection(url, transport_options={**options, **changes})
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.release()


def publish(connection, bodies, queue="q", **options):
    producer = connection.Producer()
    Queue(queue)(connection.default_channel).declare()
    for body in bodies:
        producer.publish(body, routing_key=queue, serializer="json", **options)


def held(connection, count, *, queue="q", prefetch=0, deadline=10):
    """Consume so many messages without acknowledging; the consumer stays."""
    messages = []
    consumer = connection.Consumer(
        Queue(queue), callbacks=[lambda _, message: messages.append(message)], prefetch_count=prefetch or None
    )
    consumer.consume()
    end = time.monotonic() + deadline
    while len(messages) < count and time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.2)
    assert len(messages) == count
    return messages


def size(connection, queue="q"):
    return connection.default_channel._size(queue)


def test_messages_come_in_order_and_once(connect):
    with connect() as connection:
        publish(connection, range(100), headers={"é": "/"})
        assert size(connection) == 100
        messages = held(connection, 100)
        assert [message.payload for message in messages] == list(range(100))
        assert len({message.delivery_tag for message in messages}) == 100
        assert messages[0].headers == {"é": "/"}
        for message in messages:
            message.ack()
    with connect() as connection:
        time.sleep(1.2)
        held(connection, 0, deadline=1)
        assert size(connection) == 0


def test_requeue_reject_and_the_redelivered_flag(connect):
    with connect() as connection:
        publish(connection, ["a"])
        (first,) = held(connection, 1)
        assert not first.delivery_info["redelivered"]
        first.requeue()
    with connect() as connection:
        (second,) = held(connection, 1)
        assert second.delivery_info["redelivered"]
        assert second.delivery_tag
        second.reject()
        wait_until(lambda: size(connection) == 0)
    with connect() as connection:
        held(connection, 0, deadline=1.5)


def test_what_is_held_at_the_end_goes_back_at_once(connect):
    with connect(ack_wait=30.0) as connection:
        publish(connection, range(5))
        held(connection, 5)
    with connect(ack_wait=30.0) as connection:
        held(connection, 5, deadline=5)


def test_the_prefetch_is_kept(connect):
    with connect() as connection:
        publish(connection, range(20))
        messages = held(connection, 3, prefetch=3)
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
        assert len(messages) == 3
        messages[0].ack()
        wait_until(lambda: drained(connection) or len(messages) == 4)


def drained(connection):
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.1)


def test_priorities(connect):
    with connect() as connection:
        publish(connection, ["low"], priority=9)
        publish(connection, ["high"], priority=0)
        time.sleep(0.1)
        channel = connection.default_channel
        assert [channel.basic_get("q").payload for _ in range(2)] == ["high", "low"]
        assert channel.basic_get("q") is None


@pytest.mark.parametrize(
    ("kind", "bound", "sent", "arrives"),
    [
        ("direct", "a.b", "a.b", True), ("direct", "a.b", "a.c", False), ("fanout", "", "whatever", True),
        ("topic", "a.*", "a.b", True), ("topic", "a.*", "a.b.c", False), ("topic", "#", "a.b", True),
        ("topic", "a.#", "a", True), ("topic", "a.#", "a.b.c", True), ("topic", "a.#", "b", False),
        ("topic", "a.#.z", "a.z", True), ("topic", "a.#.z", "a.b.c.z", True), ("topic", "a.#.z", "a.b", False),
        ("topic", "*.b", "b", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("durable", [True, False], ids=["stored", "passing"])
def test_exchanges(connect, kind, bound, sent, arrives, durable):
    """Another connection publishes, which has declared no more than the exchange."""
    exchange = Exchange("orders", type=kind)
    queue = Queue("bound", exchange, routing_key=bound, durable=durable, auto_delete=not durable)
    with connect() as consuming, connect() as publishing:
        queue(consuming.default_channel).declare()
        publishing.Producer().publish({"n": 1}, exchange=exchange, routing_key=sent, declare=[exchange])
        messages = []
        with consuming.Consumer(queue, callbacks=[lambda body, _: messages.append(body)], no_ack=True):
            deadline = time.monotonic() + (5 if arrives else 0.5)
            while not messages and time.monotonic() < deadline:
                drained(consuming)
        assert messages == ([{"n": 1}] if arrives else [])


def test_size_purge_delete_and_passive_declare(connect):
    with connect() as connection:
        channel = connection.default_channel
        with pytest.raises(ChannelError, match="NOT_FOUND"):
            channel.queue_declare("q", passive=True)
        publish(connection, range(3))
        assert channel.queue_declare("q", passive=True).message_count == 3
        assert channel.queue_purge("q") == 3
        assert size(connection) == 0
        publish(connection, range(3))
        channel.queue_delete("q", if_empty=True)
        assert size(connection) == 3
        channel.queue_delete("q")
        with pytest.raises(ChannelError):
            channel.queue_declare("q", passive=True)
        publish(connection, ["again"])
        assert size(connection) == 1


@pytest.mark.parametrize("name", ["a.b", "a@b", "a*b", "a>b", "a b/c", "é$", "x" * 240])
def test_33_any_name_is_a_queue(connect, name):
    with connect() as connection:
        publish(connection, ["x"], queue=name)
        publish(connection, ["y"], queue=f"{name[:230]}=")
        assert held(connection, 1, queue=name)[0].payload == "x"


def test_24_the_same_id_is_stored_once(connect):
    with connect() as connection:
        publish(connection, [])
        entries = [("q", 0, b"{}", "order-1"), ("q", 0, b"{}", "order-1"), ("q", 0, b"{}", "order-2")]
        assert connection.default_channel.send(entries) == [None] * 3
        assert size(connection) == 2


def test_30_poison_ends_as_a_dead_letter(connect, options):
    """Given back each time, it comes no more than `max_deliver` times, and its source is gone."""
    with connect() as connection:
        publish(connection, ["poison"])
    with connect(max_deliver=3) as connection:
        nats = connection.default_channel.nats
        prefix = options["stream_prefix"]
        came = []

        def give_back(body, message):
            came.append(body)
            message.requeue()

        def dead():
            drained(connection)
            with contextlib.suppress(Exception):
                return nats.call(nats.js.get_last_msg(f"{prefix}-dead", f"{prefix}.dead.q.0"))

        with connection.Consumer(Queue("q"), callbacks=[give_back]):
            letter = wait_until(dead)
        assert came == ["poison"] * 3
        assert "delivered 3 times" in letter.headers["Catga-Reason"]
        wait_until(lambda: nats.call(nats.js.stream_info(f"{prefix}-q")).state.messages == 0)


def test_24_garbage_is_kept_as_a_dead_letter(connect, options, caplog):
    with connect() as connection, caplog.at_level(logging.ERROR):
        publish(connection, [])
        connection.default_channel.send([("q", 0, b"no json", "1")])
        publish(connection, ["good"])
        assert held(connection, 1)[0].payload == "good"
        nats = connection.default_channel.nats
        stream = f"{options['stream_prefix']}-dead"
        assert nats.call(nats.js.stream_info(stream)).state.messages == 1
        assert "can't be decoded" in caplog.text


def test_21_a_killed_consumers_messages_come_back(connect, nats_server, options):
    with connect() as connection:
        publish(connection, range(5))
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), Connection(nats_server, transport_options=options) as child:
            held(child, 5)
            os.write(told, b"x")
            while True:
                drained(child)
        os._exit(1)
    assert os.read(ready, 1) == b"x"
    time.sleep(2.5)  # longer than ack_wait: the child's heartbeats keep its messages
    with connect() as connection:
        held(connection, 0, deadline=0.5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        started = time.monotonic()
        connection.release()
    with connect() as connection:
        held(connection, 5, deadline=5)
        assert time.monotonic() - started < 4


def test_40_mistakes_are_one_clear_error(own_nats, options):
    locked = own_nats('authorization { user: "shop", password: "geheim" }')
    wrong = locked.url.replace("nats://", "nats://shop:falsch@")
    with pytest.raises(AccessRefused, match="refuses access") as refused:
        Connection(wrong, transport_options=options).connect()
    assert "falsch" not in str(refused.value)
    with Connection(locked.url, transport_options={**options, "user": "shop", "password": "geheim"}) as connection:
        publish(connection, ["x"])
    plain = own_nats(jetstream=False)
    with (
        Connection(plain.url, transport_options=options) as connection,
        pytest.raises(ConfigurationError, match="no JetStream"),
    ):
        publish(connection, ["x"])
    small = own_nats("max_payload: 2000")
    with Connection(small.url, transport_options=options) as connection:
        with pytest.raises(MessageRejected, match="larger than NATS takes"):
            publish(connection, ["x" * 3000])
        publish(connection, ["small"])


def test_40_a_stream_of_somebody_else(connect, options):
    with connect() as connection:
        nats = connection.default_channel.nats
        nats.call(nats.js.add_stream(name=f"{options['stream_prefix']}-q", subjects=["theirs"]))
        with pytest.raises(ConfigurationError, match="isn't ours"):
            publish(connection, ["x"])


def test_40_an_option_that_cant_change(connect):
    with connect() as connection:
        publish(connection, ["x"])
    with connect(storage="memory") as connection, pytest.raises(ConfigurationError, match="can't be changed"):
        publish(connection, ["x"])
    with connect(max_msgs=10) as connection:
        publish(connection, ["y"])
        assert size(connection) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"ack_wiat": 3}, "did you mean ack_wait"), ({"storage": "tape"}, "storage must be 'file' or 'memory'"),
     ({"ack_wait": 0}, "ack_wait must be a number above 0"), ({"replicas": 9}, "replicas must be a whole number"),
     ({"stream_prefix": "a.b"}, "stream_prefix must be")],
)  # fmt: skip
def test_25_wrong_options(wrong, said):
    with pytest.raises(ConfigurationError, match=said):
        Connection("nats://127.0.0.1:1", transport_options=wrong).connect()


def test_34_a_fork_leaves_the_parents_connection_alone(connect, nats_server, options):
    with connect() as connection:
        publish(connection, ["parent"])
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                with Connection(nats_server, transport_options=options) as child:
                    publish(child, ["child"])
                connection.release()
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert sorted(message.payload for message in held(connection, 2)) == ["child", "parent"]


def test_42_the_password_is_masked():
    for url in ("nats://shop:geheim@host:4222", "nats://shop:geheim@a:1,shop:geheim@b:2", "nats://geheim@host"):
        assert "geheim" not in Connection(url).as_uri()
    assert "geheim" in Connection("nats://shop:geheim@host:4222").as_uri(include_password=True)


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_37_a_worker_lives_on_it(nats_server, processes, tmp_path, pool):
    """Results by rpc, remote control, and a task of ten times `ack_wait` that runs once (20)."""
    (tmp_path / "shop.py").write_text(APP)
    env = {"BROKER": nats_server}
    queue = f"jobs-{pool}"
    worker = processes.celery(
        "shop", "worker", "-P", pool, "-c", "2", "-l", "INFO", "-Q", queue, "-n", f"{pool}@test", env=env, cwd=tmp_path
    )
    app = Catga("shop", broker=nats_server, backend="rpc://", outbox="sqlite://", set_as_current=False)
    app.conf.update(task_delivery="at_most_once", broker_transport_options={"ack_wait": 1.0})
    assert app.send_task("add", (1, 2), queue=queue).get(timeout=30) == 3
    name = f"{pool}@test"
    assert app.control.ping(destination=[name], timeout=3) == [{name: {"ok": "pong"}}]
    assert [q["name"] for q in app.control.inspect([name], timeout=3).active_queues()[name]] == [queue]
    ran = tmp_path / "ran"
    done = app.send_task("late", (str(ran), 10.0 if pool == "prefork" else 4.0), queue=queue)
    done.get(timeout=40)
    assert ran.read_text() == "x"
    worker.terminate()
    assert worker.wait_exit() == 0, worker.log()


def test_21_a_killed_workers_task_runs_elsewhere(nats_server, processes, tmp_path):
    (tmp_path / "shop.py").write_text(APP)
    ran = tmp_path / "ran"
    app = Catga("shop", broker=nats_server, outbox="sqlite://", set_as_current=False)
    app.conf.update(task_delivery="at_most_once", broker_transport_options={"ack_wait": 1.0})
    arguments = ("worker", "-P", "solo", "-l", "INFO", "-Q", "killed")
    first = processes.celery("shop", *arguments, "-n", "first", env={"BROKER": nats_server}, cwd=tmp_path)
    app.send_task("late", (str(ran), 5.0), queue="killed")
    wait_until(lambda: ran.exists() and ran.read_text() == "x")
    processes.celery("shop", *arguments, "-n", "second", env={"BROKER": nats_server}, cwd=tmp_path)
    first.kill()
    wait_until(lambda: ran.read_text() == "xx", deadline=20)


def test_the_relay_publishes_to_it_once(nats_server, engine, options):
    """What is published again within the duplicate window is stored once; a retry of the same task is another row."""
    app = Catga("shop", broker=nats_server, outbox=engine, set_as_current=False)
    app.conf.broker_transport_options = options
    app.task(name="charge", shared=False)(lambda_task)
    app.tasks["charge"].apply_async((1,), task_id="order-1")
    app.tasks["charge"].apply_async((1,), task_id="order-1")
    app.tasks["charge"].delay_many([(number,) for number in range(50)], priority=3)
    publisher, claims = app.publisher(), app.relay()._claims
    rows = claims.take()
    assert len(publisher.publish(rows).confirmed) == 52
    assert len(publisher.publish(rows).confirmed) == 52
    publisher.close()
    # As a relay that published and never came to remove its rows, but for the blame.
    claims.forget_journal()
    claims.farewell()
    wait_until(lambda: app.relay().run_once() == 52)
    with Connection(nats_server, transport_options=options) as connection:
        assert size(connection, "celery") == 52
        message = connection.default_channel.basic_get("celery")
        assert json.loads(message.body)[0] == [1]


def lambda_task(order):
    return order


def test_02_the_relay_waits_for_it(own_nats, engine, options):
    server = own_nats()
    app = Catga("shop", broker=server.url, outbox=engine, set_as_current=False)
    app.conf.update(broker_transport_options=options, outbox_publish_timeout=1, outbox_lease_timeout=10)
    app.task(name="charge", shared=False)(lambda_task)
    app.tasks["charge"].delay_many([(number,) for number in range(20)])
    server.kill()
    relay = app.relay()
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        wait_until(lambda: relay._failures >= 2)
        server.start()
        wait_until(lambda: relay.published == 20)
    finally:
        relay.stop()
        thread.join(20)
    with Connection(server.url, transport_options=options) as connection:
        assert size(connection, "celery") == 20
