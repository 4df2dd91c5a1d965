"""Which queues does a message reach, and what are their names?"""

from __future__ import annotations

import pytest
from kombu import Exchange, Queue
from kombu.exceptions import ChannelError

from tests.conformance.messages import came, consuming, idle, publish, size, taken
from tests.waiting import wait_until

KINDS = pytest.mark.parametrize("durable", [True, False], ids=["stored", "passing"])
#: A binding, the keys that it takes and those that it doesn't.
TOPICS = [
    ("t.*", ["t.a", "t.b"], ["t", "t.a.b", "u.a"]),
    ("*.b", ["a.b"], ["b", "a.b.c"]),
    ("#", ["a", "a.b", "a.b.c"], []),
    ("a.#", ["a.b", "a.b.c"], ["b", "ab.c"]),
    ("a.#.z", ["a.b.z", "a.b.c.z"], ["a.b", "b.z"]),
    ("a.b", ["a.b"], ["a.c", "axb"]),
]


def bound(name, exchange, key="", *, durable=True):
    return Queue(name, exchange, routing_key=key, durable=durable, auto_delete=not durable)


def listening(connection, *queues):
    """Consume, from the moment on that this returns."""
    messages = consuming(connection, *queues)
    idle(connection, 0.2)
    return messages


def send(connection, exchange, *keys):
    for key in keys:
        connection.Producer().publish(
            key, exchange=exchange, routing_key=key, declare=[exchange], serializer="json", retry=False
        )


@KINDS
def test_07_direct_keys_and_the_unmatched_are_discarded(broker, durable):
    exchange = Exchange("orders", type="direct")
    with broker.connect() as first, broker.connect() as second, broker.connect() as publishing:
        paid = listening(first, bound("paid", exchange, "paid", durable=durable))
        sent = listening(second, bound("sent", exchange, "sent", durable=durable))
        send(publishing, exchange, "paid", "lost", "sent", "paid")
        assert came(first, paid, 2) == ["paid", "paid"]
        assert came(second, sent, 1) == ["sent"]
        idle(first, 0.2)
        idle(second, 0.2)
        assert (len(paid), len(sent)) == (2, 1)


@KINDS
def test_08_fanout_reaches_every_queue(broker, durable):
    exchange = Exchange("news", type="fanout")
    with broker.connect() as first, broker.connect() as second, broker.connect() as publishing:
        # Names of their own: kombu's Redis transport takes a queue for a fanout's for as long as the process lives.
        ones = listening(first, bound("news-1", exchange, durable=durable))
        twos = listening(second, bound("news-2", exchange, durable=durable))
        for body in ("a", "b"):
            publishing.Producer().publish(body, exchange=exchange, declare=[exchange], serializer="json", retry=False)
        assert came(first, ones, 2) == came(second, twos, 2) == ["a", "b"]


@KINDS
@pytest.mark.needs("fanout keys")
def test_08_fanout_ignores_keys(broker, durable):
    exchange = Exchange("news", type="fanout")
    with broker.connect() as connection, broker.connect() as publishing:
        messages = listening(connection, bound("news-1", exchange, "mine", durable=durable))
        send(publishing, exchange, "theirs", "a.b")
        assert came(connection, messages, 2) == ["theirs", "a.b"]


@KINDS
@pytest.mark.parametrize(("key", "takes", "leaves"), TOPICS, ids=[key for key, _, _ in TOPICS])
def test_09_topics(broker, key, takes, leaves, durable):
    exchange = Exchange("topics", type="topic")
    with broker.connect() as connection, broker.connect() as publishing:
        messages = listening(connection, bound("q", exchange, key, durable=durable))
        send(publishing, exchange, *leaves, *takes)
        assert sorted(came(connection, messages, len(takes))) == sorted(takes)
        idle(connection, 0.2)
        assert len(messages) == len(takes)


@KINDS
@pytest.mark.needs("no words")
def test_09_a_hash_stands_for_no_word_too(broker, durable):
    """As AMQP has it: `a.#` takes `a`, `a.#.z` takes `a.z`."""
    exchange = Exchange("topics", type="topic")
    with broker.connect() as connection, broker.connect() as publishing:
        messages = listening(
            connection,
            bound("one", exchange, "a.#", durable=durable), bound("two", exchange, "b.#.z", durable=durable),
        )  # fmt: skip
        send(publishing, exchange, "a", "b.z")
        assert sorted(came(connection, messages, 2)) == ["a", "b.z"]


def test_09_another_process_publishes(broker, client):
    """It has declared no more than the exchange; two queues match, and one message is for both."""
    exchange = Exchange("topics", type="topic")
    with broker.connect() as connection:
        ones = listening(connection, bound("one", exchange, "t.*"))
        twos = listening(connection, bound("two", exchange, "#"))
        client("publish", exchange="topics", kind="topic", keys=["t.a", "u.b"])
        assert came(connection, ones, 1) == ["t.a"]
        assert sorted(came(connection, twos, 2)) == ["t.a", "u.b"]


@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
def test_10_an_exchange_without_queues_takes_it(broker, kind):
    with broker.connect() as connection:
        send(connection, Exchange("nobody", type=kind), "a", "b")
        publish(connection, ["x"])
        assert taken(connection, 1) == ["x"]


def test_31_a_missing_queue_is_not_found(broker):
    """A channel error, after which the connection goes on."""
    with broker.connect() as connection:
        with pytest.raises(ChannelError, match=r"404.*NOT_FOUND") as missing:
            connection.default_channel.queue_declare("nowhere", passive=True)
        assert isinstance(missing.value, connection.channel_errors)
        assert connection.default_channel.basic_get("nowhere") is None
        publish(connection, ["x"])
        wait_until(lambda: connection.default_channel.queue_declare("q", passive=True).message_count == 1)


def test_32_size_purge_and_delete(broker):
    queue = Queue("q", Exchange("orders"), routing_key="q")
    with broker.connect() as connection:
        channel = connection.default_channel
        queue(channel).declare()
        assert size(connection) == 0
        publish(connection, range(3))
        publish(connection, ["first"], priority=9)
        wait_until(lambda: size(connection) == 4)
        assert channel.queue_purge("q") == 4
        assert (size(connection), channel.queue_purge("q")) == (0, 0)
        publish(connection, range(3))
        wait_until(lambda: size(connection) == 3)
        channel.queue_delete("q", if_empty=True)
        assert size(connection) == 3
        channel.queue_delete("q")
        with pytest.raises(ChannelError):
            channel.queue_declare("q", passive=True)
    with broker.connect() as connection:
        queue(connection.default_channel).declare()
        assert size(connection) == 0
        connection.default_channel.queue_delete("q", if_empty=True)
        with pytest.raises(ChannelError):
            connection.default_channel.queue_declare("q", passive=True)
        publish(connection, ["again"])
        assert taken(connection, 1) == ["again"]


def test_32_a_deleted_queue_is_no_longer_bound(broker):
    exchange = Exchange("orders", type="topic")
    with broker.connect() as connection, broker.connect() as other:
        for name in ("kept", "gone"):
            bound(name, exchange, "#")(connection.default_channel).declare()
        send(other, exchange, "a")
        wait_until(lambda: size(connection, "kept") == size(connection, "gone") == 1)
        connection.default_channel.queue_delete("gone")
        send(other, exchange, "b")
        wait_until(lambda: size(connection, "kept") == 2)
        assert size(connection, "gone") == 0


NAMES = ["a.b", "a@b", "a*b", "a>b", "a b", "a/b", "a$b", "é$", "a=2Eb", "a%sb", ".@*>/ $é", "x" * 240, "x" * 239 + "y"]


def test_33_any_name_is_a_queue_of_its_own(broker):
    """Each has its one message, by its name and by its binding."""
    exchange = Exchange("orders/é *", type="direct")
    with broker.connect() as connection:
        for name in NAMES:
            Queue(name, exchange, routing_key=name)(connection.default_channel).declare()
        for name in NAMES:
            connection.Producer().publish(name, routing_key=name, serializer="json", retry=False)
            send(connection, exchange, name)
        for name in NAMES:
            channel = connection.default_channel
            assert [channel.basic_get(name).payload for _ in range(2)] == [name, name]
            assert channel.basic_get(name) is None
