"""Where does a message end that nobody takes? In a stream of its own, with the reason."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from nats import errors
from nats.js import api
from nats.js import errors as js_errors

from catga_tasks.brokers.nats_errors import translated
from catga_tasks.brokers.pulling import place_of, times_delivered
from catga_tasks.brokers.streams import STREAM_EXISTS

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from catga_tasks.brokers.jetstream import Connection

logger = logging.getLogger("catga_tasks.nats")

#: Why a dead letter is one that its consumer rejected without giving it back.
REJECTED = "Its consumer rejected it: the task isn't registered, it can't be decoded, or the task raised Reject."


class DeadLetters:
    """The dead letters of one connection's `stream_prefix`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._there = False

    def reject(self, queue: str, reply: str) -> None:
        """Move a delivery to the dead letters, soon. For any thread."""
        with contextlib.suppress(RuntimeError):
            self._connection.loop.call_soon_threadsafe(
                lambda: self._connection.finish(self._guarded(queue, self._reject(queue, reply)))
            )

    def bury_soon(self, queue: str, reply: str, body: bytes, reason: str) -> None:
        """Move a message to the dead letters; if that fails it is delivered again. From the loop thread."""
        self._connection.finish(self._guarded(queue, self.bury(queue, reply, body, reason)))

    async def bury(self, queue: str, reply: str, body: bytes, reason: str) -> None:
        """Move a message to the dead letters, and only then end it."""
        await self._ensure()
        subject = self._connection.settings.subject(queue, 0).replace(".q.", ".dead.", 1)
        headers = {"Catga-Queue": queue, "Catga-Reason": reason, "Catga-Died-Of": str(times_delivered(reply))}
        await self._connection.js.publish(subject, body, headers=headers)
        self._connection.settling.settle(reply, b"+TERM")

    async def _reject(self, queue: str, reply: str) -> None:
        # If this fails the message isn't in hand any more: it is delivered again, and rejected again.
        self._connection.settling.let_go(reply)
        stored = await self._connection.js.get_msg(*place_of(reply))
        await self.bury(queue, reply, stored.data or b"", REJECTED)

    async def _guarded(self, queue: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (errors.Error, TimeoutError) as error:
            logger.warning("A message that is no good stays in queue %s: %s", queue, translated(error))

    async def _ensure(self) -> None:
        """Make their stream, unless it is there: somebody may have given it other limits."""
        if self._there:
            return
        settings = self._connection.settings
        wanted = api.StreamConfig(
            name=settings.dead_stream,
            subjects=[f"{settings.stream_prefix}.dead.>"],
            storage=api.StorageType(settings.storage),
            num_replicas=settings.replicas,
        )
        try:
            await self._connection.js.add_stream(wanted)
        except js_errors.APIError as error:
            if error.err_code != STREAM_EXISTS:
                raise
        self._there = True
