"""Celery's own workers, in processes of their own, with each pool."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest

from catga_tasks import Catga
from tests.conformance.messages import came, consuming, idle, publish, size
from tests.waiting import wait_until

QUEUE = "jobs"


@pytest.fixture
def app(broker):
    """An application that publishes; results come by rpc."""
    yield from _app(broker)


def _app(broker):
    app = Catga("shop", broker=broker.url, backend="rpc://", outbox="sqlite://", set_as_current=False)
    app.conf.update(broker_transport_options=broker.options, task_delivery="at_most_once")
    yield app
    app.close()


@pytest.fixture
def worker(processes):
    """Starts a worker and waits until it is ready."""

    def start(broker, pool, *arguments, wait=True, prefetch=4, **changes):
        env = {
            "BROKER": broker.url,
            "OPTIONS": json.dumps({**broker.options, **changes}),
            "QUEUE": QUEUE,
            "PREFETCH": str(prefetch),
        }
        process = processes.celery(
            "tests.conformance.shop", "worker", "-P", pool, "-n", f"{pool}{os.urandom(4).hex()}", "-l", "INFO",
            "-Q", QUEUE, "--without-gossip", "--without-mingle", *arguments, env=env,
        )  # fmt: skip
        if wait:
            ready(process)
        return process

    return start


def ready(process):
    wait_until(lambda: " ready." in process.log() or not process.alive(), what="a ready worker")
    assert process.alive(), process.log()


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_04_tasks_run_in_the_order_of_their_publishing(broker, app, worker, tmp_path):
    """With one worker that runs one at a time."""
    ran = tmp_path / "ran"
    for number in range(50):
        app.send_task("run", (str(ran), number), queue=QUEUE)
    worker(broker, "solo")
    wait_until(lambda: len(lines(ran)) == 50)
    assert lines(ran) == [str(number) for number in range(50)]


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_20_22_long_and_late_tasks_run_once(broker, app, worker, tmp_path, pool):
    """Scenario 22: a task of ten times what a message may go unheard of, and one that is due after as long.

    On Redis nothing renews a message in hand: its visibility_timeout has to be longer than the task takes.
    """
    unheard = 30 if "in progress" in broker.CANNOT else 0.7
    seconds = 3 if "in progress" in broker.CANNOT else unheard * 10
    ran = tmp_path / "ran"
    both = [worker(broker, kind, "-c", "2", wait=False, **broker.redelivery(unheard)) for kind in (pool, "threads")]
    for each in both:
        ready(each)
    started = time.time()
    app.send_task("run", (str(ran), "long", seconds), queue=QUEUE)
    app.send_task("run", (str(ran), "late"), queue=QUEUE, countdown=seconds)
    wait_until(lambda: "late" in lines(ran), deadline=60)
    assert time.time() - started >= seconds
    for each in both:
        each.terminate()
    for each in both:
        assert each.wait_exit(60) == 0, each.log()
    assert sorted(lines(ran)) == ["late", "long"]
    with broker.connect(**broker.redelivery(unheard)) as connection:
        messages = consuming(connection, QUEUE)
        idle(connection, 1)
        assert (messages, size(connection, QUEUE)) == ([], 0)


def test_21_a_killed_workers_task_runs_elsewhere(broker, app, worker, tmp_path):
    """Scenario 21: the worker dies by SIGKILL, and its task is delivered again."""
    ran = tmp_path / "ran"
    first = worker(broker, "solo")
    app.send_task("run", (str(ran), "x", 1), queue=QUEUE)
    wait_until(lambda: lines(ran) == ["x"])
    first.kill()
    worker(broker, "solo", wait=False)
    wait_until(lambda: lines(ran) == ["x", "x"])


def test_34_children_publish_and_are_replaced(broker, app, worker, tmp_path):
    """Each child ends after two tasks, each of which publishes another; all run once, and the worker lives on."""
    ran = tmp_path / "ran"
    process = worker(broker, "prefork", "-c", "2", "--max-tasks-per-child", "2", **broker.redelivery(30))
    for number in range(12):
        app.send_task("spread", (str(ran), number), queue=QUEUE)
    spread = tmp_path / "ran.spread"
    wait_until(lambda: len(lines(ran)) >= 12 and len(lines(spread)) >= 12, deadline=60)
    assert app.send_task("add", (1, 2), queue=QUEUE).get(timeout=30) == 3
    assert sorted(int(line.split()[0]) for line in lines(ran)) == list(range(12))
    assert sorted(map(int, lines(spread))) == list(range(12))
    assert len({line.split()[1] for line in lines(ran)}) >= 6
    process.terminate()
    assert process.wait_exit() == 0, process.log()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_34_a_fork_leaves_the_parents_consumer_alone(broker):
    with broker.connect() as connection:
        publish(connection, ["parent"])
        messages = consuming(connection)
        came(connection, messages, 1)
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                with type(broker)(broker.url).connect(**broker.options) as child:
                    publish(child, ["child"])
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert came(connection, messages, 2) == ["parent", "child"]
        for message in messages:
            message.ack()
        publish(connection, ["after"])
        assert came(connection, messages, 3)[2] == "after"


def test_38_rpc_leaves_nothing_behind(start, worker, tmp_path):
    """Neither queues of the replies nor subscriptions and connections."""
    broker = start()
    worker(broker, "solo")  # it has one connection for replies, whatever its load

    def calls():
        for app in _app(broker):
            app.send_task("run", (str(tmp_path / "ran"), "x", 0.5), queue=QUEUE).get(timeout=30)
            results = [app.send_task("add", (number, 1), queue=QUEUE) for number in range(20)]
            assert [result.get(timeout=30) for result in results] == list(range(1, 21))
            app.backend.result_consumer.stop()

    calls()
    before, clients = broker.left(), broker.clients()
    calls()
    calls()
    wait_until(lambda: broker.left() == before, what="no other streams or keys than before")
    wait_until(lambda: broker.clients() <= clients, what="no more clients", deadline=5)


def test_38_a_result_is_there_when_it_is_asked_for_late(broker, app, worker):
    process = worker(broker, "threads")
    result = app.send_task("add", (1, 2), queue=QUEUE)
    wait_until(lambda: "succeeded" in process.log())
    assert result.get(timeout=3) == 3
    app.backend.result_consumer.stop()
