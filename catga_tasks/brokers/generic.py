"""Any broker that kombu knows: one publish a message, in order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.utils.json import loads

from catga_tasks.brokers.contract import Receipt
from catga_tasks.envelope import Row, outgoing
from catga_tasks.errors import BrokerUnavailable, MessageRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kombu import Connection, Producer

    from catga_tasks.envelope import Envelope


class KombuPublisher:
    """Publishes stored bytes through kombu.

    `connect` makes a fresh connection to the broker with its time-outs set; `entities` returns what to declare
    for a row's queue; `call_backend` makes the calls to the result backend that a row carries.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        entities: Callable[[str], list[Any]],
        call_backend: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._entities = entities
        self._call_backend = call_backend
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._declared: set[tuple[str, str | None]] = set()
        self._outages = 0

    def publish(self, rows: Sequence[Row]) -> Receipt:
        """Send the rows one by one; see `Publisher`."""
        receipt = Receipt()
        for row in rows:
            try:
                self.send(row)
            except MessageRejected as error:
                receipt.rejected.append((row, str(error)))
            except BrokerUnavailable as error:
                receipt.outage = str(error)
                break
            else:
                receipt.confirmed.append(row)
        return receipt

    def send(self, row: Row) -> None:
        """Send one row; raise `MessageRejected` if it is at fault, `BrokerUnavailable` if the broker is.

        Whether the row is at fault shows in a second question: a broker that answers that isn't down.
        """
        envelope = outgoing(row)
        self.prepare(row)
        producer = self.producer()
        try:
            producer.publish(
                envelope.body,
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
                priority=envelope.priority or 0,
                content_type=envelope.content_type,
                content_encoding=envelope.content_encoding,
                headers=loads(envelope.headers),
                **_publish_options(loads(envelope.properties)),
            )
        except Exception as error:
            self.blame(error)

    def blame(self, error: Exception) -> NoReturn:
        """Raise `MessageRejected` after an error if the broker still answers, else `BrokerUnavailable`."""
        self.close()
        self.ping()
        message = describe(error)
        raise MessageRejected(message) from error

    def producer(self) -> Producer:
        """Return the producer on the open connection, opening it first if need be."""
        if self._producer is None:
            self._connection = self._connect()
            self._fail_over(self._connection)
            self._connection.ensure_connection(max_retries=0, timeout=self._connection.connect_timeout)
            self._producer = self._connection.Producer(auto_declare=False)
            self._declared.clear()
        return self._producer

    def prepared(self, rows: Sequence[Row], receipt: Receipt) -> Iterator[tuple[Row, Envelope]]:
        """Prepare the rows for the default exchange; yield each with what goes out, and note those at fault."""
        for row in rows:
            if row.envelope.exchange:
                continue
            try:
                envelope = outgoing(row)
                self.prepare(row)
            except MessageRejected as error:
                receipt.rejected.append((row, str(error)))
            else:
                yield row, envelope

    def prepare(self, row: Row) -> None:
        """Do what must be done before the publish; raise as `send` does."""
        self._declare(row)
        if row.envelope.backend_calls is not None:
            try:
                self._call_backend(row.envelope.backend_calls)
            except Exception as error:
                # Only the chords wait for the result backend; the broker takes everything else.
                message = f"The result backend failed before the message was sent: {describe(error)}"
                raise MessageRejected(message) from error

    def _declare(self, row: Row) -> None:
        producer = self._opened()
        envelope = row.envelope
        key = (envelope.queue, envelope.declarations)
        if key in self._declared:
            return
        entities = self._entities(envelope.queue) if envelope.declarations is None else _restored(envelope.declarations)
        try:
            for entity in entities:
                producer.maybe_declare(entity)
        except Exception as error:
            self.blame(error)
        self._declared.add(key)

    def ping(self) -> None:
        """Make a real round trip to the broker; raise `BrokerUnavailable` if there is no answer."""
        self._opened()

    def probe(self, queues: Sequence[str]) -> None:
        """Show that a message could go to these queues now, and leave none behind; raise `BrokerUnavailable` if not.

        Here the broker is asked for each queue, as before a publish.
        """
        producer = self._opened()
        try:
            for queue in queues:
                for entity in self._entities(queue):
                    producer.maybe_declare(entity)
        except Exception as error:
            self.give_up(error)

    def _opened(self) -> Producer:
        try:
            return self.producer()
        except Exception as error:
            self.give_up(error)

    def _fail_over(self, connection: Connection) -> None:
        """Turn to the URL whose turn it is, if the broker has several."""
        options = connection.transport_options
        for _ in range(self._outages % max(1, len(connection.alt))):
            _ = connection.transport  # which may know better than kombu how to read the next URL
            connection.maybe_switch_next()
            # kombu forgets what wasn't there from the start.
            connection.transport_options = options

    def close(self) -> None:
        """Close the connection, also when it is broken."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()

    def give_up(self, error: Exception) -> NoReturn:
        """Close the connection and raise `BrokerUnavailable`; the next one is to the next of several URLs."""
        self.close()
        self._outages += 1
        message = describe(error)
        raise BrokerUnavailable(message) from error


def describe(error: BaseException) -> str:
    """Return the error in one line: its kind and its words. Brokers' errors carry no URL, so no password."""
    if isinstance(error, OperationalError) and error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def dump(entities: Sequence[Any]) -> str:
    """Return declarations as JSON, for a row whose queue isn't the application's own."""
    return json.dumps([{"kind": type(entity).__name__, **_dict(entity)} for entity in entities])


def restore(text: str) -> list[Any]:
    """Return the entities of `dump`."""
    return [_entity(declaration) for declaration in json.loads(text)]


def _restored(text: str) -> list[Any]:
    try:
        return restore(text)
    except MessageRejected:
        raise
    except Exception as error:
        message = f"The row's declarations can't be decoded: {describe(error)}"
        raise MessageRejected(message) from error


def _dict(entity: Any) -> dict[str, Any]:
    fields: dict[str, Any] = entity.as_dict(recurse=True)
    fields.pop("on_declared", None)
    return fields


def _entity(declaration: dict[str, Any]) -> Any:
    kind = declaration.pop("kind")
    if kind == "Exchange":
        return Exchange(**declaration)
    exchange = declaration.pop("exchange", None)
    bindings = declaration.pop("bindings", None)
    if bindings:
        message = "A queue with several bindings can't be stored with a message: name it in task_queues."
        raise MessageRejected(message)
    return Queue(exchange=Exchange(**exchange) if exchange else None, **declaration)


def _publish_options(properties: dict[str, Any]) -> dict[str, Any]:
    options = dict(properties)
    expiration = options.pop("expiration", None)
    if expiration is not None:
        options["expiration"] = int(expiration) / 1000
    return options
