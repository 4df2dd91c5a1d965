"""With ids and clock held still, the stored row that the relay publishes is the message that plain Celery sends.

`test_byte_for_byte` names what is random by its order; here nothing is random: both applications draw the same ids and
read the same clock, and everything in Redis is compared, the result backend too. Two things stay random in each
application and are renamed: the delivery tag (kombu draws one for each publish) and `reply_to` (the oid of an
application in a thread). A gzip body says when it was compressed, by the real clock: four bytes.
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
from kombu import Exchange, Queue
from redis import Redis
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from catga_tasks import Catga, migrate
from tests.waiting import wait_until

NOW = datetime(2040, 2, 29, 12, 30, 15, 250, tzinfo=UTC)
PAST = datetime(2020, 2, 29, 12, 30, 15, tzinfo=UTC)
TAG = re.compile(rb'"delivery_tag": "[^"]+"')
OID = re.compile(rb'"reply_to": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"')
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
def engine(database_url):
    engine = create_engine(database_url)
    migrate.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def plain(redis_url):
    return Celery("shop", broker=redis_url, set_as_current=False)


@pytest.fixture
def ours(redis_url, engine):
    return Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)


@pytest.fixture
def prepare(redis_url, monkeypatch):
    """Give an application the tasks, these settings, the ids from 1 on and a clock that stands."""

    def prepare(app, *, backend=False, **conf):
        app.conf.update(conf, result_backend=redis_url if backend else None)
        # Plain Celery's results unsubscribe when they go, also from a server that went before them.
        app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_start": 0.01}}
        app.now = lambda: NOW
        numbers = itertools.count(1)
        for module in ("celery.canvas", "celery.app.base", "celery.app.task"):
            monkeypatch.setattr(importlib.import_module(module), "uuid", lambda: str(UUID(int=next(numbers))))
        return define(app)

    return prepare


@pytest.fixture
def both(plain, ours, prepare, redis):
    """Send by plain Celery and by ours; return all that is in Redis after each."""

    def both(send, *, backend=False, **conf):
        send(prepare(plain, backend=backend, **conf))
        expected = everything(redis)
        redis.flushdb()
        send(prepare(ours, backend=backend, **conf))
        assert redis.keys("*") == []
        assert ours.relay().run_once() >= 1
        return everything(redis), expected

    return both


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
    entry = OID.sub(b'"reply_to": "OID"', TAG.sub(b'"delivery_tag": "TAG"', entry))
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
    "exchange": apply(exchange="orders", routing_key="order.paid"),
    "exchange object": apply(exchange=Exchange("orders", type="topic"), routing_key="order.paid"),
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
def test_a_call(both, redis_url, call):
    queues = [Queue("celery"), Queue("slow"), Queue("orders", Exchange("orders", type="topic"), routing_key="order.#")]

    def send(app):
        with app.connection_for_write() as connection:
            for queue in app.conf.task_queues if "exchange" in call else ():
                queue(connection).declare()
        CALLS[call](app)
        if "exchange" in call:
            return

    found = send_and_compare(both, send, bound="exchange" in call, task_queues=queues)
    same(found)


def test_msgpack(both):
    pytest.importorskip("msgpack")
    same(both(apply(serializer="msgpack")))
