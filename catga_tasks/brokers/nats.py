"""kombu's transport for NATS JetStream.

Features
========
* Type: Virtual
* Supports Direct: Yes
* Supports Topic: Yes
* Supports Fanout: Yes
* Supports Priority: Yes
* Supports TTL: Yes (of queues)

Connection String
=================
``nats://HOST[:PORT][,HOST[:PORT]...]``, ``tls://...`` or ``nats+tls://...``, with ``USER:PASSWORD@`` or ``TOKEN@``.

Transport Options
=================
The fields of `catga_tasks.brokers.nats_settings.NatsSettings`.

A durable queue is a stream of its own with a durable pull consumer for each priority. A queue that is exclusive, not
durable, or deletes itself (Celery's remote control, events) is a plain subscription: its messages aren't stored.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kombu.exceptions import ChannelError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.utils.compat import detect_environment
from kombu.utils.url import maybe_sanitize_url

from catga_tasks.brokers.bindings import Bindings
from catga_tasks.brokers.jetstream import Connection
from catga_tasks.brokers.nats_channel import Channel
from catga_tasks.brokers.nats_errors import Unreachable
from catga_tasks.brokers.nats_settings import NatsSettings
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from catga_tasks.brokers.frames import Keeper
    from catga_tasks.brokers.taps import Tap

logger = get_logger("catga_tasks.nats")

#: Messages that are delivered at most before other events of the hub get their turn.
BURST = 200


class Transport(virtual.Transport):
    """NATS JetStream. kombu and Celery see every outage that lasts as an error that they recover from."""

    Channel = Channel
    #: Who keeps what is no message; without one it goes to the stream of dead letters.
    on_garbage: Keeper | None = None
    default_port = 4222
    driver_type = "nats"
    driver_name = "nats-py"
    can_parse_url = True
    connection_errors = (*virtual.Transport.connection_errors, Unreachable)
    channel_errors = (*virtual.Transport.channel_errors, ChannelError)
    implements = virtual.Transport.implements.extend(
        asynchronous=True, batch_publish=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Any, **options: Any) -> None:
        if detect_environment() != "default":
            # Patched, its loop thread would be a greenlet, and stand still whenever a task computes.
            raise ConfigurationError(
                f"nats:// doesn't work with {detect_environment()}: start the worker with -P prefork, threads or solo."
            )
        self.settings = NatsSettings.read(client.transport_options)
        super().__init__(client, **options)
        self._start_anew()

    def _start_anew(self) -> None:
        self.taps: dict[str, Tap] = {}
        self.nats = Connection(*servers_of(self.client.hostname or ""), self.settings)
        self.bindings = Bindings(self.nats)
        self._stored: dict[str, float] = {}

    def driver_version(self) -> str:
        """Return nats-py's version."""
        from importlib.metadata import version

        return version("nats-py")

    def establish_connection(self) -> Any:
        """Connect within `connect_timeout`."""
        if not self.nats.usable:
            # kombu tries again with the transport whose try before failed.
            self._start_anew()
        if self.nats.js is None:
            self.nats.connect()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        """Give back what is held, and disconnect."""
        try:
            super().close_connection(connection)
        except Unreachable:
            logger.debug("NATS was away when the connection was closed.")
        finally:
            self.nats.close()

    def verify_connection(self, _connection: Any) -> bool:
        """Return whether the server answers now."""
        return bool(self.nats.nats.is_connected) and self.nats.broken is None

    def stored(self, queue: str) -> bool:
        """Return whether the queue has a stream; asked anew after a while if it hasn't."""
        now = time.monotonic()
        if queue in self.nats.streams.known or self._stored.get(queue, 0.0) > now:
            return queue in self.nats.streams.known
        if self.nats.call(self.nats.streams.exists(queue)):
            self.nats.call(self.nats.streams.ensure(queue))  # unless it expires, and has settings of its own
            return True
        self._stored[queue] = now + 1.0
        return False

    def drain_events(self, _connection: Any, timeout: float | None = None) -> None:
        """Deliver what has arrived, or wait for it; raise `socket.timeout` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._deliver_arrived():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            select.select([self.nats.bell.fileno()], [], [], left)
            self.nats.bell.quieten()

    def register_with_event_loop(self, _connection: Any, loop: Any) -> None:
        """Let kombu's hub watch for arrivals."""
        loop.add_reader(self.nats.bell.fileno(), self.on_readable)
        self.nats.bell.ring()

    def on_readable(self, *_arguments: Any) -> None:
        """Deliver what has arrived; the rest after the hub's other events."""
        self.nats.bell.quieten()
        if self._deliver_arrived() >= BURST:
            self.nats.bell.ring()

    def _deliver_arrived(self) -> int:
        if self.nats.broken is not None:
            raise self.nats.broken
        return sum(channel.intake.deliver(BURST) for channel in list(self.channels))

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: FBT001, FBT002 - kombu's signature
        """Return the URL, its password or token masked."""
        if include_password:
            return uri
        scheme, _, rest = uri.partition("://")
        hosts = [
            f"{scheme}://{part}" if "@" not in part else maybe_sanitize_url(f"{scheme}://{_masked(part, mask)}", mask)
            for part in rest.split(",")
        ]
        return ",".join([hosts[0], *(host.partition("://")[2] for host in hosts[1:])])


def _masked(part: str, mask: str) -> str:
    access, _, host = part.rpartition("@")
    return f"{access.partition(':')[0] if ':' in access else mask}:{mask}@{host}" if ":" in access else f"{mask}@{host}"


def servers_of(url: str) -> tuple[list[str], bool]:
    """Return the cluster's servers and whether TLS is wanted; raise `ConfigurationError` for a port that is none."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "nats", url
    servers = [f"nats://{host}" for part in rest.split(",") if (host := part.strip().rstrip("/"))]
    for server in servers:
        try:
            _ = urlsplit(server).port
        except ValueError:
            place = server.rpartition("@")[2].removeprefix("nats://")
            raise ConfigurationError(f"broker_url: the port of {place} must be a number from 0 to 65535.") from None
    return servers or ["nats://localhost"], scheme == "tls"
