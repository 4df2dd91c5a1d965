"""The Celery application: the only place that wires the parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.utils import Settings as CelerySettings
from celery.result import result_from_tuple
from kombu import Connection, pools
from kombu.utils.json import loads

from catga_tasks import bulk, claiming, current, deferral, logs
from catga_tasks.brokers import KombuPublisher, Publisher
from catga_tasks.config import Settings
from catga_tasks.database import masked_url
from catga_tasks.enqueue import Outbox
from catga_tasks.errors import ConfigurationError, OutboxUnavailable
from catga_tasks.gauges import Gauges
from catga_tasks.producer import (
    OutboxOperationalError,
    OutboxProducer,
)
from catga_tasks.relay import Lane, Relay
from catga_tasks.task import choose_delivery

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery.backends.base import Backend

    from catga_tasks.database import Source
    from catga_tasks.envelope import Envelope
    from catga_tasks.storing import Entry, Write

logger = logging.getLogger("catga_tasks")

_collector: ContextVar[list[Envelope] | None] = ContextVar("catga_collector", default=None)
#: What a chord's header enqueues, until all of it is there.
_header: ContextVar[list[Entry] | None] = ContextVar("catga_header", default=None)


class MaskedSettings(CelerySettings):
    """Celery's settings, which hide the passwords in our URLs as well wherever Celery shows them."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002 - as Celery has it
        """Return the settings, for `celery report`, `inspect conf` and Flower."""
        found: dict[str, Any] = super().table(with_defaults, censored)
        if censored:
            url = found.get("outbox_url")
            if isinstance(url, str):
                found["outbox_url"] = masked_url(url)
            brokers = found.get("outbox_brokers")
            if isinstance(brokers, Mapping):
                found["outbox_brokers"] = {name: _masked_broker(broker) for name, broker in brokers.items()}
        return found


def _masked_broker(broker: Any) -> Any:
    if isinstance(broker, Mapping):
        return {name: _masked_broker(value) if name == "url" else value for name, value in broker.items()}
    try:
        return Connection(broker).as_uri()
    except Exception:  # noqa: BLE001 - wrong settings are shown too, but not what they hide
        return "***"


class Catga(Celery):
    """Celery whose tasks commit with your data.

    Takes what `Celery` takes, and `outbox`: a SQLAlchemy URL, an `Engine`, or the application's own
    `sessionmaker`; the setting `outbox_url` is its alternative.

        app = Catga("shop", broker="redis://127.0.0.1:6379/0", outbox="postgresql+psycopg://localhost/shop")
    """

    amqp_cls = "catga_tasks.producer:OutboxAMQP"
    task_cls = "catga_tasks.task:CatgaTask"

    def __init__(self, *args: Any, outbox: Source | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It was made by Celery, and others may hold it already.
        object.__setattr__(self._conf, "__class__", MaskedSettings)
        self._outbox_source = outbox
        self._systems: dict[str, str] = {}
        # Late acknowledgement and its requeue are what "at least once" means on the worker's side.
        defaults = {"task_acks_late": True, "task_reject_on_worker_lost": True}
        self.add_defaults({**defaults, "worker_consumer": "catga_tasks.dead_letters:Consumer"})
        self.user_options["worker"].add(_relay_option())
        self.steps["worker"].add("catga_tasks.embedded:RelayStep")
        self.steps["worker"].add("catga_tasks.runs:RunsStep")
        logs.install()

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        """Return the program `celery worker`, whose start checks our settings."""
        return self.subclass_with_self("catga_tasks.embedded:Worker")

    @cached_property
    def catga_settings(self) -> Settings:
        """Our settings, validated; raises `ConfigurationError`."""
        return Settings.read(self.conf)

    @cached_property
    def outbox(self) -> Outbox:
        """Return the outbox: `join` and `track` transactions."""
        source = self._outbox_source or self.catga_settings.outbox_url
        if source is None:
            message = "No outbox: pass Catga(outbox='postgresql+psycopg://...') or set outbox_url."
            raise ConfigurationError(message)
        return Outbox(source, require_transaction=self.catga_settings.outbox_require_transaction)

    @cached_property
    def outbox_producer(self) -> OutboxProducer:
        """Return the producer that every task is sent by."""
        return OutboxProducer(lambda: self._idle_connection)

    @cached_property
    def _idle_connection(self) -> Connection:
        return self.connection_to()

    @contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        """Yield the given producer or the outbox's: no connection to the broker is taken for a task call.

        For a chord's header Celery asks once: all its messages are enqueued together, when the block ends.
        """
        if producer is None and _header.get() is None and deferral.announced.get():
            with self._whole_header():
                yield self.outbox_producer
        else:
            yield producer or self.outbox_producer

    default_producer = producer_or_acquire

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task as Celery does; if it is unique and its key is taken, its result is that of who has it."""
        with claiming.ticket_of_call() as bind:
            result = super().send_task(name, *args, **options)
            bind(result)
        return result

    def enqueue(self, envelopes: Sequence[Envelope]) -> None:
        """Put built messages into the outbox."""
        collector = _collector.get()
        if collector is not None:
            collector.extend(envelopes)
            return
        # A retry must survive the task's rollback.
        independent = claiming.is_own(envelopes[0].task_id)
        delivery = current.delivery.get()
        if independent and delivery is not None and not delivery.ended:
            delivery.keep(envelopes)
            return
        self._add(envelopes, independent=independent and delivery is None)

    def commit_with(self, write: Write) -> None:
        """Call the function with the connection when the current transaction commits, or in one of its own."""
        self._add([write])

    def _add(self, entries: Sequence[Entry], *, independent: bool = False) -> None:
        header = _header.get()
        if header is not None and not independent:
            header += entries
            return
        try:
            self.outbox.add(entries, independent=independent)
        except OutboxUnavailable as error:
            raise OutboxOperationalError(*error.args) from error

    @contextmanager
    def _whole_header(self) -> Iterator[None]:
        """Enqueue what this block enqueues at its end, in one transaction; nothing of it if the block fails."""
        entries: list[Entry] = []
        token = _header.set(entries)
        try:
            yield
        finally:
            _header.reset(token)
            deferral.announced.set(None)
        if entries:
            self._add(entries)

    @contextmanager
    def collecting(self, envelopes: list[Envelope]) -> Iterator[None]:
        """Collect the messages that this block enqueues in the list, instead of storing them."""
        token = _collector.set(envelopes)
        try:
            yield
        finally:
            _collector.reset(token)

    def asks_inbox(self, name: str) -> bool:
        """Return whether a task's duplicates are told apart; by the application's `task_delivery` if it isn't known."""
        task = self._tasks.get(name) if isinstance(self._tasks, dict) else None
        if task is None:
            return self.catga_settings.task_delivery == "effectively_once"
        return bool(task.delivery == "effectively_once" or task.deduplicate)

    def bypasses_outbox(self, name: str, producer: Any) -> bool:
        """Return whether a message goes straight to the broker: at most once, or the caller names another broker."""
        task = self._tasks.get(name) if isinstance(self._tasks, dict) else None
        delivery = choose_delivery(getattr(task, "delivery", None), self.catga_settings.task_delivery, name)
        if delivery == "at_most_once":
            return True
        if producer is None or producer is self.outbox_producer:
            return False
        connection = getattr(producer, "connection", None)
        return connection is not None and connection.as_uri() != self._idle_connection.as_uri()

    def send_many(self, task: Any, arguments: Iterable[tuple[Any, ...]], options: dict[str, Any]) -> Sequence[Any]:
        """Enqueue a message for each tuple of arguments; see `CatgaTask.delay_many`."""
        return bulk.send(self, task, arguments, options)

    def relay(self, *, queues: Sequence[str] = (), batch_size: int | None = None) -> Relay:
        """Return a relay for this application's outbox and broker."""
        settings = self.catga_settings
        if batch_size is not None:
            settings = replace(settings, outbox_batch_size=batch_size)
        names = ("", *settings.outbox_brokers)
        return Relay([
            Lane(
                self.outbox.engine,
                self.publisher(name),
                settings,
                broker=name,
                brokers=names,
                queues=queues,
                published=partial(self._announce, name),
                result_expires=self._result_expires,
                system=self.messaging_system(name),
                timed=bool(self.conf.worker_send_task_events),
            )
            for name in names
        ], Gauges(self.outbox.engine).read)  # fmt: skip

    @property
    def _result_expires(self) -> float | None:
        """Celery's setting in seconds; None for results that are kept."""
        value = self.conf.result_expires
        return float(value.total_seconds() if isinstance(value, timedelta) else value or 0) or None

    def publisher(self, broker: str = "") -> Publisher:
        """Return the publisher for this application's own broker, or for one of `outbox_brokers`."""
        connection = self._publishing_connection(broker)
        kind = KombuPublisher
        # Imported here: each one's client is an extra.
        if connection.transport.driver_type == "redis":
            from catga_tasks.brokers.redis import RedisPublisher as kind  # noqa: N813 - the class of this broker
        elif connection.transport.driver_type == "nats":
            from catga_tasks.brokers.nats_publisher import NatsPublisher as kind  # noqa: N813
        return kind(partial(self._publishing_connection, broker), self.amqp.entities, self.call_backend)

    def messaging_system(self, broker: str = "") -> str:
        """Return what OpenTelemetry calls the broker of this name: "redis", "nats", "rabbitmq" ..."""
        found = self._systems.get(broker)
        if found is None:
            kind = str(self.connection_to(broker).transport.driver_type)
            found = self._systems[broker] = {"amqp": "rabbitmq"}.get(kind, kind)
        return found

    def connection_to(self, broker: str = "", **options: Any) -> Connection:
        """Return a connection for publishing to the broker of this name, or to the application's own."""
        return self.connection_for_write(broker or self._own_broker, **options)

    @property
    def _own_broker(self) -> Any:
        """Where calls without `broker` go, also in a worker that was started with `-b` and another's name."""
        given = self.conf.broker_write_url
        if not isinstance(given, str) or given not in self.catga_settings.outbox_brokers:
            return given
        own = self.conf.first("broker_url", "broker_host")
        if not own:
            message = (
                f"-b {given} says whose messages to take, not where to send those without a broker: set broker_url."
            )
            raise ConfigurationError(message)
        return own

    def _connection(self, url: Any, *args: Any, **options: Any) -> Connection:
        """Connect to a URL, or to a broker of `outbox_brokers` by its name, with its own transport options."""
        try:
            if not isinstance(url, str) or url not in self.catga_settings.outbox_brokers:
                return super()._connection(url, *args, **options)
            url, transport_options = self.catga_settings.broker(url)
            transport_options.update(options.get("transport_options") or {})
            timeout = self.either("broker_connection_timeout", options.get("connect_timeout"))
            return self.amqp.Connection(
                url, heartbeat=options.get("heartbeat"), transport_options=transport_options, connect_timeout=timeout
            )
        except KeyError as error:
            message = f"broker_url: {error.args[0]}"
            raise ConfigurationError(message) from None
        except ModuleNotFoundError as error:
            extra = {"nats": "nats", "nkeys": "nats", "redis": "redis"}.get(error.name or "")
            if extra is None:
                raise
            message = (
                f"broker_url: the client {error.name!r} is not installed: "
                f"`pip install 'catga-tasks[{extra}]'` brings it."
            )
            raise ConfigurationError(message) from None

    def direct_producer(self, broker: str) -> Any:
        """Return a context manager: a producer for messages that go straight to the broker."""
        return pools.producers[self.connection_to(broker)].acquire(block=True)

    def _publishing_connection(self, broker: str) -> Connection:
        timeout = self.catga_settings.outbox_publish_timeout
        connection = self.connection_to(broker, connect_timeout=timeout)
        limits: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        if connection.transport_cls in ("nats", "tls"):
            limits = {"publish_timeout": timeout, "connect_timeout": min(timeout, 5.0)}
        if connection.transport_cls in ("amqp", "pyamqp", "amqps"):
            limits = {"confirm_publish": True, "read_timeout": timeout, "write_timeout": timeout}
        connection.transport_options = {**connection.transport_options, **limits}
        return connection

    def _announce(self, broker: str, envelopes: list[Envelope]) -> None:
        """Send Celery's task-sent events of messages that the broker confirmed."""
        wanted = [envelope for envelope in envelopes if envelope.send_event]
        try:
            self._send_events(broker, wanted)
        except Exception as error:  # noqa: BLE001 - an event is worth no relay
            logger.warning("%d task-sent events were not sent: %s", len(wanted), type(error).__name__)

    def _send_events(self, broker: str, wanted: list[Envelope]) -> None:
        if not wanted:
            return
        with (
            self._publishing_connection(broker) as connection,
            self.events.Dispatcher(connection, buffer_while_offline=False) as dispatcher,
        ):
            for envelope in wanted:
                headers = loads(envelope.headers)
                fields = {name: headers.get(name) for name in ("root_id", "parent_id", "retries", "eta", "expires")}
                dispatcher.send(
                    "task-sent",
                    uuid=envelope.task_id,
                    name=envelope.task,
                    args=headers.get("argsrepr"),
                    kwargs=headers.get("kwargsrepr"),
                    queue=envelope.queue,
                    exchange=envelope.exchange,
                    routing_key=envelope.routing_key,
                    **fields,
                )

    def _get_backend(self) -> Backend:
        ours = {"outbox": "catga_tasks.backend:OutboxBackend"}
        self.loader.override_backends = {**self.loader.override_backends, **ours}
        backend = super()._get_backend()
        deferral.defer(backend)
        return backend

    @cached_property
    def _relays_backend(self) -> Backend:
        """Return the result backend for relays: a lost connection is tried again once, for a batch waits meanwhile."""
        backend = self._get_backend()
        backend.retry_policy = {**backend.retry_policy, "max_retries": 1, "interval_start": 0.1}
        return backend

    def call_backend(self, calls: str) -> None:
        """Make the calls to the result backend that a message carries, before it is published."""
        for method, *arguments in json.loads(calls):
            original = getattr(self._relays_backend, f"catga_{method}")
            if method == "apply_chord":
                group = result_from_tuple(arguments[0], app=self)
                original((group.id, group.results), None)
            else:
                original(*arguments)


def _relay_option() -> Any:
    import click
    from celery.bin.base import CeleryOption

    return CeleryOption(
        ["--outbox-relay"],
        is_flag=True,
        default=False,
        help="Run a relay of the outbox inside this worker.",
        help_group="Worker Options",
        type=click.BOOL,
    )
