"""How do messages of a queue come that isn't stored? By plain subscriptions, while somebody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from catga_tasks.brokers.bindings import wanted
from catga_tasks.brokers.pulling import Buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.jetstream import Connection


class Tap(Buffer):
    """A queue that isn't stored: what comes on its subjects while it is open."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._subscriptions: dict[str, Any] = {}
        self._bound: list[tuple[str, str, str]] = []

    def bind(self, exchange: str, kind: str, routing_key: str) -> None:
        """Take what this binding wants of the exchange's messages."""
        if (exchange, kind, routing_key) not in self._bound:
            self._bound.append((exchange, kind, routing_key))

    def takes(self, exchange: str, routing_key: str) -> bool:
        """Return whether a message is for this queue: a subject may let more through."""
        if not exchange:
            return True
        bound = [(kind, pattern) for name, kind, pattern in self._bound if name == exchange]
        return any(wanted(kind, pattern, routing_key) for kind, pattern in bound)

    def listen(self, subjects: Sequence[str]) -> None:
        """Subscribe, and return when the server knows of it: a broadcast may follow at once."""
        fresh = [subject for subject in subjects if subject not in self._subscriptions]
        if fresh:
            self._connection.call(self._subscribe(fresh))

    def stop(self) -> None:
        """Unsubscribe."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        if subscriptions:
            self._connection.call(self._unsubscribe(list(subscriptions.values())))

    async def _subscribe(self, subjects: Sequence[str]) -> None:
        for subject in subjects:
            self._subscriptions[subject] = await self._connection.nats.subscribe(subject, cb=self._arrived)
        await self._connection.nats.flush()

    async def _unsubscribe(self, subscriptions: Sequence[Any]) -> None:
        for subscription in subscriptions:
            await subscription.unsubscribe()

    async def _arrived(self, msg: Msg) -> None:
        self.messages.append(msg)
        self._connection.bell.ring()
