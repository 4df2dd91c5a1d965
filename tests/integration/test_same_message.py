"""With ids and clock held still, the stored row that the relay publishes is the message that plain Celery sends.

`test_byte_for_byte` names what is random by its order; here nothing is random: both applications draw the same ids,
have the same oid (`reply_to`) and read the same clock, and everything in Redis is compared, the result backend too.
Two things are left that can't be the same: the delivery tag, which is new for each publish, and the second in which a
gzip body was compressed, four bytes of it.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import importlib
import itertools
import json
import re
import threading
import time as clock
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from celery import Celery, chain, chord, group
from celery.beat import ScheduleEntry, Scheduler
from celery.contrib.testing.worker import start_worker
from celery.schedules import schedule
from kombu import Exchange, Queue, pools
from redis import Redis
from sqlalchemy import text
from sqlalchemy.orm import Session

from catga_tasks import Catga
from tests.waiting import wait_until

NOW = datetime(2040, 2, 29, 12, 30, 15, 250, tzinfo=UTC)
PAST = datetime(2020, 2, 29, 12, 30, 15, tzinfo=UTC)
TAG = re.compile(rb'"delivery_tag": "[^"]+"')
LIFE = re.compile(rb'"expiration": "(\d+)"')
BODY = re.compile(rb'"body": "([^"]*)"')


def define(app):
    """The same tasks for both applications."""

    @app.task(name="charge", shared=False)
    def charge(*args, **kwargs):
        return list(args)

    @app.task(name="again", shared=False, bind=True, max_retries=3)
    def again(self, order, countdown):
        if not self.request.retries:
            raise self.retry(countdown=countdown, queue="after", exc=ValueError("out of stock"))

    @app.task(name="fails", shared=False)
    def fails(order):
        raise ValueError(order)

    @app.task(name="calls", shared=False)
    def calls(order):
        app.tasks["charge"].apply_async((order,), queue="after")

    @app.task(name="replaces", shared=False, bind=True)
    def replaces(self, order):
        self.replace(on(app, order, queue="after"))

    return app


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def plain(redis_url):
    return Celery("shop", broker=redis_url, set_as_current=False)


@pytest.fixture
def ours(redis_url, engine):
    return Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)


@pytest.fixture
def prepare(redis_url, monkeypatch):
    """Give an application the tasks, these settings, the ids from 1 on, an oid and a clock that stands."""

    def prepare(app, *, backend=False, **conf):
        app.conf.update(conf, result_backend=redis_url if backend else None)
        # Plain Celery's results unsubscribe when they go, also from a server that went before them.
        app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_start": 0.01}}
        app.now = lambda: NOW
        # Connections of a process are pooled by address, and remember what they declared before Redis was emptied.
        pools.reset()
        monkeypatch.setattr("celery.app.base.oid_from", lambda *_, **__: "00000000-0000-3000-8000-000000000000")
        numbers = itertools.count(1)
        for module in ("celery.canvas", "celery.app.base", "celery.app.task"):
            monkeypatch.setattr(importlib.import_module(module), "uuid", lambda: str(UUID(int=next(numbers))))
        return define(app)

    return prepare


@pytest.fixture
def both(plain, ours, prepare, redis):
    """Send by plain Celery and by ours; return all that is in Redis after each."""

    def both(send, *, backend=False, bound=(), **conf):
        declare(prepare(plain, backend=backend, **conf), bound)
        send(plain)
        expected = everything(redis)
        redis.flushdb()
        declare(prepare(ours, backend=backend, **conf), bound)
        before = everything(redis)
        send(ours)
        assert everything(redis) == before
        assert ours.relay().run_once() >= 1
        return everything(redis), expected

    return both


def declare(app, queues):
    with app.connection_for_write() as connection:
        for queue in queues:
            queue(connection).declare()


def everything(redis):
    read = {
        b"list": lambda key: [still(entry) for entry in redis.lrange(key, 0, -1)],
        b"set": redis.smembers,
        b"string": lambda key: (redis.get(key), redis.ttl(key) > 0),
        b"hash": redis.hgetall,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }
    return {key: read[redis.type(key)](key) for key in redis.keys("*")}


def still(entry):
    """Rename what is random; all else stays, down to the order and the spaces of the JSON."""
    entry = TAG.sub(b'"delivery_tag": "TAG"', entry)
    body = BODY.search(entry)[1]
    content = base64.b64decode(body)
    if content.startswith(b"\x1f\x8b"):
        entry = entry.replace(body, base64.b64encode(content[:4] + bytes(4) + content[8:]))
    return entry


def same(found):
    sent, expected = found
    assert sorted(sent) == sorted(expected)
    assert any(isinstance(value, list) for value in expected.values()), "plain Celery sent nothing"
    for key, value in expected.items():
        assert sent[key] == value, key


def only(content, queue=b"celery"):
    [entry] = content[queue]
    return entry


def on(app, *args, **options):
    return app.tasks["charge"].s(*args).set(**options)


def apply(**options):
    return lambda app: app.tasks["charge"].apply_async((1, "é"), {"times": 2}, **options)


# Options of a call

CALLS = {
    "delay": lambda app: app.tasks["charge"].delay(1, times=2),
    "no arguments": lambda app: app.tasks["charge"].delay(),
    "long arguments": lambda app: app.tasks["charge"].delay("x" * 5000, list(range(500))),
    "task_id": apply(task_id="order-1"),
    "headers": apply(headers={"tenant": "é", "n": 1, "deep": {"list": [1, None, 1.5, "%s"]}}),
    "json": apply(serializer="json"),
    "pickle": apply(serializer="pickle"),
    "yaml": apply(serializer="yaml"),
    "gzip": apply(compression="gzip"),
    "zlib": apply(compression="zlib"),
    "bzip2": apply(compression="bzip2"),
    "pickle and zlib": apply(serializer="pickle", compression="zlib"),
    "priority": apply(priority=6),
    "priority 0": apply(priority=0),
    "countdown 0": apply(countdown=0),
    "queue": apply(queue="slow"),
    "queue and routing_key": apply(queue="slow", routing_key="slow"),
    "queue object": apply(queue=Queue("own", Exchange("own", type="topic"), routing_key="own.#"), routing_key="own.it"),
    "routing_key": apply(exchange="", routing_key="slow"),
    "link": lambda app: apply(link=on(app, 3))(app),
    "links": lambda app: apply(link=[on(app, 3), on(app, 4, queue="slow")])(app),
    "link_error": lambda app: apply(link_error=on(app, 3))(app),
    "ignore_result": apply(ignore_result=True),
    "stamped_headers": apply(stamped_headers=["tenant"], tenant="t"),
    "time_limit": apply(time_limit=20),
    "soft_time_limit": apply(soft_time_limit=10),
    "shadow": apply(shadow="charge the customer"),
    "group_id": apply(group_id="orders", group_index=3),
    "reply_to": apply(reply_to="somewhere"),
    "root_id": apply(root_id="root"),
    "parent_id": apply(parent_id="parent"),
    "correlation_id": apply(correlation_id="c"),
    "retry": apply(retry=True, retry_policy={"max_retries": 1}),
    "argsrepr": apply(argsrepr="(secret)", kwargsrepr="{}"),
    "send_task": lambda app: app.send_task("unknown.task", (1,), {"a": 2}, queue="slow"),
    "send_task of ours": lambda app: app.send_task("charge", [1], priority=3, headers={"a": 1}),
    "signature": lambda app: app.signature("charge", (1,), options={"queue": "slow"}).apply_async((2,)),
    "immutable signature": lambda app: app.signature("charge", (1,), immutable=True).apply_async((2,), priority=4),
    "signature from JSON": lambda app: app.signature(json.loads(json.dumps(on(app, 1, shadow="s")))).delay(2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call(both, call):
    same(both(CALLS[call]))


SETTINGS = [
    {"task_serializer": "pickle"}, {"task_compression": "zlib"}, {"task_default_queue": "shop"},
    {"task_default_priority": 3}, {"task_protocol": 1}, {"task_routes": {"charge": {"queue": "fast", "priority": 3}}},
    {"task_queues": [Queue("celery", queue_arguments={"x-max-priority": 9})]}, {"task_default_delivery_mode": 1},
    {"enable_utc": False, "timezone": "Europe/Berlin"}, {"task_ignore_result": True}, {"task_send_sent_event": True},
    {"task_inherit_parent_priority": True}, {"task_create_missing_queues": True},
]  # fmt: skip


@pytest.mark.parametrize("conf", SETTINGS, ids=lambda conf: next(iter(conf)))
def test_a_setting(both, conf):
    same(both(CALLS["delay"], **conf))


@pytest.mark.parametrize("exchange", ["orders", Exchange("orders", type="topic")], ids=["name", "object"])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_an_exchange(both, exchange, declared):
    """An exchange of the caller's: the message goes to the queues that somebody has bound to it."""
    topic = Exchange("orders", type="topic")
    queues = [Queue("paid", topic, routing_key="order.paid"), Queue("all", topic, routing_key="order.#")]
    call = apply(exchange=exchange, routing_key="order.paid")
    same(both(call, bound=queues, **({"task_queues": [Queue("celery"), *queues]} if declared else {})))


def test_msgpack(both):
    same(both(apply(serializer="msgpack")))


# Times: the relay counts them on, so the message differs by a rule


@pytest.mark.parametrize("expires", [90, 90.5, NOW + timedelta(seconds=90)], ids=["seconds", "fraction", "datetime"])
def test_a_time_to_live_runs_while_the_row_waits(both, ours, expires):
    """The header stays as Celery wrote it; AMQP's expiration is what is left."""
    started = clock.monotonic()
    sent, expected = both(apply(expires=expires))
    waited = 1000 * (clock.monotonic() - started)
    before, after = (int(LIFE.search(only(content))[1]) for content in (expected, sent))
    # SQLite's clock, which ages the row, is in steps of a millisecond or coarser.
    assert before - waited - 1000 <= after <= before
    assert LIFE.sub(b"", only(sent)) == LIFE.sub(b"", only(expected))


def moved(entry):
    """A plain message with its ETA where the relay puts it once it has come."""
    message = json.loads(entry)
    eta = message["headers"]["eta"]
    assert eta is not None
    return entry.replace(f'"eta": "{eta}"'.encode(), b'"eta": null').replace(
        b'}, "properties": ', f', "catga_eta": "{eta}"}}, "properties": '.encode()
    )


def test_an_eta_in_the_past_is_moved(both):
    sent, expected = both(apply(eta=PAST))
    assert only(sent) == moved(only(expected))


@pytest.mark.parametrize("how", ["countdown", "eta"])
def test_an_eta_is_held_by_the_outbox_and_then_moved(plain, ours, prepare, redis, how):
    """The row waits by the database's clock; then a worker has nothing to hold."""
    eta = datetime.now(UTC) + timedelta(seconds=1.5)
    send = apply(countdown=1.5) if how == "countdown" else apply(eta=eta)
    send(prepare(plain))
    expected = only(everything(redis))
    redis.flushdb()
    send(prepare(ours))
    assert ours.relay().run_once() == 0
    assert redis.keys("*") == []
    wait_until(lambda: ours.relay().run_once() == 1, what="the countdown's end")
    assert only(everything(redis)) == moved(expected)


# Canvas

CANVAS = {
    "chain": lambda app: chain(on(app, 1), on(app, 2, queue="slow"), on(app, 3)),
    "chain of one": lambda app: chain(on(app, 1)),
    "group": lambda app: group(on(app, number) for number in range(3)),
    "group in queues": lambda app: group(on(app, 1, queue="slow"), on(app, 2, priority=3)),
    "chord": lambda app: chord([on(app, 1), on(app, 2)], on(app, 3)),
    "chord of one": lambda app: chord([on(app, 1)], on(app, 2)),
    "chord with link_error": lambda app: chord([on(app, 1), on(app, 2)], on(app, 3).on_error(on(app, 4))),
    "chord of groups": lambda app: chord([group(on(app, 1), on(app, 2)), on(app, 3)], on(app, 4)),
    "chord of chains": lambda app: chord([chain(on(app, 1), on(app, 2)), on(app, 3)], on(app, 4)),
    "chord in a chain": lambda app: chain(on(app, 0), chord([on(app, 1), on(app, 2)], on(app, 3))),
    "group, then a task": lambda app: group(on(app, 1), on(app, 2)) | on(app, 3),
    "group, then a chain": lambda app: group(on(app, 1), on(app, 2)) | on(app, 3) | group(on(app, 4), on(app, 5)),
    "nested": lambda app: chain(on(app, 0), group(on(app, 1), chain(on(app, 2), on(app, 3))), on(app, 4)),
    "nested chords": lambda app: chord([chord([on(app, 1), on(app, 2)], on(app, 3)), on(app, 4)], on(app, 5)),
    "groups in a group": lambda app: group(group(on(app, 1), on(app, 2)), group(on(app, 3), chain(on(app, 4)))),
    "chunks": lambda app: app.tasks["charge"].chunks(zip(range(5), strict=False), 2),
    "map": lambda app: app.tasks["charge"].map([1, 2]),
    "starmap": lambda app: app.tasks["charge"].starmap([(1, 2), (3, 4)]),
    "stamped": lambda app: stamped(chain(on(app, 1), group(on(app, 2), on(app, 3)))),
}
#: A chord needs a result backend.
ANYWHERE = ("chain", "chain of one", "group", "group in queues", "groups in a group", "chunks", "map", "stamped")


def stamped(signature):
    signature.stamp(tenant="t")
    return signature


@pytest.mark.parametrize("canvas", ANYWHERE)
def test_a_canvas(both, canvas):
    same(both(lambda app: CANVAS[canvas](app).apply_async()))


@pytest.mark.parametrize("canvas", CANVAS)
def test_a_canvas_with_a_result_backend(both, canvas):
    """The backend's keys are the same too: a chord's size, a saved group."""
    same(both(lambda app: CANVAS[canvas](app).apply_async(), backend=True))


@pytest.mark.parametrize("canvas", CANVAS)
def test_18_a_committed_canvas_leaves_what_celery_would(both, engine, canvas):
    """All of it is stored by the commit, and nothing is in Redis until the relay has run."""

    def send(app):
        if not isinstance(app, Catga):
            CANVAS[canvas](app).apply_async()
            return
        with Session(engine) as session, session.begin(), app.outbox.join(session):
            CANVAS[canvas](app).apply_async()

    same(both(send, backend=True))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM catga_outbox")).scalar_one() == 0


# Beat


@pytest.mark.parametrize(
    "options", [{}, {"queue": "slow", "priority": 3, "headers": {"a": 1}}], ids=["plain", "options"]
)
@pytest.mark.parametrize("task", ["charge", "unknown.task"])
@pytest.mark.parametrize("given", [True, False], ids=["producer", "no producer"])
def test_an_entry_of_the_schedule(both, task, options, given):
    """`celery beat` hands its own producer over; an unknown task goes by name."""

    def send(app):
        entry = ScheduleEntry(
            "nightly", task, schedule=schedule(60), args=(1,), kwargs={"a": 2}, options={**options}, app=app
        )
        scheduler = Scheduler(app=app, lazy=True)
        with app.connection_for_write() as connection:
            producer = app.amqp.Producer(connection, auto_declare=False) if given else scheduler.producer
            scheduler.apply_async(entry, producer=producer, advance=False)

    same(both(send))


# What a worker sends


@contextlib.contextmanager
def running(app, pool="solo", **options):
    """A worker in this process, and a relay for ours."""
    relay = app.relay() if isinstance(app, Catga) else None
    thread = threading.Thread(target=relay.run) if relay else None
    if thread:
        thread.start()
    try:
        with start_worker(app, perform_ping_check=False, pool=pool, shutdown_timeout=30, **options):
            yield
    finally:
        if thread:
            relay.stop()
            thread.join(30)


@pytest.fixture
def worked(plain, ours, prepare, redis):
    """Run the tasks that this sends; return what they left in the queue `after`, of Celery and of ours."""

    def worked(send, **conf):
        found = []
        for app in (plain, ours):
            prepare(app, backend=True, worker_hijack_root_logger=False, **conf)
            # The order in which the worker takes over is part of a message's parents: all wait when it starts.
            send(app)
            if isinstance(app, Catga):
                app.relay().run_once()
            with running(app):
                wait_until(lambda: redis.llen("after") >= 1, what="a message of the worker's")
            found.append([still(entry) for entry in redis.lrange("after", 0, -1)])
            redis.flushdb()
        return found

    return worked


WORK = {
    "a task's task": lambda app: app.tasks["calls"].delay(1),
    "retry": lambda app: app.tasks["again"].delay(1, 0),
    "replace": lambda app: app.tasks["replaces"].delay(1),
    "link": lambda app: apply(link=on(app, 2, queue="after"))(app),
    "link of a link": lambda app: apply(link=on(app, 2, link=[on(app, 3, queue="after")]))(app),
    "link_error": lambda app: app.tasks["fails"].apply_async(
        (1,), link_error=app.tasks["fails"].s().set(queue="after")
    ),
    "chain": lambda app: chain(on(app, 1), on(app, 2), on(app, 3, queue="after")).apply_async(),
    "chord": lambda app: chord([on(app, 1), on(app, 2)], on(app, 3, queue="after")).apply_async(),
    "chain into a chord": lambda app: chain(
        on(app, 0), chord([on(app, 1), on(app, 2)], on(app, 3, queue="after"))
    ).apply_async(),
    "nested": lambda app: chain(
        on(app, 0), group(on(app, 1), chain(on(app, 2), on(app, 3))), on(app, 4, queue="after")
    ).apply_async(),
    "stamped chain": lambda app: stamped(chain(on(app, 1), on(app, 2, queue="after"))).apply_async(),
}


@pytest.mark.parametrize("work", WORK)
def test_what_a_worker_sends(worked, work):
    expected, sent = worked(WORK[work])
    assert sent == expected


def test_a_retry_with_a_countdown(worked):
    [expected], [sent] = worked(lambda app: app.tasks["again"].delay(1, 0.5))
    assert sent == moved(expected)


# Arguments


class Colour(enum.StrEnum):
    RED = "red"


ARGUMENTS = [
    UUID(int=7),
    NOW,
    PAST.replace(tzinfo=None),
    date(2026, 1, 2),
    time(3, 4, 5, 6),
    Decimal("1.10"),
    b"text",
    b"\x00\xff",
    'é%s{}"\\\u2028',
    1 << 70,
    float("inf"),
    {"deep": [UUID(int=8), {"at": NOW}]},
    None,
]


@pytest.fixture
def noting(ours):
    """An application whose task notes what it is given."""
    seen = []

    @ours.task(name="note", shared=False)
    def note(*args, **kwargs):
        seen.append((args, kwargs))

    return ours, note, seen


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_17_arguments_survive(noting, pool):
    """They arrive equal and of the same type, by `delay`, by `delay_many` and in a chain."""
    app, note, seen = noting
    with running(app, pool, concurrency=1):
        note.delay(*ARGUMENTS, key=ARGUMENTS)
        note.delay_many([(argument,) for argument in ARGUMENTS])
        note.delay_many([tuple(ARGUMENTS), [ARGUMENTS]], countdown=0)
        chain(note.si(*ARGUMENTS), note.si(ARGUMENTS, key=ARGUMENTS)).delay()
        wait_until(lambda: len(seen) == len(ARGUMENTS) + 5)
    expected = [
        (tuple(ARGUMENTS), {"key": ARGUMENTS}),
        *(((argument,), {}) for argument in ARGUMENTS),
        (tuple(ARGUMENTS), {}),
        ((ARGUMENTS,), {}),
        (tuple(ARGUMENTS), {}),
        ((ARGUMENTS,), {"key": ARGUMENTS}),
    ]
    # A chain's second task is the last; the others keep their order. Equal by repr: 1 is not True, nor 1.0.
    assert [repr(each) for each in seen] == [repr(each) for each in expected]


def test_17_an_enum_arrives_as_celery_has_it(noting):
    """JSON has the value of an enumeration of strings."""
    app, note, seen = noting
    with running(app):
        note.delay(Colour.RED)
        note.delay_many([(Colour.RED,)])
        wait_until(lambda: len(seen) == 2)
    assert seen == [(("red",), {})] * 2


@pytest.mark.parametrize("argument", [object(), timedelta(seconds=1), {1, 2}], ids=["object", "timedelta", "set"])
def test_17_what_json_refuses_is_refused(noting, plain, argument):
    app, note, _ = noting
    with pytest.raises(Exception, match="not JSON serializable") as expected:
        plain.send_task("note", (argument,))
    with pytest.raises(expected.type, match="not JSON serializable"):
        note.delay(argument)
    with pytest.raises(expected.type, match="not JSON serializable"):
        note.delay_many([(1,), (argument,)])
    assert app.relay().run_once() == 0


@pytest.mark.parametrize("options", [
    {}, {"queue": "slow", "priority": 3}, {"headers": {"a": "%s"}}, {"serializer": "pickle"},
    {"shadow": "catga-bulk-id"},
    {"compression": "zlib"}, {"ignore_result": True}, {"time_limit": 3}, {"link": True}, {"expires": NOW},
], ids=lambda options: next(iter(options), "none"))  # fmt: skip
def test_17_bulk_messages_are_celerys(both, options):
    """`delay_many` draws ids by itself: each message with its id renamed is what one call sends."""
    calls = [(1, "é"), (UUID(int=9), "%(id)s"), ((1, 2), {"a": "catga-bulk-arguments"}), ("x" * 3000, None), (b"", [])]

    def send(app):
        chosen = {**options, **({"link": on(app, 1)} if "link" in options else {})}
        if isinstance(app, Catga):
            app.tasks["charge"].delay_many(calls, **chosen)
        else:
            for call in calls:
                app.tasks["charge"].apply_async(call, **chosen)

    sent, expected = both(send)
    [key] = [key for key, value in expected.items() if isinstance(value, list)]
    assert [one(entry) for entry in sent[key]] == [one(entry) for entry in expected[key]]


def one(entry):
    """A message without its id and what is left of its life; its body, which is text or pickled, decoded."""
    message = json.loads(entry)
    body = base64.b64decode(message["body"])
    return LIFE.sub(b"", entry.replace(message["headers"]["id"].encode(), b"ID").replace(BODY.search(entry)[1], body))
