"""All of Celery's world on NATS: remote control, events, beat, canvas, and every way for a worker to end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
from celery import chain, chord, group
from kombu import Connection, Queue

from catga_tasks import Catga
from tests.waiting import wait_until

APP = """
import os, time
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["BROKER"], outbox=os.environ["OUTBOX"])
app.conf.update(
    broker_transport_options={"ack_wait": 2.0, "reconnect_grace": 1.0, "stream_prefix": os.environ["PREFIX"]},
    result_backend=os.environ["RESULTS"], worker_prefetch_multiplier=4, worker_pool_restarts=True,
    worker_proc_alive_timeout=20, outbox_poll_interval_max=0.2, outbox_publish_timeout=2, outbox_lease_timeout=4,
)
app.conf.beat_schedule = {"tick": {"task": "note", "schedule": 0.3, "args": ("tick",)}}

def say(word):
    with open("said", "a") as file:
        file.write(f"{word}\\n")

@app.task(name="note")
def note(word):
    say(word)
    return word

@app.task(name="nap")
def nap(word, seconds):
    say(f"begin {word}")
    time.sleep(seconds)
    say(f"end {word}")

@app.task(name="add")
def add(a, b):
    return a + b

@app.task(name="total")
def total(numbers):
    return sum(numbers)

@app.task(name="die")
def die(path):
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), 9)
    say("survived")

@app.task(name="long", time_limit=1)
def long():
    say("long begins")
    time.sleep(60)
"""


class Shop:
    """An application in this process, and workers of the same one as processes."""

    def __init__(self, processes, folder, nats, redis):
        self.folder = folder
        (folder / "shop.py").write_text(APP)
        outbox = f"sqlite:///{folder / 'shop.db'}"
        prefix = f"test-{uuid.uuid4().hex[:8]}"
        self.env = {"BROKER": nats, "OUTBOX": outbox, "RESULTS": redis, "PREFIX": prefix}
        self._processes = processes
        assert self.run("outbox", "migrate").wait_exit() == 0
        self.app = Catga("shop", broker=nats, outbox=outbox, set_as_current=False)
        options = {"ack_wait": 2.0, "stream_prefix": prefix}
        self.app.conf.update(broker_transport_options=options, result_backend=redis)
        self.options = options
        self.nats = nats

    def run(self, *arguments):
        return self._processes.celery("shop", *arguments, env=self.env, cwd=self.folder)

    def worker(self, name="one", *arguments, pool="prefork", concurrency=2):
        options = ("-P", pool, "-c", str(concurrency), "-l", "INFO", "-n", f"{name}@test", "--outbox-relay", *arguments)
        started = self.run("worker", *options)
        wait_until(lambda: f"{name}@test ready." in started.log(), deadline=30)
        return started

    def call(self, name, *args, **options):
        return self.app.signature(name, args).apply_async(**options)

    def said(self):
        path = self.folder / "said"
        return path.read_text().splitlines() if path.exists() else []

    def control(self, command, name="one", **options):
        return getattr(self.app.control, command)(**options, destination=[f"{name}@test"], reply=True, timeout=5)

    def inspect(self, name="one"):
        return self.app.control.inspect([f"{name}@test"], timeout=5)

    def held(self, queue="celery"):
        """Messages that some worker has and hasn't acknowledged, and those that wait."""
        with Connection(self.nats, transport_options=self.options) as connection:
            nats, settings = connection.default_channel.nats, connection.default_channel.settings
            return nats.call(nats.js.stream_info(settings.stream(queue))).state.messages


@pytest.fixture
def shop(processes, tmp_path, nats_server, redis_url):
    return Shop(processes, tmp_path, nats_server, redis_url)


@pytest.mark.timeout(120)
def test_37_remote_control(shop):
    """One worker, and everything that `celery inspect` and `celery control` ask of it."""
    shop.env["BROKER"] += ";nats://geheim@127.0.0.1:1,127.0.0.1:2"
    worker = shop.worker()
    one = "one@test"
    assert shop.app.control.ping([one], timeout=5) == [{one: {"ok": "pong"}}]
    assert "add" in shop.inspect().registered()[one]
    broker = shop.inspect().stats()[one]["broker"]
    assert (broker["transport"], broker["alternates"]) == ("nats", [shop.nats, "nats://**@127.0.0.1:1,127.0.0.1:2"])
    assert "geheim" not in worker.log()
    # A task that runs, and one that is revoked while it waits behind two others.
    for number in range(2):
        shop.call("nap", number, 1.5)
    wait_until(lambda: len([word for word in shop.said() if word.startswith("begin")]) == 2)
    assert len(shop.inspect().active()[one]) == 2
    waiting = shop.call("note", "revoked")
    wait_until(lambda: shop.inspect().reserved()[one])
    assert waiting.id in shop.control("revoke", task_id=waiting.id)[0][one]["ok"]
    wait_until(lambda: len([word for word in shop.said() if word.startswith("end")]) == 2)
    # One that is terminated.
    endless = shop.call("nap", "endless", 60)
    wait_until(lambda: "begin endless" in shop.said())
    shop.control("revoke", task_id=endless.id, terminate=True, signal="SIGKILL")
    wait_until(lambda: not shop.inspect().active()[one])
    assert "revoked" not in shop.said()
    # Queues come and go while it runs.
    shop.control("add_consumer", queue="more")
    shop.call("note", "more", queue="more")
    wait_until(lambda: "more" in shop.said())
    assert {queue["name"] for queue in shop.inspect().active_queues()[one]} == {"celery", "more"}
    shop.control("cancel_consumer", queue="more")
    shop.call("note", "never", queue="more")
    # The prefetch follows the pool: four for each process.
    assert "ok" in shop.control("pool_grow", n=1)[0][one]
    wait_until(lambda: shop.inspect().stats()[one]["prefetch_count"] == 12)
    assert "ok" in shop.control("pool_shrink", n=1)[0][one]
    wait_until(lambda: shop.inspect().stats()[one]["prefetch_count"] == 8)
    assert "ok" in shop.control("pool_restart", reload=False)[0][one]
    shop.call("note", "again")
    wait_until(lambda: "again" in shop.said())
    assert "never" not in shop.said()
    assert shop.held("more") == 1
    # One note an hour: the next ones wait, and other tasks don't.
    assert "ok" in shop.control("rate_limit", task_name="note", rate_limit="1/h")[0][one]
    for number in range(3):
        shop.call("note", f"limited {number}")
    assert shop.call("add", 1, 2).get(timeout=20) == 3
    assert len([word for word in shop.said() if word.startswith("limited")]) <= 1
    assert shop.held() >= 2
    shop.app.control.shutdown(destination=[one])
    assert worker.wait_exit(30) == 0, worker.log()
    assert "Traceback" not in worker.log(), worker.log()


@pytest.mark.timeout(120)
def test_37_autoscale(shop):
    """The pool grows with the work, and what is asked for with it; afterwards both shrink."""
    shop.worker("one", "--autoscale", "3,1", "--prefetch-multiplier", "1")
    for number in range(6):
        shop.call("nap", number, 3.0)

    def running():
        said = [word.split()[0] for word in shop.said()]
        return said.count("begin") - said.count("end")

    wait_until(lambda: running() == 3, what="three processes at work")
    wait_until(lambda: len([word for word in shop.said() if word.startswith("end")]) == 6)
    wait_until(lambda: shop.held() == 0)


@pytest.mark.timeout(60)
def test_37_celery_amqp(shop):
    """`celery amqp` declares, binds, counts, takes, purges and deletes by kombu alone."""
    with Connection(shop.nats, transport_options=shop.options) as connection:
        Queue("paid")(connection.default_channel).declare()
        connection.Producer().publish("hello", routing_key="paid")
    commands = [
        "exchange.declare orders direct", "queue.declare paid no yes", "queue.bind paid orders paid", "basic.get paid",
        "basic.ack 1", "queue.declare paid no yes", "queue.purge paid", "queue.delete paid",
    ]  # fmt: skip
    program = (sys.executable, "-m", "celery", "-A", "shop", "amqp", "repl")
    done = subprocess.run(
        program, input="\n".join(commands), text=True, capture_output=True, env={**os.environ, **shop.env},
        cwd=shop.folder, timeout=60, check=True,
    )  # fmt: skip
    assert "queue:paid messages:1" in done.stdout
    assert "queue:paid messages:0" in done.stdout
    assert "hello" in done.stdout
    assert "ERROR" not in done.stderr


@pytest.mark.timeout(120)
def test_19_a_stalled_worker_and_its_successor(shop):
    """Scenario 19: a message is delivered again while its first worker, stopped for too long, has it still. Late
    acknowledgements take nothing from anybody, and nothing stays.
    """
    workers = {name: shop.worker(name, pool="threads", concurrency=1) for name in ("one", "two")}
    shop.call("nap", "x", 4.0)
    has = wait_until(lambda: [name for name in workers if shop.inspect(name).active()[f"{name}@test"]])
    first = workers[has[0]]
    first.stop()
    wait_until(lambda: shop.said().count("begin x") >= 2, what="the second delivery")
    first.cont()
    wait_until(lambda: shop.held() == 0)
    wait_until(lambda: shop.said().count("end x") == shop.said().count("begin x"))
    shop.call("note", "afterwards")
    wait_until(lambda: "afterwards" in shop.said())
    wait_until(lambda: shop.held() == 0)
    assert all(worker.alive() for worker in workers.values())


@pytest.mark.timeout(120)
def test_23_the_server_restarts(processes, tmp_path, own_nats, redis_url):
    """Scenario 23: killed twice, once for longer than goes unnoticed: every task runs, and none stays in hand."""
    server = own_nats()
    shop = Shop(processes, tmp_path, server.url, redis_url)
    worker = shop.worker()

    def enqueue(numbers):
        for number in numbers:
            shop.call("nap", number, 0.05)

    enqueue(range(40))
    wait_until(lambda: "end 3" in shop.said())
    server.restart()
    enqueue(range(40, 60))
    wait_until(lambda: "end 45" in shop.said())
    server.kill()
    enqueue(range(60, 80))
    wait_until(lambda: "reconnect_grace" in worker.log(), what="an outage that the worker notices")
    server.start()
    wait_until(lambda: {f"end {number}" for number in range(80)} <= set(shop.said()), what="every task", deadline=60)
    wait_until(lambda: shop.held() == 0, what="nothing left unacknowledged")
    assert worker.alive()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("pool", "number", "arguments"),
    [("prefork", signal.SIGTERM, ()), ("threads", signal.SIGTERM, ()), ("solo", signal.SIGTERM, ()),
     ("prefork", signal.SIGQUIT, ()), ("prefork", signal.SIGKILL, ())],
    ids=["warm-prefork", "warm-threads", "warm-solo", "cold-prefork", "killed"],
)  # fmt: skip
def test_39_a_worker_that_ends_gives_back_what_it_did_not_run(shop, pool, number, arguments):
    """Scenario 21: its tasks run elsewhere; those that a warm shutdown lets finish run once."""
    first = shop.worker("one", *arguments, pool=pool, concurrency=2)
    for each in range(12):
        shop.call("nap", each, 0.5)
    wait_until(lambda: any(word.startswith("begin") for word in shop.said()))
    first.signal(number)
    assert first.wait_exit(30) == {signal.SIGTERM: 0, signal.SIGQUIT: 0, signal.SIGKILL: -9}[number], first.log()
    first.kill()
    second = shop.worker("two", pool="threads", concurrency=4)
    ended = {f"end {each}" for each in range(12)}
    wait_until(lambda: ended <= set(shop.said()), deadline=30, what="every task, here or there")
    wait_until(lambda: shop.held() == 0, what="nothing left unacknowledged")
    if number == signal.SIGTERM:
        assert len([word for word in shop.said() if word.startswith("end")]) == 12
    assert second.alive()


@pytest.mark.timeout(120)
def test_39_a_soft_shutdown_waits_and_gives_back(shop):
    """Scenario 21, `worker_soft_shutdown_timeout`: cold after this long; what was cut off runs again elsewhere."""
    (shop.folder / "shop.py").write_text(APP + "\napp.conf.worker_soft_shutdown_timeout = 1.0\n")
    first = shop.worker("one", concurrency=1)
    for each in range(3):
        shop.call("nap", each, 8.0)
    wait_until(lambda: "begin 0" in shop.said())
    first.signal(signal.SIGQUIT)
    assert first.wait_exit(30) == 0, first.log()
    assert "end 0" not in shop.said()
    shop.worker("two", pool="threads", concurrency=4)
    wait_until(lambda: {f"end {each}" for each in range(3)} <= set(shop.said()), deadline=30)


@pytest.mark.timeout(120)
def test_21_a_killed_child_and_a_hard_time_limit(shop):
    """Scenario 21: the child's task runs again in another; one that is too long fails, and the worker goes on."""
    shop.worker(concurrency=1)
    shop.call("die", str(shop.folder / "died"))
    wait_until(lambda: "survived" in shop.said(), deadline=30)
    result = shop.call("long")
    with pytest.raises(Exception, match="TimeLimitExceeded"):
        result.get(timeout=30)
    shop.call("note", "afterwards")
    wait_until(lambda: "afterwards" in shop.said())
    wait_until(lambda: shop.held() == 0)


@pytest.mark.timeout(120)
def test_canvas_events_and_beat(shop):
    """A chain, a group and a chord have results; a receiver sees their events; beat's tasks run."""
    shop.worker("one", "-E", concurrency=2)
    add, total = shop.app.signature("add"), shop.app.signature("total")
    seen = []

    def receive():
        with shop.app.connection_for_read() as connection:
            receiver = shop.app.events.Receiver(connection, handlers={"*": seen.append})
            receiver.capture(limit=None, timeout=None, wakeup=False)

    threading.Thread(target=receive, daemon=True).start()
    wait_until(lambda: any(event["type"] == "worker-heartbeat" for event in seen), deadline=20)
    assert chain(add.clone((1, 2)), add.clone((3,))).apply_async().get(timeout=20) == 6
    assert group(add.clone((n, n)) for n in range(5)).apply_async().get(timeout=20) == [0, 2, 4, 6, 8]
    assert chord([add.clone((n, n)) for n in range(5)], total).apply_async().get(timeout=20) == 20
    wait_until(lambda: len([event for event in seen if event["type"] == "task-succeeded"]) >= 13)
    assert {"task-received", "task-started", "task-succeeded"} <= {event["type"] for event in seen}
    shop.run("beat", "-l", "INFO", "-s", str(shop.folder / "schedule"))
    wait_until(lambda: shop.said().count("tick") >= 3, deadline=30)


@pytest.mark.timeout(60)
def test_35_inside_a_running_loop(shop):
    """A handler of a web framework calls `delay()`, also of a task that goes straight to the broker."""
    shop.worker(pool="solo", concurrency=1)
    shop.app.task(name="note", shared=False)(note)
    shop.app.task(name="direct", delivery="at_most_once", shared=False)(note)

    async def handler(number):
        await asyncio.sleep(0)
        shop.app.tasks["note"].delay(f"outbox {number}")
        shop.app.signature("note", (f"direct {number}",)).apply_async()
        shop.app.send_task("note", (f"sent {number}",), connection=shop.app.connection_for_write())

    async def serve():
        started = time.monotonic()
        await asyncio.gather(*(handler(number) for number in range(5)))
        return time.monotonic() - started

    assert asyncio.run(serve()) < 20
    wait_until(lambda: len(set(shop.said())) == 15, deadline=20)


def test_25_a_pool_of_greenlets_is_refused(shop):
    """In one line that names the pools that work."""
    worker = shop.run("worker", "-P", "gevent")
    assert worker.wait_exit(30) != 0
    assert "nats:// doesn't work with gevent: start the worker with -P prefork, threads or solo." in worker.log()
    assert "Traceback" not in worker.log()


def note(word):
    return word
