"""How does kombu's `Producer.batch` publish to NATS? Without waiting in between; each message is confirmed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu import exceptions

if TYPE_CHECKING:
    from catga_tasks.brokers.nats_channel import Channel


#: kombu 5.6 has no batches, and no error for them.
BatchPublishError = getattr(exceptions, "BatchPublishError", exceptions.KombuError)


class PublishBatch:
    """Messages of one producer that are published together, by `flush` or when there are `max_size` of them."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
        self.max_size = max_size
        self._entries: list[tuple[str, int, bytes, str]] = []
        self._broadcasts: list[tuple[str, bytes]] = []
        self._unusable: str | None = None

    def publish(self, message: dict[str, Any], **options: Any) -> None:
        """Keep a message that kombu has prepared."""
        self._check()
        entries, broadcasts = self.channel.routes(message, options["exchange"], options["routing_key"])
        self._entries += entries
        self._broadcasts += broadcasts
        if len(self._entries) + len(self._broadcasts) >= self.max_size:
            self.flush()

    def flush(self) -> None:
        """Publish what is kept and wait for all confirmations.

        Raises `BatchPublishError` if some are missing: those messages may or may not be there, the others are.
        """
        self._check()
        entries, self._entries = self._entries, []
        broadcasts, self._broadcasts = self._broadcasts, []
        try:
            problems = [each for each in self.channel.send(entries) if each is not None] if entries else []
            for subject, body in broadcasts:
                self.channel.broadcast(subject, body)
        except Exception as error:
            self._unusable = "a flush failed"
            message = f"NATS didn't confirm the batch; delivery is uncertain: {error}"
            raise BatchPublishError(message) from error
        if problems:
            self._unusable = "a flush failed"
            message = f"NATS didn't confirm {len(problems)} of {len(entries)} messages of the batch: {problems[0]}"
            raise BatchPublishError(message) from problems[0]

    def discard(self) -> None:
        """Forget what wasn't flushed."""
        self._entries, self._broadcasts, self._unusable = [], [], "it was aborted"

    def close(self) -> None:
        """End the batch."""
        self._unusable = self._unusable or "it is closed"

    def _check(self) -> None:
        if self._unusable:
            message = f"This publish batch can't be used any more: {self._unusable}."
            raise BatchPublishError(message)
