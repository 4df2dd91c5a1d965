"""What does the server hear of a message that it has delivered? That it is in hand, and what became of it.

Acknowledgements are gathered, sent together and confirmed. Requests for more messages leave with them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING

from nats import errors

from catga_tasks.brokers.pulling import consumer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.jetstream import Connection
    from catga_tasks.brokers.pulling import Pull

#: Acknowledgements that follow one another are gathered for this long, in seconds: waking the loop thread costs as much
#: as a message does. The first goes at once.
GATHER_SECONDS = 0.005


class Settling:
    """The deliveries of one connection. `settle`, `soon` and `ask` are for any thread, the rest is for the loop's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = connection.loop
        self._posted: deque[tuple[str, bytes]] = deque()
        self._soon: dict[Callable[[], object], None] = {}
        self._gathering = False
        self._sending = False
        self._asks: deque[tuple[Pull, int]] = deque()
        self._held: dict[str, None] = {}
        self._unconfirmed: dict[str, list[tuple[str, bytes]]] = {}
        self._tokens = 0
        self._inbox = ""

    # Any thread

    def settle(self, reply: str, verb: bytes) -> None:
        """Acknowledge (`+ACK`), give back (`-NAK`) or end (`+TERM`) a delivery; sent again until it is confirmed."""
        self._posted.append((reply, verb))
        self._wake()

    def soon(self, work: Callable[[], object]) -> None:
        """Call the function on the loop thread when acknowledgements are sent next."""
        self._soon[work] = None
        self._wake()

    def ask(self, asks: Sequence[tuple[Pull, int]]) -> None:
        """Send requests for so many messages each, at once."""
        self._asks.extend(asks)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._post)

    def _wake(self) -> None:
        if not self._gathering:
            self._gathering = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._gather)

    # The loop thread

    async def start(self) -> None:
        """Subscribe to the confirmations."""
        self._inbox = self._connection.nats.new_inbox()
        await self._connection.nats.subscribe(f"{self._inbox}.*", cb=self._confirmed)

    def hold(self, reply: str) -> None:
        """Keep the server from delivering the message again while it is in hand."""
        self._held[reply] = None

    def let_go(self, reply: str) -> None:
        """Say no more that it is in hand."""
        self._held.pop(reply, None)

    async def say_in_progress(self) -> None:
        """Tell the server of all that is in hand: the worker's own thread may be busy for hours."""
        for reply in list(self._held):
            with contextlib.suppress(errors.Error):
                await self._connection.nats.publish(reply, b"+WPI")

    async def send_again(self) -> None:
        """Send what isn't confirmed: the connection was lost, and is back."""
        for token, settled in list(self._unconfirmed.items()):
            await self._publish(settled, token)

    async def give_back(self) -> None:
        """Send what waits, and give back what is still in hand."""
        await self._send_settled()
        for reply in list(self._held):
            await self._connection.nats.publish(reply, b"-NAK")

    def _gather(self) -> None:
        """Send what is posted, and look again after a while without being woken; nothing is lost between the two."""
        if self._posted or self._soon:
            while self._soon:
                self._soon.popitem()[0]()
            self._post()
            self._loop.call_later(GATHER_SECONDS, self._gather)
            return
        self._gathering = False
        if self._posted or self._soon:
            self._gathering = True
            self._gather()

    def _post(self) -> None:
        if not self._sending:
            self._sending = True
            self._connection.finish(self._send_posted())

    async def _send_posted(self) -> None:
        try:
            await self._send_settled()
            while self._asks:
                pull, count = self._asks.popleft()
                await pull.ask(count)
        finally:
            self._sending = False
        if self._posted or self._asks:
            self._post()

    async def _send_settled(self) -> None:
        """Send what is posted. A consumer confirms in the order of arrival: the last of a batch answers for all."""
        batches: dict[str, list[tuple[str, bytes]]] = {}
        while self._posted:
            reply, verb = self._posted.popleft()
            self._held.pop(reply, None)
            batches.setdefault(consumer_of(reply), []).append((reply, verb))
        for settled in batches.values():
            self._tokens += 1
            token = str(self._tokens)
            self._unconfirmed[token] = settled
            with contextlib.suppress(errors.Error):
                # In an outage it goes out again when the connection is back.
                await self._publish(settled, token)

    async def _publish(self, settled: Sequence[tuple[str, bytes]], token: str) -> None:
        *others, (last, verb) = settled
        for reply, each in others:
            await self._connection.nats.publish(reply, each)
        await self._connection.nats.publish(last, verb, reply=f"{self._inbox}.{token}")

    async def _confirmed(self, msg: Msg) -> None:
        self._unconfirmed.pop(msg.subject.rpartition(".")[2], None)
