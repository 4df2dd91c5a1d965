"""Relays as real processes, forked from a parent that has imported everything, and the site that they work on.

Run as a script, this is that parent: it takes one JSON order a line and answers each with one line. A relay is up
0.05 s after the order, so a test can kill dozens.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Self

ROOT = Path(__file__).parent.parent.parent
#: A relay's pauses in an outage, first and longest, in seconds; the real ones would make the tests slow.
OUTAGE = (0.05, 0.4)
#: What a child was doing, in the one byte of its phase file.
CLAIM, PUBLISH, SETTLE, REST = b"c", b"p", b"s", b"r"
SETTINGS = {
    "outbox_batch_size": 20,
    "outbox_retry_backoff": 0.01,
    "outbox_retry_backoff_max": 0.05,
    "outbox_publish_timeout": 5.0,
    "outbox_poll_interval_max": 0.2,
}


# The child --------------------------------------------------------------------------------------------------------


class Hooks:
    """What a test wants of one relay: to know what it does, and to have it die, stop or wait at a certain point."""

    def __init__(self, options: dict) -> None:
        self._events = os.open(options["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._at = options.get("at")
        self._gate = options.get("gate")
        self._phase = None
        if options.get("phases"):
            file = os.open(options["phases"], os.O_RDWR)
            self._phase = mmap.mmap(file, 1)

    def event(self, kind: str, **fields: object) -> None:
        line = json.dumps({"event": kind, "at": time.monotonic(), **fields})
        os.write(self._events, line.encode() + b"\n")

    def reach(self, point: str, rows: object = ()) -> None:
        at = self._at
        if at and at["point"] == point and ("marker" not in at or _holds(rows, at["marker"])):
            if at.get("once", True):
                self._at = None
            self.event("reached", point=point)
            if at["do"] == "sleep":
                time.sleep(at["seconds"])
            elif at["do"] == "raise":
                raise RuntimeError("Nobody expects this: \0 \udce9.")
            else:
                os.kill(os.getpid(), getattr(signal, at["do"]))
        gate = self._gate
        if gate and gate["point"] == point and os.path.exists(gate["file"]):  # noqa: PTH110 - in a loop
            self.event("gated", point=point, rows=len(rows))
            while os.path.exists(gate["file"]):  # noqa: PTH110
                time.sleep(0.002)

    def phase(self, what: bytes) -> None:
        if self._phase is not None:
            self._phase[0:1] = what

    def attach(self, relay: object, module: object) -> None:
        claims, publisher = relay.lanes[0]._claims, relay.lanes[0]._publisher
        take, claim, settle, publish = claims.take, claims._claim, claims.settle, publisher.publish
        delay = module.retry.delay

        def taking():
            self.phase(CLAIM)
            rows = take()
            if not rows:
                self.phase(REST)
            return rows

        def claiming(work):
            self.reach("before_claim")
            return claim(work)

        def publishing(rows):
            self.phase(PUBLISH)
            self.reach("before_publish", rows)
            started = time.monotonic()
            receipt = publish(rows)
            took = time.monotonic() - started
            self.event("published", rows=len(rows), took=took, outage=receipt.outage)
            self.phase(SETTLE)
            self.reach("after_publish", rows)
            return receipt

        def settling(confirmed, rejected):
            dead = settle(confirmed, rejected)
            self.event("settled", rows=len(confirmed))
            self.phase(REST)
            return dead

        def waiting(failures, *, base, maximum):
            seconds = delay(failures, base=base, maximum=maximum)
            self.event("outage", failures=failures, seconds=seconds, ceiling=min(maximum, base * 2 ** (failures - 1)))
            return seconds

        claims.take, claims._claim, claims.settle, publisher.publish = taking, claiming, settling, publishing
        module.retry = SimpleNamespace(delay=waiting)


def _holds(rows: object, marker: str) -> bool:
    return any(marker.encode() in row.envelope.body for row in rows)


def relay_child(options: dict, ready: int) -> None:
    """Run one relay until it is stopped: the first SIGTERM asks, the second one ends it at once."""
    import logging

    from catga_tasks import relay as module

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    module.OUTAGE_SECONDS = tuple(options.get("outage", OUTAGE))
    relay = make_app(options["outbox"], options["broker"], **options.get("settings", {})).relay(
        queues=options.get("queues", ())
    )
    Hooks(options).attach(relay, module)

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        relay.stop()

    signal.signal(signal.SIGTERM, stop)
    os.write(ready, b".")
    os.close(ready)
    relay.run()


def make_app(outbox: str, broker: str, **settings: object):
    from catga_tasks import Catga

    app = Catga("chaos", broker=broker, outbox=outbox, set_as_current=False)
    app.conf.update({**SETTINGS, **settings})
    return app


def serve() -> None:
    """Fork relays, and wait for them, by the orders on stdin."""
    for line in sys.stdin:
        order = json.loads(line)
        answer = _reap(order["wait"], order["deadline"]) if "wait" in order else _fork(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(options: dict) -> int:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from workers.servers import die_with_parent

            die_with_parent()
            os.close(reader)
            log = os.open(options["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            relay_child(options, writer)
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it is the child's end
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid


def _reap(pid: int, deadline: float) -> int | None:
    end = time.monotonic() + deadline
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def shift_clock(seconds: float) -> None:
    """Set this process' clock wrong: time.time and datetime.now, before anything else is imported."""
    import datetime as dt

    right, real = time.time, dt.datetime

    class Clocked(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Shifted(real, metaclass=Clocked):
        __slots__ = ()

        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
            return real.fromtimestamp(right() + seconds, tz)

        @classmethod
        def utcnow(cls) -> dt.datetime:
            return real.fromtimestamp(right() + seconds, dt.UTC).replace(tzinfo=None)

    time.time = lambda: right() + seconds
    time.time_ns = lambda: int((right() + seconds) * 1_000_000_000)
    dt.datetime = Shifted


# The test's side --------------------------------------------------------------------------------------------------


class Nursery:
    """The parent of the relays. One order at a time."""

    def __init__(self, *, clock: float = 0.0) -> None:
        from workers.servers import die_with_parent

        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.relay_children", str(clock)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def order(self, **order: object) -> object:
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Child:
    """One relay process."""

    def __init__(self, nursery: Nursery, pid: int, directory: Path, name: str) -> None:
        self.pid = pid
        self._nursery = nursery
        self._log = directory / f"{name}.log"
        self._events = directory / f"{name}.events"
        self.code: int | None = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def events(self, kind: str) -> list[dict]:
        if not self._events.exists():
            return []
        lines = self._events.read_text().split("\n")[:-1]
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def signal(self, number: int) -> None:
        assert self.code is None, "a reaped pid may be another process' by now"
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.code is None:
            self.signal(signal.SIGKILL)
            self.wait()

    def wait(self, deadline: float = 20) -> int:
        """Return the exit code, negative for a signal."""
        if self.code is None:
            self.code = self._nursery.order(wait=self.pid, deadline=deadline)
        assert self.code is not None, f"relay {self.pid} is still there after {deadline:g} s:\n{self.log()[-3000:]}"
        return self.code

    def exited(self) -> bool:
        if self.code is None:
            self.code = self._nursery.order(wait=self.pid, deadline=0)
        return self.code is not None

    def stopped(self) -> bool:
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"


class Site:
    """A database with the outbox's tables, a broker, an application that enqueues, and relays."""

    def __init__(self, nursery: Nursery, outbox: str, broker: str, directory: Path) -> None:
        import redis
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        from catga_tasks import migrate

        self.outbox_url, self.broker_url, self.directory = outbox, broker, directory
        self.nursery = nursery
        self.app = make_app(outbox, broker)
        self.task = self.app.task(name="chaos.task")(_nothing)
        self.engine = create_engine(outbox, poolclass=NullPool)
        self.redis = redis.Redis.from_url(broker) if broker.startswith("redis:") else None
        self.children: list[Child] = []
        migrate.upgrade(self.engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for child in self.children:
            child.kill()
        self.app.outbox.engine.dispose()
        if self.redis:
            self.redis.close()

    def relay(self, *, nursery: Nursery | None = None, **options: object) -> Child:
        """Start a relay; `options` are those of `Hooks`, `settings` and `queues`."""
        name = f"relay-{len(self.children)}-{uuid.uuid4().hex[:6]}"
        files = {"log": str(self.directory / f"{name}.log"), "events": str(self.directory / f"{name}.events")}
        nursery = nursery or self.nursery
        pid = nursery.order(outbox=self.outbox_url, broker=self.broker_url, **files, **options)
        child = Child(nursery, pid, self.directory, name)
        self.children.append(child)
        return child

    def enqueue(self, count: int, argument: object = "x", *, rollback: bool = False, **options: object) -> list[str]:
        """Enqueue in one transaction and commit it, or roll it back; return the ids."""
        with self.app.outbox.engine.connect() as connection:
            transaction = connection.begin()
            with self.app.outbox.join(connection):
                ids = [self.task.apply_async((argument,), **options).id for _ in range(count)]
                if rollback:
                    transaction.rollback()
                else:
                    transaction.commit()
        return ids

    def insert(self, count: int, *, argument: str = "x", **columns: object) -> list[str]:
        """Write rows by SQL, as no producer would: without a wake-up, with any column set."""
        with self.engine.begin() as connection:
            return insert(connection, count, argument=argument, **columns)

    def execute(self, statement: str, **parameters: object) -> list:
        from sqlalchemy import text

        with self.engine.begin() as connection:
            found = connection.execute(text(statement), parameters)
            return found.all() if found.returns_rows else []

    def pending(self) -> int:
        return self.execute("SELECT count(*) FROM catga_outbox")[0][0]

    def delivered(self, queue: str = "celery") -> list[str]:
        """Return the ids in the broker's queue, the oldest first."""
        messages = reversed(self.redis.lrange(queue, 0, -1)) if self.redis else self._stored(queue)
        return [json.loads(message)["headers"]["id"] for message in messages]

    def _stored(self, queue: str) -> list[bytes]:
        """Return the messages in the queue's stream, on NATS."""
        with self.app.connection_for_read() as connection:
            nats = connection.default_channel.nats
            if not nats.call(nats.streams.exists(queue)):
                return []
            stream = nats.settings.stream(queue)
            state = nats.call(nats.js.stream_info(stream)).state
            numbers = range(state.first_seq, state.last_seq + 1)
            return [nats.call(nats.js.get_msg(stream, number)).data for number in numbers]

    def dead(self) -> dict[str, object]:
        return {row.task_id: row for row in self.execute("SELECT * FROM catga_dead_letters")}

    def drained(self, *, deadline: float = 30) -> None:
        """Wait until no row is left."""
        from tests.waiting import wait_until

        try:
            wait_until(lambda: self.pending() == 0, deadline=deadline, what="an empty outbox")
        except AssertionError as error:
            logs = "\n".join(f"--- {child.pid}\n{child.log()[-1500:]}" for child in self.children[-3:])
            raise AssertionError(f"{error}; {self.pending()} left\n{logs}") from None

    def gate(self) -> Path:
        """Return a file; a relay with this gate waits while it exists."""
        file = self.directory / f"gate-{uuid.uuid4().hex[:6]}"
        file.touch()
        return file


def _nothing(argument: object) -> None:
    """The task: its messages are counted, never run."""


def insert(connection: object, count: int, *, argument: str = "x", **columns: object) -> list[str]:
    """Write rows by SQL on this connection and return their task ids."""
    from sqlalchemy import text

    ids = [str(uuid.uuid4()) for _ in range(count)]
    rows = [
        {
            "task_id": task_id, "task": "chaos.task", "queue": "celery", "exchange": "", "routing_key": "celery",
            "priority": 0, "content_type": "application/json", "content_encoding": "utf-8",
            "headers": json.dumps({"lang": "py", "task": "chaos.task", "id": task_id}), "properties": "{}",
            "body": json.dumps([[argument], {}, {}]).encode(), "send_event": False, **columns,
        }
        for task_id in ids
    ]  # fmt: skip
    names = list(rows[0])
    values = ", ".join(f":{name}" for name in names)
    connection.execute(text(f"INSERT INTO catga_outbox ({', '.join(names)}) VALUES ({values})"), rows)
    return ids


def tell(*words: object) -> None:
    """Show a run's counts, with pytest's -s or -rP."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


@contextlib.contextmanager
def background(work):
    """Run `work(stopping)` in a thread for the length of the block; its error is the block's."""
    stopping, errors = threading.Event(), []

    def run() -> None:
        try:
            work(stopping)
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(60)
    assert not thread.is_alive(), "the background thread hangs"
    if errors:
        raise errors[0]


if __name__ == "__main__":
    if float(sys.argv[1]):
        shift_clock(float(sys.argv[1]))
    for name in ("kombu.transport.redis", "sqlalchemy.dialects.postgresql.psycopg", "psycopg", "catga_tasks.relay"):
        importlib.import_module(name)
    make_app("postgresql+psycopg://127.0.0.1/none", "redis://127.0.0.1/0").outbox.engine.dispose()
    serve()
