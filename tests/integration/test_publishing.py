"""What the relay puts on Redis is what kombu would have put there: queues, priorities, exchanges, expiry, prefix."""

from __future__ import annotations

import json
import threading

import pytest
from celery.contrib.testing.worker import start_worker
from kombu import Connection, Exchange, Queue
from kombu.common import Broadcast
from redis import Redis
from sqlalchemy import text

from catga_tasks import Catga, ConfigurationError
from tests.waiting import wait_until


@pytest.fixture
def make(engine, redis_url):
    """Make an application with these settings and a task."""

    def make(**conf):
        app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
        app.conf.update(conf)
        app.task(name="charge", shared=False)(charge)
        app.task(name="careless", delivery="at_most_once", shared=False)(charge)
        return app

    return make


def charge(order=None, *, times=1):
    return order, times


def waiting(engine):
    with engine.connect() as connection:
        return connection.execute(text("SELECT count(*) FROM catga_outbox")).scalar_one()


def test_each_queue_has_its_list_and_keeps_the_order(make, broker):
    app = make()
    for number in range(5):
        app.tasks["charge"].apply_async((number,), queue="even" if number % 2 == 0 else "odd")
    assert app.relay().run_once() == 5
    orders = [json.loads(message)["headers"]["argsrepr"] for message in reversed(broker.lrange("even", 0, -1))]
    assert orders == ["(0,)", "(2,)", "(4,)"]
    assert broker.llen("odd") == 2


def test_priorities_have_lists_of_their_own(make, broker):
    app = make(broker_transport_options={"priority_steps": [0, 5, 9], "sep": ":", "queue_order_strategy": "priority"})
    for priority in (0, 5, 9, None):
        app.tasks["charge"].apply_async((priority,), priority=priority)
    app.relay().run_once()
    assert (broker.llen("celery"), broker.llen("celery:5"), broker.llen("celery:9")) == (2, 1, 1)


def test_a_key_prefix_is_kept(make, broker):
    app = make(broker_transport_options={"global_keyprefix": "shop-"})
    app.tasks["charge"].delay(1)
    app.relay().run_once()
    assert broker.llen("shop-celery") == 1
    assert broker.exists("celery") == 0


def test_a_queue_that_expires_does(make, broker):
    app = make(task_queues=[Queue("celery", queue_arguments={"x-expires": 60_000})])
    app.tasks["charge"].delay(1)
    app.relay().run_once()
    assert 0 < broker.pttl("celery") <= 60_000


def test_a_topic_exchange_is_routed(make, broker):
    topic = Exchange("orders", type="topic")
    app = make(task_queues=[Queue("all", topic, routing_key="order.#"), Queue("paid", topic, routing_key="order.paid")])
    app.tasks["charge"].apply_async((0,), queue="paid")
    assert app.relay().run_once() == 1
    app.tasks["charge"].apply_async((1,), queue="all", routing_key="order.paid")
    app.tasks["charge"].apply_async((2,), queue="all", routing_key="order.new")
    assert app.relay().run_once() == 2
    assert (broker.llen("all"), broker.llen("paid")) == (2, 2)


def test_a_broadcast_reaches_everybody(make, broker):
    """A fanout is a channel of Redis' publish and subscribe, not a list."""
    app = make(task_queues=[Broadcast("everybody")])
    with broker.pubsub() as first, broker.pubsub() as second:
        for listener in (first, second):
            listener.psubscribe("*everybody*")
            assert listener.get_message(timeout=10)["type"] == "psubscribe"
        app.tasks["charge"].apply_async((1,), queue="everybody")
        assert app.relay().run_once() == 1
        for listener in (first, second):
            message = json.loads(listener.get_message(timeout=10)["data"])
            assert message["headers"]["task"] == "charge"


def test_a_queue_object_of_the_caller_is_declared(make, broker):
    app = make()
    queue = Queue("special", Exchange("special", type="direct"), routing_key="special")
    app.tasks["charge"].apply_async((1,), queue=queue)
    assert app.relay().run_once() == 1
    assert broker.llen("special") == 1


def test_a_relay_declares_a_queue_that_it_never_met(make, broker):
    """Another process made it by naming it: a broker that needs a declaration would drop the message."""
    make().tasks["charge"].apply_async((1,), queue="unseen")
    relaying = make()
    assert relaying.relay().run_once() == 1
    assert broker.smembers("_kombu.binding.unseen")
    assert "unseen" not in relaying.amqp.queues


def test_at_most_once_goes_straight_to_the_broker(make, engine, broker):
    app = make()
    app.tasks["careless"].delay(1)
    app.tasks["careless"].delay_many([(2,), (3,)])
    assert (broker.llen("celery"), waiting(engine)) == (3, 0)


def test_what_rides_with_a_direct_message_goes_with_it(make, engine):
    """The reply queue of rpc:// isn't declared with whatever is enqueued next."""
    app = make(result_backend="rpc://", task_ignore_result=False)
    app.tasks["careless"].delay(1)
    app.tasks["charge"].apply_async((2,), ignore_result=True)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT declarations FROM catga_outbox")).scalar_one() is None


def test_another_broker_of_the_caller_is_honoured(make, engine, broker, redis_server):
    app = make()
    with Connection(redis_server) as elsewhere:
        app.tasks["charge"].apply_async((1,), connection=elsewhere, queue="elsewhere-only")
        with Redis.from_url(redis_server) as client:
            assert client.llen("elsewhere-only") == 1
            client.delete("elsewhere-only", "_kombu.binding.elsewhere-only")
    assert (broker.llen("celery"), waiting(engine)) == (0, 0)


def test_eager_tasks_run_here_and_now(make, engine):
    app = make(task_always_eager=True)
    assert app.tasks["charge"].delay(7).get() == (7, 1)
    assert app.tasks["charge"].delay_many([(7,), (8,)])[1].get() == (8, 1)
    assert waiting(engine) == 0


def test_task_sent_events_come_with_the_publish(make):
    app = make(task_send_sent_event=True)
    events = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-sent": events.append})
        listening = threading.Event()
        receiver.should_stop = False

        def capture():
            with receiver.consumer_context(wakeup=False):
                listening.set()
                try:
                    for _ in receiver.consume(limit=None, timeout=20, wakeup=False):
                        pass
                except TimeoutError:
                    return

        thread = threading.Thread(target=capture, daemon=True)
        thread.start()
        assert listening.wait(10)
        wait_until(
            lambda: (
                app.connection_for_read().default_channel.client.pubsub_channels("*celeryev*")
                or app.connection_for_read().default_channel.client.pubsub_numpat()
            ),
            deadline=10,
        )
        result = app.tasks["charge"].delay(1)
        assert events == []
        app.relay().run_once()
        wait_until(lambda: events, what="the task-sent event")
        receiver.should_stop = True
    assert (events[0]["uuid"], events[0]["name"], events[0]["queue"]) == (result.id, "charge", "celery")


# delay_many


@pytest.mark.parametrize("options", [{}, {"queue": "slow"}, {"countdown": 60}, {"headers": {"tenant": "é"}},
                                     {"serializer": "pickle"}, {"compression": "gzip"}, {"expires": 60}])  # fmt: skip
@pytest.mark.parametrize("calls", [[(1,), (2,)], [('a"é\n', None), ("b", {"c": [1.5]})], [tuple(range(20))] * 2])
def test_delay_many_stores_what_delay_stores(make, engine, options, calls, monkeypatch):
    """Row by row, but for ids and moments: those of `delay_many` are its own."""
    app = make()
    app.tasks["charge"].typing = False

    def rows():
        with engine.begin() as connection:
            found = connection.execute(text("SELECT * FROM catga_outbox ORDER BY id")).mappings().all()
            connection.execute(text("DELETE FROM catga_outbox"))
        return [normal(row) for row in found]

    def normal(row):
        row = dict(row)
        for name in ("id", "created_at", "available_at"):
            del row[name]
        headers = json.loads(row["headers"])
        eta, expires = headers.pop("eta"), headers.pop("expires")
        row["headers"] = json.dumps({**headers, "eta": eta is None, "expires": expires is None})
        identity = row["task_id"]
        return {name: value.replace(identity, "ID") if isinstance(value, str) else value for name, value in row.items()}

    for args in calls:
        app.tasks["charge"].apply_async(args, **options)
    one_by_one = rows()
    results = app.tasks["charge"].delay_many(calls, **options)
    assert len(results) == len(calls)
    together = rows()
    if options.get("compression"):
        # gzip stamps its output with the time.
        for row in (*one_by_one, *together):
            del row["body"]
    assert together == one_by_one


def test_delay_many_results_are_in_order(make):
    app = make(result_backend="cache+memory://")
    results = app.tasks["charge"].delay_many([(1,), (2,), (3,)])
    assert [result.id for result in results] == results.ids
    assert results[0].task_id == results.ids[0]
    assert results[1:].ids == results.ids[1:]
    assert app.tasks["charge"].delay_many([]) == []


def test_delay_many_wants_tuples(make, engine):
    app = make()
    with pytest.raises(ConfigurationError, match="delay_many takes tuples"):
        app.tasks["charge"].delay_many([1, 2])
    with pytest.raises(TypeError):
        app.tasks["charge"].delay_many([(1,), (1, 2, 3)])
    assert waiting(engine) == 0


def test_from_delay_to_a_running_task(make, engine):
    """The whole road, with a relay and a worker in this process."""
    app = make(result_backend=None, broker_transport_options={"visibility_timeout": 5}, worker_pool="solo")
    ran = []

    @app.task(name="note", shared=False)
    def note(number):
        ran.append(number)

    relay = app.relay()
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=20):
            for number in range(20):
                note.delay(number)
            note.delay_many([(number,) for number in range(20, 40)])
            wait_until(lambda: len(ran) == 40)
    finally:
        relay.stop()
        thread.join(20)
    assert sorted(ran) == list(range(40))
    assert waiting(engine) == 0


def test_results_come_back_by_rpc(make, broker):
    """The queue that the answer goes to is declared with the message: the caller may wait much later."""
    app = make(result_backend="rpc://", task_ignore_result=False)
    result = app.tasks["charge"].delay(7)
    assert app.relay().run_once() == 1
    with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=20):
        wait_until(lambda: broker.llen(app.thread_oid) == 1)
        assert result.get(timeout=20) == [7, 1]
