"""Redis: a batch in one pipeline, under the keys that kombu's transport reads."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, NoReturn

from redis import exceptions

from catga_tasks.brokers.contract import Receipt
from catga_tasks.brokers.generic import KombuPublisher, describe
from catga_tasks.envelope import virtual_message
from catga_tasks.errors import BrokerUnavailable, MessageRejected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from catga_tasks.envelope import Row

#: Answers of a Redis that refuses every write: full, a replica, unable to save, loading, or closed to us.
_REFUSES_ALL = (
    "OOM",
    "READONLY",
    "MISCONF",
    "LOADING",
    "NOREPLICAS",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "NOAUTH",
    "NOPERM",
    "WRONGPASS",
    "BUSY",
    "TRYAGAIN",
)


class RedisPublisher(KombuPublisher):
    """Publishes to the default exchange, which is where Celery's queues are, by LPUSH in a pipeline.

    Rows for named exchanges (topic, fanout) take kombu's way, one at a time.
    """

    def publish(self, rows: Sequence[Row]) -> Receipt:
        """Send the rows; see `Publisher`.

        A pipeline that fails as a whole says nothing of its rows, so they are sent again one by one: duplicates
        are allowed, and a message that Redis chokes on is found.
        """
        receipt = Receipt()
        try:
            pushes = self._pushes(rows, receipt)
            self._execute(pushes, receipt)
        except BrokerUnavailable as error:
            receipt.outage = str(error)
        except _BatchFailed:
            self._one_by_one([row for row, _, _ in pushes], receipt)
        if receipt.outage is None:
            rest = super().publish([row for row in rows if row.envelope.exchange])
            receipt.confirmed += rest.confirmed
            receipt.rejected += rest.rejected
            receipt.outage = rest.outage
        return receipt

    def blame(self, error: Exception) -> NoReturn:
        """Ask again on the same connection: an answer of Redis leaves it as it was."""
        if self._connection is None or isinstance(error, self._connection.connection_errors):
            self.give_up(error)
        self._judge(error)
        self.ping()
        message = describe(error)
        raise MessageRejected(message) from error

    def ping(self) -> None:
        """Ask the server itself: kombu's connection may be an object without a socket."""
        try:
            with self.producer().channel.conn_or_acquire() as client:
                client.ping()
        except Exception as error:
            self.give_up(error)

    def probe(self, queues: Sequence[str]) -> None:
        """Push to each queue and take it back in one transaction: who is full or read-only answers a ping."""
        try:
            channel = self.producer().channel
            with channel.conn_or_acquire() as client, client.pipeline(transaction=True) as pipeline:
                for key in (channel._q_for_pri(queue, channel.min_priority) for queue in queues):
                    pipeline.lpush(key, "")
                    pipeline.lpop(key)
                pipeline.execute()
        except Exception as error:
            self.give_up(error)

    def _pushes(self, rows: Sequence[Row], receipt: Receipt) -> list[tuple[Row, str, str]]:
        pushes = []
        # A random name for the batch, with the row's number: one for each message took a fifth of the time.
        batch = str(uuid.uuid4())
        for row, envelope in self.prepared(rows, receipt):
            channel = self.producer().channel
            priority = min(max(envelope.priority or 0, channel.min_priority), channel.max_priority)
            pushes.append(
                (
                    row,
                    channel._q_for_pri(envelope.routing_key, priority),
                    virtual_message(envelope, f"{batch}-{row.id}"),
                )
            )
        return pushes

    def _execute(self, pushes: list[tuple[Row, str, str]], receipt: Receipt) -> None:
        """Push everything in one round trip; the reply to each push is its confirmation."""
        if not pushes:
            return
        # One LPUSH a key keeps the order of the rows and costs Redis a fraction of one a message.
        keys: dict[str, list[tuple[Row, str]]] = {}
        for row, key, message in pushes:
            keys.setdefault(key, []).append((row, message))
        try:
            with self.producer().channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipeline:
                for key, entries in keys.items():
                    pipeline.lpush(key, *(message for _, message in entries))
                self._expire(pipeline, pushes)
                replies = pipeline.execute(raise_on_error=False)
        except (exceptions.AuthenticationError, exceptions.TimeoutError) as error:
            self.give_up(error)
        except Exception as error:
            self.close()
            self.ping()
            raise _BatchFailed from error
        again: list[Row] = []
        for entries, reply in zip(keys.values(), replies, strict=False):
            if isinstance(reply, Exception):
                self._judge(reply)
                if "Protocol error" in str(reply):
                    self.close()  # Redis closes the connection after it
                if len(entries) == 1:
                    receipt.rejected.append((entries[0][0], describe(reply)))
                else:
                    # One of them is at fault, and the answer is to all of them.
                    again.extend(row for row, _ in entries)
            else:
                receipt.confirmed.extend(row for row, _ in entries)
        self._one_by_one(again, receipt)

    def _one_by_one(self, rows: Sequence[Row], receipt: Receipt) -> None:
        for row in rows:
            alone = Receipt()
            try:
                self._execute(self._pushes([row], alone), alone)
            except BrokerUnavailable as error:
                receipt.outage = str(error)
                return
            except _BatchFailed as failure:
                alone.rejected.append((row, describe(failure.__cause__ or failure)))
            receipt.confirmed += alone.confirmed
            receipt.rejected += alone.rejected

    def _expire(self, pipeline: Any, pushes: list[tuple[Row, str, str]]) -> None:
        channel = self.producer().channel
        for queue in {row.envelope.routing_key for row, _, _ in pushes} & set(channel._expires):
            for step in channel.priority_steps:
                pipeline.pexpire(channel._q_for_pri(queue, step), channel._expires[queue])

    def _judge(self, reply: Exception) -> None:
        """Raise if the answer means that Redis takes nothing from anybody: no row is at fault then."""
        if isinstance(reply, exceptions.ConnectionError) or describe(reply).split(": ", 1)[-1].startswith(_REFUSES_ALL):
            self.give_up(reply)
        answers = (exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.BusyLoadingError)
        if isinstance(reply, (*answers, exceptions.NoPermissionError, exceptions.AuthenticationError)):
            self.give_up(reply)


class _BatchFailed(Exception):
    """The pipeline broke although the server answers: one of its messages may be the cause."""
