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

from kombu.exceptions import ChannelError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.utils.compat import detect_environment

from catga_tasks.brokers.bindings import Bindings
from catga_tasks.brokers.jetstream import Connection
from catga_tasks.brokers.nats_channel import Channel
from catga_tasks.brokers.nats_errors import Unreachable
from catga_tasks.brokers.nats_settings import NatsSettings, hidden
from catga_tasks.brokers.nats_url import address, keep_apart, keep_whole, url_of
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
        if client.ssl:
            raise ConfigurationError(
                "broker_use_ssl is for other brokers: nats:// takes tls:// as its URL, and tls_ca_file, tls_cert_file, "
                "tls_key_file and tls_check_hostname in broker_transport_options."
            )
        self.settings = NatsSettings.read(client.transport_options)
        self._address = address(url_of(client))
        client.transport_options = hidden(client.transport_options)
        keep_apart(client, self._address)
        keep_whole(client)
        super().__init__(client, **options)
        self._start_anew()

    def _start_anew(self) -> None:
        self.taps: dict[str, Tap] = {}
        self.nats = Connection(self._address, self.settings)
        self.bindings = Bindings(self.nats)

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
        """Return whether the queue has a stream."""
        if queue in self.nats.streams.known:
            return True
        if not self.nats.call(self.nats.streams.exists(queue)):
            return False
        self.nats.call(self.nats.streams.ensure(queue))  # unless it expires, and has settings of its own
        return True

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

    def as_uri(self, _uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: FBT001, FBT002 - kombu's signature
        """Return the URL, its password or token masked."""
        return self._address.url(None if include_password else mask)
