"""NATS JetStream: a batch is published without waiting in between, and each message has its own confirmation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from catga_tasks.brokers.contract import Receipt
from catga_tasks.brokers.generic import KombuPublisher, describe
from catga_tasks.brokers.nats_errors import AT_FAULT
from catga_tasks.envelope import virtual_message
from catga_tasks.errors import BrokerUnavailable, MessageRejected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from catga_tasks.envelope import Row


class NatsPublisher(KombuPublisher):
    """Publishes to the default exchange, which is where Celery's queues are, by JetStream.

    A row's message has the id of its task and its row: what is published again within the stream's duplicate window is
    stored once, and a retry, which is another row of the same task, isn't taken for a duplicate. Rows for named
    exchanges take kombu's way, one at a time.
    """

    def publish(self, rows: Sequence[Row]) -> Receipt:
        """Send the rows; see `Publisher`."""
        receipt = Receipt()
        try:
            entries = self._entries(rows, receipt)
            outcomes = self.producer().channel.send([entry for _, entry in entries]) if entries else []
        except BrokerUnavailable as error:
            receipt.outage = str(error)
            return receipt
        except Exception as error:
            self.close()
            receipt.outage = describe(error)
            return receipt
        for (row, _), problem in zip(entries, outcomes, strict=True):
            if problem is None:
                receipt.confirmed.append(row)
            elif isinstance(problem, AT_FAULT):
                receipt.rejected.append((row, describe(problem)))
            else:
                receipt.outage = describe(problem)
        if receipt.outage is None:
            rest = super().publish([row for row in rows if row.envelope.exchange])
            receipt.confirmed += rest.confirmed
            receipt.rejected += rest.rejected
            receipt.outage = rest.outage
        else:
            self.close()
        return receipt

    def blame(self, error: Exception) -> NoReturn:
        """Judge by the kind of error: a server that answers a ping may have no JetStream, or no leader.

        What is no word of the server's comes of the row: an exchange of a type that there isn't, a limit that is text.
        """
        if not isinstance(error, (*AT_FAULT, TypeError, ValueError, LookupError)):
            self.give_up(error)
        message = describe(error)
        raise MessageRejected(message) from error

    def ping(self) -> None:
        """Make a round trip to the server."""
        try:
            nats = self.producer().channel.nats
            nats.call(nats.nats.flush())
        except Exception as error:
            self.give_up(error)

    def probe(self, queues: Sequence[str]) -> None:
        """Ask JetStream for room in each queue's stream, and let it store a message beside them."""
        try:
            nats = self.producer().channel.nats
            nats.call(nats.streams.probe(queues))
        except Exception as error:
            self.give_up(error)

    def _entries(self, rows: Sequence[Row], receipt: Receipt) -> list[tuple[Row, Any]]:
        entries = []
        for row, envelope in self.prepared(rows, receipt):
            identity = f"{envelope.task_id}-{row.id}"
            body = virtual_message(envelope, identity).encode()
            step = self.producer().channel.settings.step(envelope.priority)
            entries.append((row, (envelope.routing_key, step, body, identity)))
        return entries
