"""What the relay puts on Redis is, byte for byte, what plain Celery would have put there.

Each case is sent by a `Celery` and by a `Catga` with the same tasks, and the raw entries of Redis' lists are compared.
Only what is drawn afresh for each message or read from a clock or an object's address is given a name first: UUIDs,
moments, and the application's own oid. The names follow the order of appearance, so an id that differs in one place
shows.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from celery import Celery, chain, chord, group
from celery.beat import ScheduleEntry, Scheduler
from celery.contrib.testing.worker import start_worker
from celery.schedules import schedule
from kombu import Queue
from redis import Redis

from catga_tasks import Catga
from tests.waiting import wait_until

RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?:-\d+)?")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:\+00:00|Z)?")
TAG = re.compile(r'"delivery_tag": "[^"]+"')
#: What is left of a time to live, in milliseconds.
LIFE = re.compile(r'"expiration": "\d+"')
#: A fixed moment is compared as it is.
FIXED = datetime(2040, 2, 29, 12, 30, 15, 250, tzinfo=UTC)
PAST = datetime(2020, 2, 29, 12, 30, 15, tzinfo=UTC)
ODD = [UUID(int=7), FIXED, date(2026, 1, 2), time(3, 4, 5), Decimal("1.10"), b"\x00\xff"]


def tasks(app):
    """The same tasks for both applications; `charge` is what most cases send."""

    @app.task(name="charge", shared=False)
    def charge(*args, **kwargs):
        return list(args)

    @app.task(name="again", shared=False, bind=True, max_retries=3)
    def again(self, order):
        if not self.request.retries:
            raise self.retry(countdown=0, queue="after", exc=ValueError("out of stock"), headers={"tenant": "t"})

    @app.task(name="fails", shared=False)
    def fails(order):
        raise ValueError(order)

    return app


@pytest.fixture
def redis(redis_url):
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def both(redis, redis_url, engine):
    """Send by plain Celery and by ours; return the lists of each."""

    def compare(send, *, work=0, backend=None, lists=None, **conf):
        found = []
        for app in (
            Celery("shop", broker=redis_url, set_as_current=False),
            Catga("shop", broker=redis_url, outbox=engine, set_as_current=False),
        ):
            app.conf.update(conf, result_backend=redis_url if backend else None)
            # Plain Celery's results unsubscribe when they go, also from a server that went before them.
            app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_start": 0.01}}
            tasks(app)
            with running(app) if work else contextlib.nullcontext():
                send(app)
                if work:
                    wait_until(lambda: redis.llen("after") >= work)
            if isinstance(app, Catga) and not work:
                app.relay().run_once()
            content = {
                key: [normal(entry, app) for entry in redis.lrange(key, 0, -1)]
                for key in sorted(redis.keys("*"))
                if redis.type(key) == b"list" and (lists is None or key.decode() in lists)
            }
            found.append(content)
            redis.flushdb()
        return found

    return compare


@contextlib.contextmanager
def running(app):
    """A worker in this process, and a relay for ours."""
    relay = app.relay() if isinstance(app, Catga) else None
    thread = threading.Thread(target=relay.run) if relay else None
    if thread:
        thread.start()
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30):
            yield
    finally:
        if thread:
            relay.stop()
            thread.join(30)


def normal(entry, app):
    """Name what is random; everything else stays as it is, down to the order and the spaces of the JSON."""
    text = TAG.sub('"delivery_tag": "TAG"', LIFE.sub('"expiration": "LIFE"', entry.decode()))
    body = json.loads(text)["body"]
    text = text.replace(app.thread_oid, "OID")
    parts = [text]
    with contextlib.suppress(ValueError):
        import base64

        parts.append(base64.b64decode(body).decode())
        parts[0] = parts[0].replace(body, "BODY")
    return tuple(parts)


def named(found):
    """Rename ids and moments in their order of appearance, in all of an application's messages."""
    names = {}

    def name(match):
        return names.setdefault(match[0], f"#{len(names)}")

    def moment(match):
        return match[0] if match[0].startswith("2040-02-29") else "MOMENT"

    return {
        key: [tuple(MOMENT.sub(moment, RANDOM.sub(name, part)) for part in parts) for parts in entries]
        for key, entries in found.items()
    }


def same(found):
    plain, ours = (named(each) for each in found)
    assert plain, "plain Celery sent nothing"
    assert [len(entries) for entries in ours.values()] == [len(entries) for entries in plain.values()]
    assert ours.keys() == plain.keys()
    for key, entries in plain.items():
        for expected, sent in zip(entries, ours[key], strict=True):
            assert sent == expected, difference(sent, expected)


def difference(sent, expected):
    for ours, plain in zip(sent, expected, strict=True):
        at = next((n for n, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
        if at is not None:
            return f"at {at}: ...{ours[at - 60 : at + 60]}... and not ...{plain[at - 60 : at + 60]}..."
    return "their lengths differ"


def apply(**options):
    return lambda app: app.tasks["charge"].apply_async((1, "é"), {"times": 2}, **options)


def on(app, *args, **options):
    return app.tasks["charge"].s(*args).set(**options)


CASES = {
    "delay": lambda app: app.tasks["charge"].delay(1, times=2),
    "no arguments": lambda app: app.tasks["charge"].delay(),
    "long arguments": lambda app: app.tasks["charge"].delay("x" * 5000, list(range(500))),
    "odd arguments": lambda app: app.tasks["charge"].delay(*ODD, key=ODD),
    "task_id": apply(task_id="order-1"),
    "headers": apply(headers={"tenant": "é", "n": 1}),
    "pickle": apply(serializer="pickle"),
    "yaml": apply(serializer="yaml"),
    "bzip2": apply(compression="bzip2"),
    "zlib": apply(compression="zlib"),
    "priority": apply(priority=6),
    "priority 0": apply(priority=0),
    "expires at": apply(expires=FIXED),
    "expires in": apply(expires=90),
    "queue": apply(queue="slow"),
    "routing_key": apply(routing_key="elsewhere"),
    "exchange": apply(exchange="", routing_key="celery"),
    "link": lambda app: apply(link=on(app, 3))(app),
    "links": lambda app: apply(link=[on(app, 3), on(app, 4, queue="slow")])(app),
    "link_error": lambda app: apply(link_error=on(app, 3))(app),
    "ignore_result": apply(ignore_result=True),
    "stamps": apply(stamped_headers=["tenant"], tenant="t"),
    "time limits": apply(time_limit=20, soft_time_limit=10),
    "shadow": apply(shadow="charge the customer"),
    "group_id": apply(group_id="00000000-0000-0000-0000-000000000007", group_index=3),
    "reply_to": apply(reply_to="somewhere"),
    "parents": apply(root_id="root", parent_id="parent"),
    "correlation": apply(correlation_id="c"),
    "delivery_mode": apply(delivery_mode=1),
    "replaced": apply(replaced_task_nesting=2),
    "send_task": lambda app: app.send_task("unknown.task", (1,), {"a": 2}, queue="slow"),
    "signature": lambda app: app.signature("charge", (1,), immutable=True, options={"queue": "slow"}).apply_async((2,)),
    "stamped signature": lambda app: stamped(on(app, 1)).apply_async(),
    "chain": lambda app: chain(on(app, 1), on(app, 2, queue="slow"), on(app, 3)).apply_async(),
    "group": lambda app: group(on(app, number) for number in range(3)).apply_async(),
    "stamped group": lambda app: stamped(group(on(app, number) for number in range(3))).apply_async(),
    "chunks": lambda app: app.tasks["charge"].chunks(zip(range(5), strict=False), 2).apply_async(),
    "map": lambda app: app.tasks["charge"].map([1, 2]).apply_async(),
}


def stamped(signature):
    signature.stamp(tenant="t")
    return signature


@pytest.mark.parametrize("case", CASES)
def test_17_the_message_is_celerys(both, case):
    same(both(CASES[case]))


CHORDS = {
    "nested": lambda app: chain(on(app, 0), group(on(app, 1), chain(on(app, 2), on(app, 3))), on(app, 4)).apply_async(),
    "chord": lambda app: chord([on(app, 1), on(app, 2)], on(app, 3)).apply_async(),
    "chord in a chain": lambda app: chain(on(app, 0), chord([on(app, 1), on(app, 2)], on(app, 3))).apply_async(),
    "chord of groups": lambda app: chord([group(on(app, 1), on(app, 2)), on(app, 3)], on(app, 4)).apply_async(),
    "chord of one": lambda app: chord([on(app, 1)], on(app, 2)).apply_async(),
    "group and task": lambda app: (group(on(app, 1), on(app, 2)) | on(app, 3)).apply_async(),
}


@pytest.mark.parametrize("case", CHORDS)
def test_chords_are_celerys(both, case):
    same(both(CHORDS[case], backend=True))


@pytest.mark.parametrize("conf", [
    {"task_serializer": "pickle"}, {"task_compression": "zlib"}, {"task_default_queue": "shop"},
    {"task_default_priority": 3}, {"task_protocol": 1}, {"task_routes": {"charge": {"queue": "fast", "priority": 3}}},
    {"task_queues": [Queue("celery", queue_arguments={"x-max-priority": 9})]}, {"task_default_delivery_mode": 1},
    {"enable_utc": False, "timezone": "Europe/Berlin"}, {"task_store_eager_result": True}, {"task_ignore_result": True},
    {"task_send_sent_event": True}, {"task_inherit_parent_priority": True}, {"task_create_missing_queues": True},
], ids=lambda conf: next(iter(conf)))  # fmt: skip
def test_settings_are_celerys(both, conf):
    same(both(lambda app: app.tasks["charge"].apply_async((1,), {"times": 2}), **conf))


def test_gzip_differs_in_its_time_stamp_alone(both):
    found = both(apply(compression="gzip"))
    lengths = [len(entry[0]) for lists in found for entry in lists[b"celery"]]
    assert lengths[0] == lengths[1]


def test_an_eta_that_has_come_is_moved(both):
    """The one change on purpose: see `envelope.outgoing`."""
    plain, ours = both(apply(eta=PAST))
    before, after = json.loads(plain[b"celery"][0][0]), json.loads(ours[b"celery"][0][0])
    assert before["headers"].pop("eta") == "2020-02-29T12:30:15+00:00"
    assert after["headers"].pop("catga_eta") == "2020-02-29T12:30:15+00:00"
    assert after["headers"].pop("eta") is None
    for message in (before, after):
        for name in ("id", "root_id"):
            del message["headers"][name]
        del message["properties"]["correlation_id"]
    assert after == before


def test_a_schedules_entry_is_celerys(both):
    def beat(app):
        entry = ScheduleEntry("nightly", "charge", schedule=schedule(60), args=(1,), options={"expires": 30}, app=app)
        with app.connection_for_write() as connection:
            scheduler = Scheduler(app=app, lazy=True)
            scheduler.apply_async(entry, producer=app.amqp.Producer(connection, auto_declare=False), advance=False)

    same(both(beat))


# What a worker sends


@pytest.mark.parametrize("send", [
    lambda app: app.tasks["again"].delay(1),
    lambda app: app.tasks["charge"].apply_async((1,), link=on(app, 2, queue="after")),
    lambda app: app.tasks["fails"].apply_async((1,), link_error=app.tasks["fails"].s().set(queue="after")),
    lambda app: chain(on(app, 1), on(app, 2, queue="after")).apply_async(),
    lambda app: chord([on(app, 1), on(app, 2)], on(app, 3, queue="after")).apply_async(),
], ids=["retry", "link", "link_error", "chain", "chord"])  # fmt: skip
def test_what_a_worker_sends_is_celerys(both, send):
    same(both(send, work=1, backend=True, lists=["after"], task_acks_late=True, worker_hijack_root_logger=False))


# Arguments


def test_17_arguments_survive(redis_url, engine):
    """By `delay`, `delay_many` and in a chain, what arrives is equal to what was sent, and of its type."""
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    seen = []

    @app.task(name="note", shared=False)
    def note(*args):
        seen.append(args)

    with running(app):
        note.delay(*ODD)
        note.delay_many([tuple(ODD), (ODD, {"deep": [ODD]})])
        chain(note.si(*ODD), note.si(timedelta(seconds=3) / timedelta(seconds=1))).delay()
        wait_until(lambda: len(seen) == 5)
    expected = Counter([repr(tuple(ODD))] * 3 + [repr((ODD, {"deep": [ODD]})), repr((3.0,))])
    assert Counter(map(repr, seen)) == expected
