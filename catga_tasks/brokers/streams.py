"""How is a stored queue made, changed, counted and deleted? It is a stream, with a durable consumer a priority."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from nats.js import api
from nats.js import errors as js_errors

from catga_tasks.brokers.nats_errors import StreamConflict

if TYPE_CHECKING:
    from catga_tasks.brokers.jetstream import Connection

#: Requests for messages that may wait on one consumer. It can't be changed later.
MAX_WAITING = 4096
#: The server's code for a stream of that name with another configuration.
_STREAM_EXISTS = 10058


class Streams:
    """The streams that a connection knows. Coroutines are for the loop thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        #: Queues whose stream is there, and as the settings want it.
        self.known: set[str] = set()

    async def ensure(self, queue: str) -> None:
        """Make the queue's stream and its consumers, or bring them to the settings."""
        if queue in self.known:
            return
        settings = self._connection.settings
        wanted = api.StreamConfig(
            name=settings.stream(queue),
            subjects=[settings.subject(queue)],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType(settings.storage),
            num_replicas=settings.replicas,
            discard=api.DiscardPolicy(settings.discard),
            duplicate_window=min(settings.duplicate_window, settings.max_age or settings.duplicate_window),
            max_age=settings.max_age or 0,
            max_msgs=settings.max_msgs or -1,
            max_bytes=settings.max_bytes or -1,
            max_msg_size=settings.max_msg_size or -1,
            compression=api.StoreCompression.S2 if settings.compression else api.StoreCompression.NONE,
        )
        try:
            await self._connection.js.add_stream(wanted)
        except js_errors.APIError as error:
            if error.err_code != _STREAM_EXISTS:
                raise
            await self._adjust(queue, wanted)
        for step in settings.priority_steps:
            await self._connection.js.add_consumer(
                wanted.name,
                api.ConsumerConfig(
                    durable_name=f"step-{step}",
                    filter_subject=settings.subject(queue, step),
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=settings.ack_wait,
                    max_ack_pending=settings.max_ack_pending,
                    max_waiting=MAX_WAITING,
                    # The server would leave a message that reaches its limit stuck and unseen; it is counted here.
                    max_deliver=-1,
                ),
            )
        self.known.add(queue)

    async def _adjust(self, queue: str, wanted: api.StreamConfig) -> None:
        found = (await self._connection.js.stream_info(wanted.name)).config
        if found.subjects != wanted.subjects or found.retention != wanted.retention:
            message = (
                f"NATS has a stream {wanted.name} that isn't ours (its subjects are {found.subjects}): choose another "
                "stream_prefix in broker_transport_options."
            )
            raise StreamConflict(message)
        try:
            await self._connection.js.update_stream(wanted)
        except js_errors.APIError as error:
            message = (
                f"The stream of queue {queue} differs from broker_transport_options and can't be changed "
                f"({error.description}): set them as it is, or drain and delete it."
            )
            raise StreamConflict(message) from None

    async def exists(self, queue: str) -> bool:
        """Return whether the queue has a stream."""
        if queue in self.known:
            return True
        try:
            await self._connection.js.stream_info(self._connection.settings.stream(queue))
        except js_errors.NotFoundError:
            return False
        return True

    async def counts(self, queue: str) -> tuple[int, int]:
        """Return how many messages are ready, and how many workers hold."""
        stream, steps = self._connection.settings.stream(queue), self._connection.settings.priority_steps
        try:
            found = await asyncio.gather(*(self._connection.js.consumer_info(stream, f"step-{step}") for step in steps))
        except js_errors.NotFoundError:
            return 0, 0
        return sum(info.num_pending for info in found), sum(info.num_ack_pending for info in found)

    async def size(self, queue: str) -> int:
        """Return how many messages are ready; those that a worker holds don't count."""
        return (await self.counts(queue))[0]

    async def purge(self, queue: str) -> int:
        """Delete all messages, also those that a worker holds; return how many were ready."""
        ready = await self.size(queue)
        with contextlib.suppress(js_errors.NotFoundError):
            await self._connection.js.purge_stream(self._connection.settings.stream(queue))
        return ready

    async def delete(self, queue: str) -> None:
        """Delete the queue's stream."""
        self.known.discard(queue)
        with contextlib.suppress(js_errors.NotFoundError):
            await self._connection.js.delete_stream(self._connection.settings.stream(queue))
