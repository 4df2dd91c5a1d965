"""When is a message published? When the server has confirmed that it is stored.

Messages leave one after another without waiting in between, and each has its own confirmation.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from kombu.exceptions import ChannelError
from nats import errors

from catga_tasks.brokers.nats_errors import StreamGone, Unreachable, refusal, translated
from catga_tasks.errors import CatgaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.jetstream import Connection


#: A message: its queue, its priority's step, its body, its id.
Entry = tuple[str, int, bytes, str]


class Publishing:
    """The messages that one connection publishes. Coroutines are for the loop thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._awaited: dict[int, tuple[_Batch, int, Entry]] = {}
        self._tokens = 0
        self._inbox = ""

    async def start(self) -> None:
        """Subscribe to the confirmations."""
        nats = self._connection.nats
        self._inbox = nats.new_inbox()
        subscription = await nats.subscribe(f"{self._inbox}.*", cb=self._answered)
        nats.direct[subscription._id] = self._confirmed

    async def publish(self, entries: Sequence[Entry]) -> list[Exception | None]:
        """Publish the messages and wait for all confirmations; return each one's error or None.

        What finds its stream gone, as after a delete elsewhere, is published again to a new one; while a cluster elects
        the stream's leader, until there is one.
        """
        loop, streams = self._connection.loop, self._connection.streams
        deadline = loop.time() + self._connection.settings.publish_timeout
        found = await self._publish(entries, deadline)
        pause = 0.0
        while again := [number for number, error in enumerate(found) if isinstance(error, StreamGone)]:
            if loop.time() + pause >= deadline:
                for number in again:
                    found[number] = Unreachable("NATS takes nothing now: the queue's stream has no leader.")
                break
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 2 or 0.05)
            for number in list(again):
                queue = entries[number][0]
                streams.known.discard(queue)
                if queue in streams.expiring:
                    # As AMQP does with what nobody's queue takes: who would have read it is gone.
                    found[number] = None
                    again.remove(number)
            for number, error in zip(again, await self._publish([entries[n] for n in again], deadline), strict=True):
                found[number] = error
        return found

    async def _publish(self, entries: Sequence[Entry], deadline: float) -> list[Exception | None]:
        batch = _Batch(len(entries), self._connection.loop)
        late = self._connection.loop.call_at(deadline, batch.end)
        tokens: list[int] = []
        try:
            for number, entry in enumerate(entries):
                self._tokens += 1
                tokens.append(self._tokens)
                self._awaited[self._tokens] = (batch, number, entry)
                try:
                    if entry[0] not in self._connection.streams.known:
                        await self._connection.streams.ensure(entry[0])
                    await self._send(entry, tokens[-1])
                except (errors.Error, CatgaError, ChannelError) as error:
                    self._answer(tokens[-1], translated(error))
            await batch.complete
        finally:
            late.cancel()
            for token in tokens:
                self._awaited.pop(token, None)
        return batch.outcomes

    async def _send(self, entry: Entry, token: int) -> None:
        queue, step, body, identity = entry
        subject, reply = self._connection.settings.subject(queue, step), f"{self._inbox}.{token}"
        await self._connection.nats.publish(subject, body, reply=reply, headers={"Nats-Msg-Id": identity})

    async def send_again(self) -> None:
        """Send what isn't confirmed: the connection was lost, and is back. What is stored already isn't once more."""
        for token, (_, _, entry) in list(self._awaited.items()):
            with contextlib.suppress(errors.Error):
                await self._send(entry, token)

    async def _answered(self, msg: Msg) -> None:
        """Take an answer with headers: nobody stores what has this subject."""
        gone = msg.headers and msg.headers.get("Status") == "503"
        error = StreamGone("There is no stream for this queue.") if gone else refusal(msg.data)
        self._answer(int(msg.subject[len(self._inbox) + 1 :]), error)

    def _confirmed(self, subject: bytes, data: bytes) -> None:
        self._answer(int(subject[len(self._inbox) + 1 :]), refusal(data))

    def _answer(self, token: int, error: Exception | None) -> None:
        """Note what became of a message, once: what failed isn't sent again with those that wait for an answer."""
        awaited = self._awaited.pop(token, None)
        if awaited is not None:
            batch, number, _ = awaited
            batch.answer(number, error)


class _Batch:
    """The confirmations of messages that were published together."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        late: Exception = Unreachable("NATS didn't confirm the message in time (publish_timeout).")
        self.outcomes: list[Exception | None] = [late] * count
        self.complete = loop.create_future()
        self._open = count
        if not count:
            self.end()

    def answer(self, number: int, error: Exception | None) -> None:
        """Note what became of one."""
        self.outcomes[number] = error
        self._open -= 1
        if not self._open:
            self.end()

    def end(self) -> None:
        """Wait no longer."""
        if not self.complete.done():
            self.complete.set_result(None)
