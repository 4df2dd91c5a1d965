"""How do a queue's messages come? By standing requests, as wide as the prefetch allows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from nats import errors

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from catga_tasks.brokers.jetstream import Connection

#: How long the server keeps a request for messages, in seconds.
PULL_SECONDS = 30.0
#: How long the end of a consumer waits for what is on its way.
DRAIN_SECONDS = 1.0


class Buffer:
    """Messages that have arrived for one queue at one priority, in their order."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.messages: deque[Msg] = deque()


class Pull:
    """A standing request for the messages of one consumer: as many as are wanted, topped up at half."""

    def __init__(self, connection: Connection, queue: str, step: int, buffer: Buffer) -> None:
        self._connection = connection
        self._queue = queue
        stream = connection.settings.stream(queue)
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.step-{step}"
        self._buffer = buffer
        self._inbox = ""
        self._subscription: Any = None
        self._wanted = 0
        self._outstanding = 0
        self._heard = time.monotonic()

    def want(self, count: int) -> None:
        """Let so many messages come, those that wait in the buffer included. For any thread."""
        short = count - len(self._buffer.messages)
        if count == self._wanted and self._outstanding > short // 2:
            return
        self._wanted = count
        with contextlib.suppress(RuntimeError):
            self._connection._loop.call_soon_threadsafe(self.request)

    async def start(self) -> None:
        """Subscribe to the answers."""
        self._inbox = self._connection.nats.new_inbox()
        self._subscription = await self._connection.nats.subscribe(self._inbox, cb=self._arrived)
        self._connection._pulls.add(self)

    async def stop(self) -> None:
        """Unsubscribe and give back what nobody has seen."""
        self._connection._pulls.discard(self)
        self._wanted = 0
        with contextlib.suppress(errors.Error, TimeoutError):
            if self._connection.nats.is_connected:
                # What the server has sent by now still comes; unsubscribed at once, it would wait for ack_wait.
                await asyncio.wait_for(self._subscription.drain(), DRAIN_SECONDS)
            else:
                await self._subscription.unsubscribe()
        while self._buffer.messages:
            self._connection.settle(self._buffer.messages.popleft().reply, b"-NAK")

    def request(self) -> None:
        """Ask for what is missing, unless half of it is on its way."""
        missing = self._wanted - len(self._buffer.messages) - self._outstanding
        if missing <= 0 or self._outstanding > self._wanted // 2 or not self._connection.nats.is_connected:
            return
        self._outstanding += missing
        request = json.dumps({"batch": missing, "expires": int(PULL_SECONDS * 1e9)}).encode()
        asyncio.ensure_future(self._connection.nats.publish(self._subject, request, reply=self._inbox))  # noqa: RUF006

    def reset(self) -> None:
        """Ask anew: the requests of before are gone."""
        self._outstanding = 0
        self._heard = time.monotonic()
        self.request()

    def check(self) -> None:
        """Ask anew when the server has been silent for longer than it keeps a request."""
        if self._outstanding and time.monotonic() - self._heard > PULL_SECONDS + 5:
            self.reset()

    async def _arrived(self, msg: Msg) -> None:
        self._heard = time.monotonic()
        if not msg.reply:
            headers = msg.headers or {}
            self._outstanding = max(0, self._outstanding - int(headers.get("Nats-Pending-Messages", self._outstanding)))
            if headers.get("Status") in ("404", "409", "503") and "Deleted" in str(headers.get("Description")):
                self._connection.streams.known.discard(self._queue)
            self._connection._loop.call_later(0.05, self.request)
            return
        self._outstanding = max(0, self._outstanding - 1)
        limit = self._connection.settings.max_deliver
        if limit is not None and msg.metadata.num_delivered > limit:
            reason = f"delivered {limit} times (max_deliver) and never acknowledged"
            asyncio.ensure_future(self._connection.bury(self._queue, msg, reason))  # noqa: RUF006
            return
        self._connection.hold(msg)
        self._buffer.messages.append(msg)
        self._connection.signal()
