"""Three servers and three copies of each message: one is killed, and nothing is lost. And servers that fall silent."""

from __future__ import annotations

import threading
import time
import uuid

import pytest
from kombu import Connection, Queue

from catga_tasks import Catga
from catga_tasks.brokers.nats_errors import Unreachable
from tests.waiting import wait_until
from workers.servers import NatsServer, free_port

APP = """
import os, time
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(
    broker_transport_options={"replicas": 3, "ack_wait": 2.0, "reconnect_grace": 1.0},
    outbox_publish_timeout=2, outbox_lease_timeout=10, worker_prefetch_multiplier=8,
)

@app.task(name="note")
def note(number):
    with open("noted", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.005)
"""


ACCESS = 'authorization { user: shop, password: "p@ss" }'


@pytest.fixture
def cluster():
    """Three servers that know each other, and the URL of all of them."""
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    servers = [
        NatsServer(
            f"server_name: node{number}\n{ACCESS}\n"
            f'cluster {{ name: trio, listen: "127.0.0.1:{port}", routes: [{routes}] }}'
        )
        for number, port in enumerate(ports)
    ]
    for server in servers:
        server.start()
    try:
        # The servers tell of one another without credentials, which are in the URL once.
        url = "nats://shop:p%40ss@" + ",".join(server.url.removeprefix("nats://") for server in servers)
        wait_until(lambda: has_quorum(url), deadline=30, every=0.2, what="a leader")
        yield servers, url
    finally:
        for server in servers:
            server.stop()


def has_quorum(url):
    try:
        with Connection(url, transport_options={"replicas": 3, "publish_timeout": 2.0}) as connection:
            Queue("probe")(connection.default_channel).declare()
            Queue("probe")(connection.default_channel).delete()
    except Exception:  # noqa: BLE001 - not yet
        return False
    return True


def info(url, queue="celery"):
    """What the cluster says of a queue's stream, and of its first consumer."""
    with Connection(url, transport_options={"replicas": 3, "publish_timeout": 3.0}) as connection:
        nats = connection.default_channel.nats
        name = connection.default_channel.settings.stream(queue)
        return nats.call(nats.js.stream_info(name)), nats.call(nats.js.consumer_info(name, "step-0"))


@pytest.mark.timeout(180)
def test_29_the_leader_is_killed(cluster, processes, tmp_path):
    """A relay and a worker go on by themselves: every committed task runs, and nothing stays unacknowledged."""
    servers, url = cluster
    (tmp_path / "shop.py").write_text(APP)
    outbox = f"sqlite:///{tmp_path / 'shop.db'}"
    env = {"BROKER": url, "OUTBOX": outbox}
    assert processes.celery("shop", "outbox", "migrate", env=env, cwd=tmp_path).wait_exit() == 0
    relay = processes.celery("shop", "outbox", "relay", "--batch-size", "20", env=env, cwd=tmp_path)
    worker = processes.celery("shop", "worker", "-P", "threads", "-c", "2", "-l", "INFO", env=env, cwd=tmp_path)
    app = Catga("shop", broker=url, outbox=outbox, set_as_current=False)
    app.task(name="note", shared=False)(note)
    noted = tmp_path / "noted"

    def ran():
        return len(set(noted.read_text().split())) if noted.exists() else 0

    total = 600
    for number in range(0, 200, 20):
        app.tasks["note"].delay_many([(each,) for each in range(number, number + 20)])
    wait_until(lambda: ran() >= 50, deadline=60)
    leader = info(url)[0].cluster.leader
    killed = next(server for number, server in enumerate(servers) if f"node{number}" == leader)
    killed.kill()
    for number in range(200, total, 20):
        app.tasks["note"].delay_many([(each,) for each in range(number, number + 20)])
    wait_until(lambda: ran() >= 400, deadline=60, what="tasks without the third server")
    killed.start()
    wait_until(lambda: ran() == total, deadline=60, what="every task")

    def settled():
        stream, consumer = info(url)
        return (stream.state.messages, consumer.num_ack_pending) == (0, 0)

    wait_until(settled, deadline=30, every=0.3, what="nothing left unacknowledged")
    for process in (relay, worker):
        assert process.alive(), process.log()
        assert "Traceback" not in process.log(), process.log()


def test_29_publishers_have_an_answer_in_time(cluster):
    """Whatever is confirmed is there; what isn't is an error within the time-out, and never a hang."""
    servers, url = cluster
    options = {"replicas": 3, "publish_timeout": 2.0, "stream_prefix": f"test-{uuid.uuid4().hex[:8]}"}
    confirmed, failed, waits = [], 0, []
    with Connection(url, transport_options=options) as connection:
        Queue("q")(connection.default_channel).declare()
        nats = connection.default_channel.nats
        leader = nats.call(nats.js.stream_info(f"{options['stream_prefix']}-q")).cluster.leader
        for number in range(60):
            if number == 20:
                servers[int(leader[-1])].kill()
            started = time.monotonic()
            try:
                connection.Producer().publish(number, routing_key="q", retry=False)
            except Exception:  # noqa: BLE001 - any is an answer
                failed += 1
            else:
                confirmed.append(number)
            waits.append(time.monotonic() - started)
    assert len(confirmed) > 30
    assert max(waits) < 8
    with Connection(url, transport_options=options) as connection:
        found = []
        while (message := connection.default_channel.basic_get("q")) is not None:
            message.ack()
            found.append(message.payload)
    assert set(confirmed) <= set(found)
    assert len(found) <= len(confirmed) + failed


@pytest.fixture
def own_nats():
    with NatsServer() as server:
        yield server


def test_27_a_silent_server_is_noticed(own_nats):
    """It is stopped, not gone: the connection stays open. It is taken for lost, and consuming goes on afterwards."""
    options = {"ping_interval": 0.3, "reconnect_grace": 0.5, "publish_timeout": 1.0, "connect_timeout": 1.0}
    with Connection(own_nats.url, transport_options=options) as connection:
        Queue("q")(connection.default_channel).declare()
        connection.Producer().publish("before", routing_key="q")
        consumer = connection.Consumer(Queue("q"), callbacks=[lambda _, message: message.ack()])
        consumer.consume()
        connection.drain_events(timeout=5)
        own_nats.pause()
        started = time.monotonic()
        with pytest.raises(connection.recoverable_connection_errors):
            while True:
                try:
                    connection.drain_events(timeout=1)
                except TimeoutError:
                    assert time.monotonic() - started < 15, "nobody noticed"
        own_nats.resume()
    got = []
    with Connection(own_nats.url, transport_options=options) as connection:
        connection.Producer().publish("after", routing_key="q")
        with connection.Consumer(Queue("q"), callbacks=[lambda body, message: (got.append(body), message.ack())]):
            wait_until(lambda: drained(connection) or "after" in got)


def test_25_27_a_publisher_of_a_silent_server_goes_on(own_nats):
    """kombu tries again for as long as the server says nothing; what it has stored meanwhile, it stores once."""
    options = {"publish_timeout": 0.5, "connect_timeout": 1.0, "ping_interval": 0.3}
    with Connection(own_nats.url, transport_options=options) as connection:
        Queue("q")(connection.default_channel).declare()
        own_nats.pause()
        with pytest.raises(Unreachable):
            connection.Producer().publish("in between", routing_key="q", retry=False)
        threading.Timer(2.5, own_nats.resume).start()
        connection.Producer().publish("after", routing_key="q", retry=True, retry_policy={"max_retries": 20})
    with Connection(own_nats.url, transport_options=options) as connection:
        bodies = []
        while (message := connection.default_channel.basic_get("q")) is not None:
            bodies.append(message.payload)
        assert bodies.count("after") == 1
        assert bodies.count("in between") <= 1


def drained(connection):
    try:
        connection.drain_events(timeout=0.2)
    except TimeoutError:
        return False
    return False


def note(number):
    return number
