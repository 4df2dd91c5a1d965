"""How is a stored queue made, changed, counted and deleted? It is a stream, with a durable consumer a priority."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ChannelError
from nats.js import api
from nats.js import errors as js_errors

from catga_tasks.brokers.nats_errors import Full, StreamConflict, translated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from catga_tasks.brokers.jetstream import Connection

#: Requests for messages that may wait on one consumer. It can't be changed later.
MAX_WAITING = 4096
#: A stream's note of how long its queue may be unused, in milliseconds.
EXPIRES = "catga-expires"
#: Expired queues are looked for no more often than this, in seconds.
SWEEP_SECONDS = 60.0
#: The room that a message needs, in bytes: a full stream has a little left, not none.
PROBE_BYTES = 8192
#: The queue whose stream a probe writes to.
PROBE = "catga-probe"
#: The server's code for a stream of that name with another configuration.
STREAM_EXISTS = 10058


class Streams:
    """The streams that a connection knows. Coroutines are for the loop thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        #: Queues whose stream is there, and as the settings want it.
        self.known: set[str] = set()
        #: Those that expire: who publishes to one that is gone doesn't make it again.
        self.expiring: set[str] = set()
        self._sweep_due = 0.0

    async def ensure(self, queue: str, arguments: Mapping[str, Any] | None = None, *, durable: bool = True) -> None:
        """Make the queue's stream and its consumers, or bring them to the settings.

        `arguments` are the queue's own, by AMQP's names: x-message-ttl and x-expires in milliseconds, x-max-length, and
        x-max-length-bytes.
        """
        if queue in self.known:
            return
        settings, arguments = self._connection.settings, arguments or {}
        expires = arguments.get("x-expires")
        ages = [settings.max_age, *(limit / 1000 for limit in (arguments.get("x-message-ttl"), expires) if limit)]
        max_age = min((age for age in ages if age), default=None)
        if expires:
            self.expiring.add(queue)
            await self.sweep()
        wanted = api.StreamConfig(
            name=settings.stream(queue),
            subjects=[settings.subject(queue)],
            retention=api.RetentionPolicy(settings.retention),
            storage=api.StorageType(settings.storage if durable else "memory"),
            num_replicas=settings.replicas,
            discard=api.DiscardPolicy(settings.discard),
            duplicate_window=min(settings.duplicate_window, max_age or settings.duplicate_window),
            max_age=max_age or 0,
            max_msgs=arguments.get("x-max-length") or settings.max_msgs or -1,
            max_bytes=arguments.get("x-max-length-bytes") or settings.max_bytes or -1,
            metadata={EXPIRES: str(expires)} if expires else None,
            max_msg_size=settings.max_msg_size or -1,
            compression=api.StoreCompression.S2 if settings.compression else api.StoreCompression.NONE,
        )
        try:
            await self._connection.js.add_stream(wanted)
        except js_errors.APIError as error:
            if error.err_code == STREAM_EXISTS:
                await self._adjust(queue, wanted)
            elif not isinstance(translated(error), ChannelError):
                raise
            else:
                message = (
                    f"NATS makes no stream {wanted.name} as broker_transport_options want it: {error.description}."
                )
                raise StreamConflict(message) from None
        for step in settings.priority_steps:
            await self._ensure_consumer(queue, step)
        self.known.add(queue)

    async def _ensure_consumer(self, queue: str, step: int) -> None:
        settings = self._connection.settings
        wanted = api.ConsumerConfig(
            durable_name=f"step-{step}",
            filter_subject=settings.subject(queue, step),
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=settings.ack_wait,
            max_ack_pending=settings.max_ack_pending,
            max_waiting=MAX_WAITING,
            # The server would leave a message that reaches its limit stuck and unseen; it is counted here.
            max_deliver=-1,
        )
        try:
            await self._connection.js.add_consumer(settings.stream(queue), wanted)
        except js_errors.APIError as error:
            if not isinstance(translated(error), ChannelError):
                raise
            message = (
                f"The consumer step-{step} of the stream {settings.stream(queue)} isn't as we want it, and can't be "
                f"changed ({error.description}): delete it, and any that isn't ours."
            )
            raise StreamConflict(message) from None

    async def _adjust(self, queue: str, wanted: api.StreamConfig) -> None:
        found = (await self._connection.js.stream_info(wanted.name)).config
        if found.subjects != wanted.subjects:
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
            found = await self._connection.js.stream_info(self._connection.settings.stream(queue))
        except js_errors.NotFoundError:
            return False
        if EXPIRES in (found.config.metadata or {}):
            self.expiring.add(queue)
            self.known.add(queue)
        return True

    async def sweep(self) -> None:
        """Delete expired queues: JetStream keeps streams for ever, so who declares one of the kind looks after all."""
        if self._connection.loop.time() < self._sweep_due:
            return
        self._sweep_due = self._connection.loop.time() + SWEEP_SECONDS
        js, prefix = self._connection.js, f"{self._connection.settings.stream_prefix}-"
        found: list[api.StreamInfo] = []
        while page := await js.streams_info(len(found)):
            found += page
        for stream in found:
            name, expires = stream.config.name or "", (stream.config.metadata or {}).get(EXPIRES)
            if expires and name.startswith(prefix) and await self._unused(stream) > int(expires) / 1000:
                with contextlib.suppress(js_errors.NotFoundError):
                    await js.delete_stream(name)

    async def _unused(self, stream: api.StreamInfo) -> float:
        """Return for how many seconds nobody has published to a queue or waited for its messages."""
        consumers = await self._connection.js.consumers_info(stream.config.name)
        # A message goes by itself after the same time: one that is there is younger.
        if stream.state.messages or any(consumer.num_waiting for consumer in consumers):
            return 0.0
        moments = [stream.created, *(each.delivered.last_active for each in consumers if each.delivered)]
        known = [moment for moment in moments if moment is not None]
        return (dt.datetime.now(dt.UTC) - max(known)).total_seconds() if known else 0.0

    async def probe(self, queues: Sequence[str]) -> None:
        """Raise what a message to one of the queues would meet now.

        Each stream is asked for room; one that isn't there would be made. Whether anything is stored at all shows only
        in storing something, in a stream for that: a server's or an account's storage may be full.
        """
        for queue in queues:
            await self._ask_for_room(queue)
        js, settings = self._connection.js, self._connection.settings
        own = api.StreamConfig(
            name=settings.stream(PROBE),
            subjects=[settings.subject(PROBE)],
            storage=api.StorageType(settings.storage),
            num_replicas=settings.replicas,
            max_msgs=1,
            discard=api.DiscardPolicy.OLD,
        )
        try:
            await js.add_stream(own)
        except js_errors.APIError as error:
            if error.err_code != STREAM_EXISTS:
                raise
        await js.publish(settings.subject(PROBE, 0), bytes(PROBE_BYTES), settings.publish_timeout)
        await js.purge_stream(settings.stream(PROBE))

    async def _ask_for_room(self, queue: str) -> None:
        try:
            found = await self._connection.js.stream_info(self._connection.settings.stream(queue))
        except js_errors.NotFoundError:
            return
        limits, state = found.config, found.state
        if limits.discard == api.DiscardPolicy.NEW and (
            0 < (limits.max_msgs or 0) <= state.messages or 0 < (limits.max_bytes or 0) <= state.bytes + PROBE_BYTES
        ):
            message = f"NATS: the stream of queue {queue} is full."
            raise Full(message)

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
