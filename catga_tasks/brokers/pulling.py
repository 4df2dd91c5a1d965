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
#: How often the server says that it still has a request, in seconds, and how long it may say nothing. A leader that is
#: killed takes the requests with it, and nobody says so.
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 11.0
#: How long the end of a consumer waits for what is on its way, in seconds.
DRAIN_SECONDS = 1.0
#: After an answer that isn't a message, the next request waits this long, in seconds.
PAUSE_SECONDS = 0.05
#: A message of a lower priority waits this long for one of a higher that is on its way, in seconds.
EXPECTED_SECONDS = 0.05
#: The parts of a delivery's reply subject, $JS.ACK.stream.consumer.delivered..., without a domain.
_SHORT_REPLY = 9


def times_delivered(reply: str) -> int:
    """Return how many times the server has delivered this message, by the reply subject of this delivery.

    Its form is that of NATS' ADR-15; a domain and an account's hash may come before the stream.
    """
    parts = reply.split(".", 7)
    return int(parts[4] if reply.count(".") < _SHORT_REPLY else parts[6])


def messages_after(reply: str) -> int:
    """Return how many messages the consumer had left when it sent this one."""
    parts = reply.split(".")
    return int(parts[8] if len(parts) == _SHORT_REPLY else parts[10])


def consumer_of(reply: str) -> str:
    """Return the part of a delivery's reply subject that names its consumer."""
    return ".".join(reply.split(".", 7)[: 4 if reply.count(".") < _SHORT_REPLY else 6])


def place_of(reply: str) -> tuple[str, int]:
    """Return the stream and the message's number in it."""
    parts = reply.split(".", 8)
    return (parts[2], int(parts[5])) if reply.count(".") < _SHORT_REPLY else (parts[4], int(parts[7]))


class Buffer:
    """Messages that have arrived for one queue at one priority, in their order."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.messages: deque[Msg] = deque()


class Pull(Buffer):
    """Standing requests for the messages of one consumer.

    Whoever consumes counts what is asked for, the loop thread what has come of it: no lock in a message's way.
    """

    def __init__(self, connection: Connection, queue: str, step: int, rank: int) -> None:
        super().__init__(rank)
        self._connection = connection
        self._queue = queue
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{connection.settings.stream(queue)}.step-{step}"
        self._inbox = ""
        self._subscription: Any = None
        self._asked = 0
        self._came = 0
        self._heard = time.monotonic()
        self._last: str | None = None
        self._asked_at = 0.0

    def missing(self, room: int) -> int:
        """Return how many more messages there is room for than have come or are coming."""
        return room - len(self.messages) - self.coming

    @property
    def coming(self) -> int:
        """How many messages are asked for that haven't come."""
        return self._asked - self._came

    @property
    def expected(self) -> bool:
        """Whether a message must be on its way: it was just asked for, and the server had more, or hasn't said."""
        if not self.coming or time.monotonic() - self._asked_at > EXPECTED_SECONDS:
            return False
        return self._last is None or messages_after(self._last) > 0

    def asked(self, count: int) -> None:
        """Count messages as asked for; whoever does asks for them."""
        self._asked += count
        self._asked_at = time.monotonic()

    # The loop thread

    async def start(self) -> None:
        """Subscribe to the answers."""
        self._inbox = self._connection.nats.new_inbox()
        self._subscription = await self._connection.nats.subscribe(self._inbox, cb=self._arrived)
        self._connection.pulls.add(self)

    async def stop(self) -> None:
        """Unsubscribe and give back what nobody has seen."""
        self._connection.pulls.discard(self)
        with contextlib.suppress(errors.Error, TimeoutError):
            if self._connection.nats.is_connected:
                # What the server has sent by now still comes; unsubscribed at once, it would wait for ack_wait.
                await asyncio.wait_for(self._subscription.drain(), DRAIN_SECONDS)
            else:
                await self._subscription.unsubscribe()
        while self.messages:
            self._connection.settling.settle(self.messages.popleft().reply, b"-NAK")

    async def ask(self, count: int) -> None:
        """Send a request for so many messages."""
        if not self._connection.nats.is_connected or self not in self._connection.pulls:
            self._came += count
            return
        self._heard = time.monotonic()
        request = {"batch": count, "expires": int(PULL_SECONDS * 1e9), "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9)}
        with contextlib.suppress(errors.Error):
            await self._connection.nats.publish(self._subject, json.dumps(request).encode(), reply=self._inbox)

    def reset(self) -> None:
        """Have everything asked for anew: the requests of before are gone."""
        self._came = self._asked
        self._heard = time.monotonic()
        self._connection.bell.ring()

    def check(self) -> None:
        """Have it asked for anew when the server has been silent for too long."""
        if self._asked > self._came and time.monotonic() - self._heard > SILENCE_SECONDS:
            self.reset()

    async def _arrived(self, msg: Msg) -> None:
        self._heard = time.monotonic()
        connection = self._connection
        if not msg.reply:
            self._ended(msg.headers or {})
            return
        self._came += 1
        self._last = msg.reply
        limit = connection.settings.max_deliver
        if limit is not None and times_delivered(msg.reply) > limit:
            reason = f"It was delivered {limit} times (max_deliver) and never acknowledged."
            connection.dead.bury_soon(self._queue, msg.reply, msg.data, reason)
            connection.bell.ring()
            return
        connection.settling.hold(msg.reply)
        self.messages.append(msg)
        connection.bell.ring()

    def _ended(self, headers: dict[str, str]) -> None:
        """Note that a request has ended, by its time or because its stream is gone; or that it goes on."""
        if headers.get("Status") == "100":
            return
        self._came = min(self._asked, self._came + int(headers.get("Nats-Pending-Messages", self._asked)))
        if headers.get("Status") in ("404", "409", "503") and "Deleted" in str(headers.get("Description")):
            self._connection.streams.known.discard(self._queue)
        self._connection.loop.call_later(PAUSE_SECONDS, self._connection.bell.ring)
