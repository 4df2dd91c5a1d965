"""kombu's transport for NATS JetStream, on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from kombu import Connection, Exchange, Queue
from kombu.exceptions import ChannelError
from sqlalchemy import text

from catga_tasks import Catga, ConfigurationError
from catga_tasks.brokers import pulling
from catga_tasks.brokers.nats_errors import AccessRefused
from catga_tasks.brokers.pulling import Pull
from catga_tasks.errors import MessageRejected
from tests.waiting import wait_until

APP = """
import os
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox="sqlite:///shop.db")
app.conf.update(task_acks_late=True, broker_transport_options={"ack_wait": 1.0}, result_backend="rpc://")

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


def drained(connection):
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.1)


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


def test_40_no_permission_is_said_at_once(own_nats, options, processes, tmp_path):
    """By the server in passing, while the request would wait for its time-out; a worker ends with that line."""
    allowed = 'publish: ["celery.>"], subscribe: ["_INBOX.>"]'
    server = own_nats(
        f"authorization {{ users = [ {{ user: shop, password: geheim, permissions: {{ {allowed} }} }} ] }}"
    )
    url = server.url.replace("nats://", "nats://shop:geheim@")
    with (
        Connection(url, transport_options={**options, "publish_timeout": 60.0}) as connection,
        pytest.raises(AccessRefused, match=r"docs/reference/nats.md"),
    ):
        publish(connection, ["x"])
    (tmp_path / "shop.py").write_text(APP)
    worker = processes.celery("shop", "worker", "-P", "solo", env={"BROKER": url}, cwd=tmp_path)
    assert worker.wait_exit() != 0
    assert "Error: NATS refuses access" in worker.log()
    assert "Traceback" not in worker.log()
    assert "geheim" not in worker.log()


@pytest.mark.parametrize("url", ["nat://127.0.0.1", "nats://shop:geheim@127.0.0.1:port"])
def test_25_a_url_that_is_none(processes, tmp_path, url):
    """A worker and Celery's own commands end with one line, and without the password in it (scenarios 25 and 26)."""
    (tmp_path / "shop.py").write_text(APP)
    commands = [("worker", "-P", "solo"), ("purge", "-f")]
    started = [processes.celery("shop", *command, env={"BROKER": url}, cwd=tmp_path) for command in commands]
    for command in started:
        assert command.wait_exit() == 1
        assert "Error: broker_url" in command.log()
        assert "Traceback" not in command.log()
        assert "geheim" not in command.log()


async def _foreign_consumer(js, own):
    await js.add_stream(name=f"{own}-q", subjects=[f"{own}.q.q.*"], retention="workqueue")
    await js.add_consumer(f"{own}-q", durable_name="theirs", ack_policy="explicit")


MISTAKES = {
    "a foreign stream": (lambda js, own: js.add_stream(name=f"{own}-q", subjects=["theirs"]), {}, "isn't ours"),
    "a foreign subject": (lambda js, own: js.add_stream(name=f"{own}x", subjects=[f"{own}.q.>"]), {}, "overlap"),
    "a foreign consumer": (_foreign_consumer, {}, "isn't as we want it"),
    "replicas": (None, {"replicas": 3}, "replicas must be 1 on a single server"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_40_what_the_server_does_not_make(connect, options, mistake):
    """A stream or a consumer of somebody else, and what a server can't: one error that says so."""
    before, changes, said = MISTAKES[mistake]
    with connect(**changes) as connection:
        nats = connection.default_channel.nats
        if before:
            nats.call(before(nats.js, options["stream_prefix"]))
        with pytest.raises(ConfigurationError, match=said):
            publish(connection, ["x"])
        if before:
            for name in ("-q", "x"):
                with contextlib.suppress(ChannelError):
                    nats.call(nats.js.delete_stream(f"{options['stream_prefix']}{name}"))


def test_32_bindings_and_exchanges_come_and_go(connect):
    """A queue that somebody else has deleted is bound anew when it is declared anew; queues outlive their exchange."""
    orders = Exchange("orders", type="topic")
    paid = Queue("paid", orders, routing_key="paid.#")
    with connect() as connection, connect() as other:
        for _ in range(2):
            paid(connection.default_channel).declare()
            connection.Producer().publish("x", exchange=orders, routing_key="paid.now")
            assert wait_until(lambda: connection.default_channel.basic_get("paid")).payload == "x"
            paid(other.default_channel).delete()
            wait_until(lambda: not connection.transport.bindings.of("orders"))
        paid(connection.default_channel).declare()
        connection.Producer().publish("purged", exchange=orders, routing_key="paid.now")
        wait_until(lambda: connection.default_channel.queue_purge("paid") == 1)
        orders(other.default_channel).delete()
        wait_until(lambda: not connection.transport.bindings.of("orders"))
        connection.Producer().publish("nobody", exchange=orders, routing_key="paid.now")
        with connect() as third:
            assert paid(third.default_channel).queue_declare(passive=True).message_count == 0


def test_40_an_option_that_cant_change(connect):
    with connect() as connection:
        publish(connection, ["x"])
    for wrong in ({"storage": "memory"}, {"retention": "limits", "max_age": 60}):
        with connect(**wrong) as connection, pytest.raises(ConfigurationError, match="can't be changed"):
            publish(connection, ["x"])
    with connect(max_msgs=10) as connection:
        publish(connection, ["y"])
        assert size(connection) == 2


def test_options_reach_the_server(connect, options):
    """Each has its place in the stream, its consumers or the connection, and those that may are changed later."""
    wanted = {
        "storage": "memory", "retention": "limits", "compression": True, "max_age": 60, "max_msgs": 3,
        "max_bytes": 100_000, "max_msg_size": 2000, "discard": "old", "duplicate_window": 30.0,
    }  # fmt: skip
    with connect(**wanted, ack_wait=7, max_ack_pending=5, client_name="till") as connection:
        publish(connection, range(4))
        nats, stream = connection.default_channel.nats, f"{options['stream_prefix']}-q"
        found = nats.call(nats.js.stream_info(stream)).config
        assert {name: getattr(found, name) for name in wanted} == {**wanted, "compression": "s2"}
        consumer = nats.call(nats.js.consumer_info(stream, "step-0")).config
        assert (consumer.ack_wait, consumer.max_ack_pending) == (7, 5)
        assert nats.nats.options["name"] == "till"
        messages = held(connection, 3)
        assert [message.payload for message in messages] == [1, 2, 3]  # discard="old"
        for message in messages:
            message.ack()
        wait_until(lambda: connection.default_channel.counts("q")["messages"] == 0)
        assert nats.call(nats.js.stream_info(stream)).state.messages == 3  # retention="limits"
    with connect(**{**wanted, "discard": "new", "max_msgs": 9}, ack_wait=8) as connection:
        publish(connection, [])
        nats = connection.default_channel.nats
        found = nats.call(nats.js.stream_info(stream)).config
        assert (found.discard, found.max_msgs) == ("new", 9)
        assert nats.call(nats.js.consumer_info(stream, "step-0")).config.ack_wait == 8


def test_27_a_request_that_is_lost_is_made_again(connect, monkeypatch):
    """The leader of a cluster takes it with it when it is killed; whose connection is to another hears nothing."""
    monkeypatch.setattr(pulling, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(pulling, "SILENCE_SECONDS", 0.8)
    lost = []

    async def lose(pull, _count):
        lost.append(pull)
        pull._heard = time.monotonic()

    with connect() as connection, connect() as other:
        publish(other, ["x"])
        with monkeypatch.context() as patched:
            patched.setattr(Pull, "ask", lose)
            messages = held(connection, 0)
            wait_until(lambda: len(lost) == 4)
        assert all(pull.coming for pull in lost)
        wait_until(lambda: drained(connection) or len(messages) == 1)
        # It isn't, while the server says that it still has it.
        before, idle = [pull._asked for pull in lost], time.monotonic() + 1.5
        while time.monotonic() < idle:
            drained(connection)
        assert [pull._asked for pull in lost] == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_34_a_child_connects_anew_at_once(connect):
    """A web server that forks its workers after a publish: their first publish doesn't wait for the parent's thread."""
    with connect(publish_timeout=60.0) as connection:
        publish(connection, ["parent"])
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            with contextlib.suppress(BaseException):
                policy = {"max_retries": 2, "interval_start": 0}
                connection.Producer().publish(
                    "child", routing_key="q", serializer="json", retry=True, retry_policy=policy
                )
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0) == (pid, 0)
        publish(connection, ["after"])
        assert size(connection) == 3


def test_12_what_is_given_back_waits(connect):
    """For `backoff`: the first time this long, the second that long, and others come before it."""
    with connect(backoff=[0.4, 0], ack_wait=30) as connection:
        publish(connection, ["x"])
        messages = held(connection, 1)
        messages[0].requeue()
        publish(connection, ["y"])
        wait_until(lambda: drained(connection) or len(messages) == 3)
        assert [message.payload for message in messages] == ["x", "y", "x"]
        messages[2].requeue()
        wait_until(lambda: drained(connection) or len(messages) == 4)
        assert messages[3].payload == "x"


def test_41_a_server_that_is_too_old():
    """An older one than 2.10 would take what it doesn't know of a stream, and ignore it."""
    info = {"server_id": "x", "version": "2.9.25", "max_payload": 1 << 20, "headers": True, "jetstream": True}
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            with listener.accept()[0] as client:
                client.sendall(b"INFO " + json.dumps(info).encode() + b"\r\n")
                while data := client.recv(4096):
                    client.sendall(b"PONG\r\n" * data.count(b"PING"))

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ConfigurationError, match=r"version is 2.9.25: nats:// needs 2.10 or newer"):
            Connection(f"nats://127.0.0.1:{listener.getsockname()[1]}").connect()
        thread.join(10)


def test_16_a_queue_that_is_added_at_work_is_asked_for(connect):
    """What other threads settle meanwhile asks for nothing before the answer can come."""
    with connect() as connection:
        publish(connection, ["x"], priority=9)
        channel, stop = connection.default_channel, threading.Event()

        def settle():
            while not stop.is_set():
                channel.intake.top_up()

        thread = threading.Thread(target=settle)
        thread.start()
        try:
            held(connection, 1)
        finally:
            stop.set()
            thread.join()


def test_10_a_queue_that_comes_later_is_found(connect):
    """By a publisher to whose first message there was none: that one is dropped, as with AMQP, and no other."""
    with connect() as connection, connect() as other:
        connection.Producer().publish("nobody", routing_key="q")
        Queue("q")(other.default_channel).declare()
        connection.Producer().publish("x", routing_key="q")
        assert other.default_channel.basic_get("q").payload == "x"


def test_25_26_a_publisher_one_by_one_notices_no_restart(own_nats, options):
    """What was on its way when the server was killed is sent again when it is back, and stored once. Bindings that
    others make afterwards are seen.
    """
    server, stop, published = own_nats(), threading.Event(), []
    watching = Connection(server.url, transport_options=options)
    news = Exchange("news", type="fanout")
    Queue("early", news)(watching.default_channel).declare()

    def run():
        with Connection(server.url, transport_options={**options, "publish_timeout": 30.0}) as connection:
            publish(connection, [])
            while not stop.is_set():
                connection.Producer().publish(len(published), routing_key="q", serializer="json")
                published.append(len(published))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for end in (server.kill, server.restart, server.kill):
            before = len(published)
            wait_until(lambda: len(published) > before + 50)  # noqa: B023 - at once
            end()
            if end == server.kill:
                server.start()
        before = len(published)
        wait_until(lambda: len(published) > before + 50, deadline=10, what="the next ones, well before the time-out")
    finally:
        stop.set()
        thread.join(40)
    with Connection(server.url, transport_options=options) as connection:
        bodies = [message.payload for message in held(connection, len(published))]
        assert bodies == published
        Queue("late", news)(connection.default_channel).declare()
        bound = watching.transport.bindings
        wait_until(lambda: len(bound.of("news")) == 2, deadline=10, what="a binding of after the restarts")
        watching.Producer().publish("x", exchange=news)
        wait_until(lambda: size(connection, "early") == size(connection, "late") == 1)
    watching.release()


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_37_a_worker_lives_on_it(nats_server, processes, tmp_path, pool):
    """Results by rpc, and remote control."""
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
    worker.terminate()
    assert worker.wait_exit() == 0, worker.log()


def test_03_the_relay_publishes_to_it_once(nats_server, engine, options):
    """Scenario 3: what is published again within the duplicate window is stored once; a retry of the same task is
    another row.
    """
    app = Catga("shop", broker=nats_server, outbox=engine, set_as_current=False)
    app.conf.broker_transport_options = options
    app.task(name="charge", shared=False)(lambda_task)
    app.tasks["charge"].apply_async((1,), task_id="order-1")
    app.tasks["charge"].apply_async((1,), task_id="order-1")
    app.tasks["charge"].delay_many([(number,) for number in range(50)], priority=3)
    publisher, claims = app.publisher(), app.relay().lanes[0]._claims
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


@pytest.mark.parametrize(("end", "go_on"), [("kill", "start"), ("pause", "resume")])
def test_02_03_an_outage_blames_and_doubles_nothing(own_nats, engine, options, end, go_on):
    """Scenarios 2 and 3: a server that is gone, or that takes messages and never confirms: no attempt is used up, and
    afterwards the rows come in their order, each once, though some were stored before without a word.
    """
    server = own_nats()
    app = Catga("shop", broker=server.url, outbox=engine, set_as_current=False)
    app.conf.update(broker_transport_options=options, outbox_publish_timeout=1, outbox_lease_timeout=10)
    app.task(name="charge", shared=False)(lambda_task)
    relay = app.relay()
    app.tasks["charge"].delay("warm")
    assert relay.run_once() == 1
    app.tasks["charge"].delay_many([(number,) for number in range(20)])
    getattr(server, end)()
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        wait_until(lambda: relay.lanes[0]._failures >= 2)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*), max(attempts) FROM catga_outbox")).one() == (20, 0)
        getattr(server, go_on)()
        wait_until(lambda: relay.published == 21)
    finally:
        server.resume()
        relay.stop()
        thread.join(20)
    with Connection(server.url, transport_options=options) as connection:
        found = []
        while (message := connection.default_channel.basic_get("celery")) is not None:
            found.append(json.loads(message.body)[0][0])
            message.ack()
    assert found == ["warm", *range(20)]


def test_06_bad_rows_hold_up_no_batch(own_nats, engine, options):
    """Scenario 6: a row that can't be decoded, one over the server's limit and two for queues that can't be end as
    dead letters, each with its own error; the rows around them go out.
    """
    server = own_nats("max_payload: 3000")
    app = Catga("shop", broker=server.url, outbox=engine, set_as_current=False)
    app.conf.update(broker_transport_options=options, outbox_max_attempts=2, outbox_retry_backoff=0.01)
    app.task(name="charge", shared=False)(lambda_task)
    app.tasks["charge"].delay_many([(number,) for number in range(5)])
    app.tasks["charge"].apply_async((7,), task_id="garbled")
    app.tasks["charge"].apply_async(("x" * 5000,), task_id="large")
    app.tasks["charge"].apply_async((8,), task_id="nowhere", queue="x" * 300)
    app.tasks["charge"].apply_async((9,), task_id="odd", queue=Queue("odd", Exchange("odd", type="headers")))
    app.tasks["charge"].delay_many([(number,) for number in range(5)])
    with engine.begin() as connection:
        connection.execute(text("UPDATE catga_outbox SET headers = '3' WHERE task_id = 'garbled'"))
    relay = app.relay()
    assert relay.run_once() == 10

    def dead():
        with engine.connect() as connection:
            columns = "task_id, attempts, error"
            return connection.execute(text(f"SELECT {columns} FROM catga_dead_letters ORDER BY task_id")).all()

    wait_until(lambda: relay.run_once() == 10 and len(dead()) == 4)
    garbled, large, nowhere, odd = dead()
    assert [row[:2] for row in dead()] == [("garbled", 2), ("large", 2), ("nowhere", 2), ("odd", 2)]
    assert "headers must be a JSON object" in garbled[2]
    assert "larger than NATS takes" in large[2]
    assert "is too long for NATS" in nowhere[2]
    assert "headers" in odd[2]
    with Connection(server.url, transport_options=options) as connection:
        assert size(connection, "celery") == 10


def test_26_tries_to_reconnect_are_counted(own_nats, options):
    """With reconnect_attempts an outage is an error after so many tries, long before reconnect_grace is over."""
    server = own_nats()
    tries = {"reconnect_attempts": 3, "reconnect_wait": 0.05, "reconnect_grace": 60.0}
    with Connection(server.url, transport_options={**options, **tries}) as connection:
        nats = connection.default_channel.nats
        server.restart()
        wait_until(lambda: nats.nats.is_connected, what="a connection that is back")
        assert nats.broken is None
        server.kill()
        wait_until(lambda: nats.broken is not None, deadline=20, what="the end of the tries")
        assert str(nats.broken) == "NATS didn't come back in 3 tries (reconnect_attempts)."
        server.start()


def test_36_what_failed_is_not_sent_again(own_nats, options):
    """A message that can't leave doesn't wait for an answer with the others, which go out again after an outage."""
    server = own_nats()
    with Connection(server.url, transport_options=options) as connection:
        channel = connection.default_channel
        Queue("q")(channel).declare()
        entries = [("q", 0, b"good", "1"), ("q", 0, b"x" * 2_000_000, "2"), ("q", 0, b"good", "3")]
        server.pause()
        with ThreadPoolExecutor() as aside:
            sending = aside.submit(channel.send, entries)
            try:
                waiting = channel.nats.publishing._awaited
                wait_until(lambda: [number for _, number, _ in waiting.values()] == [0, 2], what="two that wait")
            finally:
                server.resume()
            first, second, third = sending.result(20)
        assert (first, third) == (None, None)
        assert isinstance(second, MessageRejected)
