"""The brokers that the suite runs against: how each is reached, and what it can't do."""

from __future__ import annotations

import contextlib
import json
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from kombu import Connection
from kombu.exceptions import ChannelError
from redis import Redis
from redis.exceptions import AuthenticationError

from catga_tasks.brokers.nats_errors import AccessRefused
from workers.servers import NatsServer, RedisServer, Server, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping


class Broker:
    """One broker under test, in a corner of its server that is this test's alone."""

    name: ClassVar[str]
    #: What it can't, with the reason; a test that `needs` it is left out.
    CANNOT: ClassVar[Mapping[str, str]]
    #: The error for credentials that are wrong.
    REFUSED: ClassVar[type[Exception]]
    #: Who may come to a server with a password.
    USER: ClassVar[str]
    #: After so many seconds without a word from its consumer a message is delivered again, and at most so much later.
    REDELIVERY: ClassVar[float]
    LATE: ClassVar[float]

    def __init__(self, url: str, server: Server | None = None):
        self.url = url
        self.server = server
        self.own = f"test-{uuid.uuid4().hex[:8]}"
        self._opened: list[Connection] = []

    @classmethod
    def started(cls, password: str | None = None) -> Broker:
        """Start a server of the test's own."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The transport options."""
        raise NotImplementedError

    @staticmethod
    def patience(seconds: float) -> dict[str, Any]:
        """Return the options for how long connecting and answers may take."""
        raise NotImplementedError

    @staticmethod
    def redelivery(seconds: float) -> dict[str, Any]:
        """Return the option for how long a message may be in hand without a word."""
        raise NotImplementedError

    def clients(self) -> int:
        """Return how many connections and subscriptions the test's own server has."""
        raise NotImplementedError

    def clean(self) -> None:
        """Remove what the test left on the server."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """Return the names of this test's keys or streams on the server."""
        raise NotImplementedError

    def kept(self, queue: str) -> int:
        """Return how many messages of a queue aren't acknowledged, waiting ones and those in hand."""
        raise NotImplementedError

    def put(self, queue: str, body: bytes, identity: str) -> None:
        """Put bytes into a queue that is there, under a message's id where there are such."""
        raise NotImplementedError

    def dead(self, queue: str) -> list[tuple[bytes, str]]:
        """Return the dead letters of a queue, each with what the broker notes as the reason."""
        raise NotImplementedError

    def connect(self, url: str | None = None, **changes: Any) -> Connection:
        """Return a connection, closed at the test's end."""
        connection = Connection(url or self.url, transport_options={**self.options, **changes})
        self._opened.append(connection)
        return connection

    def at(self, port: int, password: str | None = None) -> str:
        """Return the URL with another port of the loopback, and with a password."""
        scheme, _, rest = self.url.partition("://")
        _, slash, database = rest.partition("/")
        access = f"{self.USER}:{password}@" if password else ""
        return f"{scheme}://{access}127.0.0.1:{port}{slash}{database}"

    def close(self) -> None:
        for connection in self._opened:
            with contextlib.suppress(Exception):
                connection.release()


class RedisBroker(Broker):
    name = "redis"
    CANNOT: ClassVar = {
        "final refusal": "kombu's Redis transport counts an authorization error among those that pass, and tries again",
        "ids": "Redis' lists know no message ids; the inbox drops duplicates, at the worker",
        "dead stream": "kombu's Redis transport discards what is rejected, as Celery documents it",
        "max_deliver": "Redis doesn't count deliveries",
        "in progress": "what is in hand for longer than Redis' visibility_timeout is delivered again, in hand or not",
        "fanout keys": "kombu's fanout on Redis goes by routing key too (fanout_patterns)",
        "no words": "kombu's topic exchange takes `#` for one word or more",
    }
    REFUSED = AuthenticationError
    USER = ""
    REDELIVERY = 2.0
    LATE = 4.0

    @classmethod
    def started(cls, password: str | None = None) -> RedisBroker:
        server = RedisServer(*(["--requirepass", password] if password else []))
        server.start()
        return cls(server.url, server)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "global_keyprefix": f"{self.own}:", "visibility_timeout": self.REDELIVERY, "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1, "unacked_mutex_expire": 1,
        }  # fmt: skip

    @staticmethod
    def patience(seconds: float) -> dict[str, Any]:
        return {"socket_connect_timeout": seconds, "socket_timeout": seconds}

    @staticmethod
    def redelivery(seconds: float) -> dict[str, Any]:
        return {"visibility_timeout": seconds}

    def clients(self) -> int:
        with Redis.from_url(self.url) as client:
            found = client.client_list()
        return len(found) + sum(int(each["sub"]) + int(each["psub"]) for each in found)

    def clean(self) -> None:
        with Redis.from_url(self.url) as client:
            for key in self.left():
                client.delete(key)

    def left(self) -> list[str]:
        with Redis.from_url(self.url, decode_responses=True) as client:
            return sorted(client.scan_iter(f"{self.own}:*"))

    def kept(self, queue: str) -> int:
        with Redis.from_url(self.url) as client:
            return int(client.llen(f"{self.own}:{queue}")) + int(client.hlen(f"{self.own}:unacked"))

    def put(self, queue: str, body: bytes, identity: str) -> None:
        with Redis.from_url(self.url) as client:
            client.lpush(f"{self.own}:{queue}", body)

    def dead(self, queue: str) -> list[tuple[bytes, str]]:
        with Redis.from_url(self.url) as client:
            return [(body, "") for body in client.lrange(f"{self.own}:{queue}.undecodable", 0, -1)]


class NatsBroker(Broker):
    name = "nats"
    CANNOT: ClassVar = {}
    REFUSED = AccessRefused
    USER = "shop"
    REDELIVERY = 1.0
    LATE = 1.0

    #: The port of the server's monitoring.
    monitor = 0

    @classmethod
    def started(cls, password: str | None = None) -> NatsBroker:
        monitor = free_port()
        access = f'authorization {{ user: "shop", password: "{password}" }}' if password else ""
        server = NatsServer(f'http: "127.0.0.1:{monitor}"\n{access}')
        server.start()
        broker = cls(server.url, server)
        broker.monitor = monitor
        return broker

    @property
    def options(self) -> dict[str, Any]:
        return {
            "stream_prefix": self.own, "ack_wait": self.REDELIVERY, "publish_timeout": 5.0, "reconnect_wait": 0.05,
        }  # fmt: skip

    @staticmethod
    def patience(seconds: float) -> dict[str, Any]:
        return {"connect_timeout": seconds, "publish_timeout": seconds, "reconnect_grace": seconds}

    @staticmethod
    def redelivery(seconds: float) -> dict[str, Any]:
        return {"ack_wait": seconds}

    def clients(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}/varz") as answer:
            said = json.load(answer)
        return said["connections"] + said["subscriptions"]

    def clean(self) -> None:
        with Connection(self.url, transport_options=self.options) as connection:
            nats = connection.default_channel.nats
            for name in self.left():
                nats.call(nats.js.delete_stream(name))

    def left(self) -> list[str]:
        with Connection(self.url, transport_options=self.options) as connection:
            nats = connection.default_channel.nats
            found = nats.call(nats.js.streams_info())
        return sorted(info.config.name for info in found if self.own in info.config.name)

    def kept(self, queue: str) -> int:
        with Connection(self.url, transport_options=self.options) as connection:
            channel = connection.default_channel
            return int(channel.counts(queue)["messages"])

    def put(self, queue: str, body: bytes, identity: str) -> None:
        with Connection(self.url, transport_options=self.options) as connection:
            connection.default_channel.send([(queue, 0, body, identity)], raising=True)

    def dead(self, queue: str) -> list[tuple[bytes, str]]:
        with Connection(self.url, transport_options=self.options) as connection:
            nats = connection.default_channel.nats
            try:
                count = nats.call(nats.js.stream_info(f"{self.own}_dead")).state.messages
            except ChannelError:
                return []
            found = [nats.call(nats.js.get_msg(f"{self.own}_dead", number + 1)) for number in range(count)]
        return [(msg.data, msg.headers["Catga-Reason"]) for msg in found if msg.headers["Catga-Queue"] == queue]


BROKERS = {kind.name: kind for kind in (RedisBroker, NatsBroker)}
