"""Several brokers behind one outbox: each has its lane, and none waits for another."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from contextlib import contextmanager

import pytest
from celery import chain
from kombu import Connection
from sqlalchemy import text

from catga_tasks import Catga, ConfigurationError
from catga_tasks.errors import BrokerUnavailable
from tests.waiting import wait_until
from workers.servers import NatsServer

APP = """
import os
from catga_tasks import Catga

app = Catga("shop", broker=os.environ["REDIS"], outbox=os.environ["OUTBOX"])
app.conf.update(
    outbox_brokers={"mail": {"url": os.environ["NATS"], "transport_options": {"stream_prefix": os.environ["PREFIX"]}}},
    broker_transport_options={"visibility_timeout": 60},
    task_routes={"receipt": {"queue": "receipts", "broker": "mail"}},
    outbox_retry_backoff=0.1,
)

def say(word):
    with open("said", "a") as file:
        file.write(word + "\\n")

@app.task(name="order", bind=True)
def order(self, words):
    say(f"order at {self.request.hostname}")
    return [*words, "order"]

@app.task(name="receipt", bind=True)
def receipt(self, words):
    say(f"receipt at {self.request.hostname}")
    return [*words, "receipt"]

@app.task(name="fails-once", bind=True)
def fails_once(self):
    say(f"attempt {self.request.retries} at {self.request.hostname}")
    if not self.request.retries:
        raise self.retry(countdown=0.01)
"""


@pytest.fixture
def prefix():
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make(engine, redis_url, prefix):
    """Make an application whose own broker is Redis, with a second one, "mail", on NATS."""

    def make(mail, **conf):
        app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
        options = {"stream_prefix": prefix, "connect_timeout": 2.0}
        app.conf.outbox_brokers = {"mail": {"url": mail, "transport_options": options}}
        app.conf.update(outbox_publish_timeout=2, outbox_lease_timeout=10, **conf)
        app.task(name="charge", shared=False)(charge)
        app.task(name="careless", delivery="at_most_once", shared=False)(charge)
        return app

    return make


@pytest.fixture
def own_nats():
    server = NatsServer()
    server.start()
    yield server
    server.stop()


def charge(order=None):
    return order


@contextmanager
def running(relay):
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield
    finally:
        relay.stop()
        thread.join(20)
        assert not thread.is_alive()


def waiting(engine, broker):
    with engine.connect() as connection:
        count = text("SELECT count(*), coalesce(max(attempts), 0) FROM catga_outbox WHERE broker = :broker")
        return tuple(connection.execute(count, {"broker": broker}).one())


def test_calls_and_routes_name_their_broker(make, engine, broker, nats_server, prefix):
    app = make(nats_server, task_routes={"routed": {"queue": "letters", "broker": "mail"}})
    app.task(name="routed", shared=False)(charge)
    app.tasks["charge"].delay(1)
    app.tasks["charge"].apply_async((2,), broker="mail")
    app.tasks["routed"].delay(3)
    app.tasks["charge"].delay_many([(4,), (5,)], broker="mail")
    app.tasks["careless"].apply_async((6,), broker="mail", queue="careless")
    app.tasks["careless"].delay(7)
    assert (waiting(engine, "mail"), waiting(engine, "")) == ((4, 0), (1, 0))
    assert app.relay().run_once() == 5
    assert broker.llen("celery") == 2
    with Connection(nats_server, transport_options={"stream_prefix": prefix}) as connection:
        sizes = [connection.default_channel._size(queue) for queue in ("celery", "letters", "careless")]
    assert sizes == [3, 1, 1]


def test_a_chain_goes_on_over_another_broker(processes, tmp_path, engine, redis_url, nats_server, prefix):
    """Each step, and each retry, goes by its own broker: two workers, one each, and one relay."""
    (tmp_path / "shop.py").write_text(APP)
    url = engine.url.render_as_string(hide_password=False)
    env = {"REDIS": redis_url, "NATS": nats_server, "OUTBOX": url, "PREFIX": prefix}
    worker = ("worker", "-P", "solo", "-l", "INFO")
    processes.celery("shop", *worker, "-n", "redis@test", env=env, cwd=tmp_path)
    mailing = ("-b", "mail", *worker, "-Q", "receipts,others", "-n", "mail@test", "--outbox-relay")
    processes.celery("shop", *mailing, env=env, cwd=tmp_path)
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    app.conf.update(
        outbox_brokers={"mail": nats_server}, task_routes={"receipt": {"queue": "receipts", "broker": "mail"}}
    )
    for name in ("order", "receipt", "fails-once"):
        app.task(name=name, shared=False)(charge)
    order, receipt = app.signature("order"), app.signature("receipt")
    chain(order.clone(([],)), receipt, order, receipt).apply_async()
    app.signature("fails-once").apply_async(broker="mail", queue="others")
    said = tmp_path / "said"
    wait_until(lambda: said.exists() and len(said.read_text().splitlines()) == 6, deadline=40)
    words = said.read_text().splitlines()
    steps = [word for word in words if not word.startswith("attempt")]
    assert steps == ["order at redis@test", "receipt at mail@test"] * 2
    assert sorted(set(words) - set(steps)) == ["attempt 0 at mail@test", "attempt 1 at mail@test"]


@pytest.mark.parametrize(("out", "back"), [("kill", "start"), ("pause", "resume")])
def test_02_an_outage_holds_up_no_other_broker(make, engine, broker, own_nats, out, back):
    """A broker that is gone, and one that answers nothing: the others' messages go on, and no attempt is used up."""
    app = make(own_nats.url)
    app.tasks["charge"].apply_async((0,), broker="mail")
    relay = app.relay()
    with running(relay):
        wait_until(lambda: relay.published == 1)
        getattr(own_nats, out)()
        app.tasks["charge"].delay_many([(number,) for number in range(20)], broker="mail")
        wait_until(lambda: relay.lanes[1]._failures >= 1, deadline=20)
        for number in range(1, 6):
            app.tasks["charge"].delay(number)
            wait_until(lambda number=number: broker.llen("celery") == number, deadline=1.5)
        assert waiting(engine, "mail") == (20, 0)
        getattr(own_nats, back)()
        wait_until(lambda: relay.published >= 26, deadline=40)
        wait_until(lambda: waiting(engine, "mail") == (0, 0))


def test_once_publishes_to_those_that_answer(make, engine, broker, own_nats):
    app = make(own_nats.url)
    own_nats.stop()
    app.tasks["charge"].apply_async((1,), broker="mail")
    app.tasks["charge"].delay(2)
    with pytest.raises(BrokerUnavailable, match="broker mail is out"):
        app.relay().run_once()
    assert (broker.llen("celery"), waiting(engine, "mail")) == (1, (1, 0))


def test_25_a_broker_that_nobody_knows(make, engine, broker, nats_server, caplog):
    """The call is refused; a row that another process wrote waits, and the relay says for what."""
    app = make(nats_server)
    with pytest.raises(ConfigurationError, match=r"broker='male' isn't one of outbox_brokers \(which names mail\)"):
        app.tasks["charge"].apply_async((1,), broker="male")
    app.tasks["charge"].apply_async((1,), broker="mail")
    app.conf.outbox_brokers = {}
    del app.catga_settings
    with caplog.at_level(logging.WARNING):
        assert app.relay().run_once() == 0
    assert "messages wait for broker 'mail', which outbox_brokers doesn't name here" in caplog.text
    assert waiting(engine, "mail") == (1, 0)


def test_several_urls_of_the_own_broker(make, engine, broker, redis_url, nats_server):
    """Celery's list of URLs to fall back on."""
    app = make(nats_server)
    app.conf.broker_url = ["redis://127.0.0.1:1/0", redis_url]
    app.tasks["charge"].delay(1)
    with running(app.relay()):
        wait_until(lambda: broker.llen("celery") == 1)


@pytest.mark.parametrize(
    "wrong",
    [
        "nats://127.0.0.1",
        {"mail": 3},
        {"mail": "secret"},
        {"": "nats://127.0.0.1"},
        {"mail": {"transport_options": {}}},
        {"mail": {"url": "nats://127.0.0.1", "options": {}}},
        {"nats://127.0.0.1": "nats://127.0.0.1"},
    ],
)
def test_25_wrong_brokers(wrong):
    app = Catga("shop", outbox="sqlite://", set_as_current=False)
    app.conf.outbox_brokers = wrong
    with pytest.raises(ConfigurationError, match="outbox_brokers") as caught:
        _ = app.catga_settings
    assert "secret" not in str(caught.value)


def test_26_passwords_are_masked_where_celery_shows_settings():
    app = Catga("shop", broker="redis://:secret@127.0.0.1:1/0", outbox="sqlite://", set_as_current=False)
    app.conf.update(
        outbox_url="postgresql+psycopg://shop:secret@127.0.0.1/shop",
        outbox_brokers={
            "a": "redis://:secret@127.0.0.1:1/0",
            "b": {"url": "nats://user:secret@127.0.0.1:4222", "transport_options": {"password": "secret"}},
            "c": "nats://secret@127.0.0.1:4222",
        },
    )
    shown = app.conf.table(with_defaults=False, censored=True)
    assert "127.0.0.1" in shown["outbox_brokers"]["b"]["url"]
    assert "secret" not in json.dumps(shown, default=str)
    assert "secret" not in app.conf.humanize()
    assert "secret" in json.dumps(app.conf.table(censored=False), default=str)
