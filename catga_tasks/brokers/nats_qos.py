"""What does it mean to acknowledge, reject and requeue a message of NATS?"""

from __future__ import annotations

import sys
from typing import Any

from kombu.transport import virtual

from catga_tasks.brokers import frames


class QoS(virtual.QoS):
    """Acknowledgements: the server keeps what isn't settled, so nothing is restored by publishing it again."""

    restore_at_shutdown = False

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge."""
        super().ack(delivery_tag)
        self.channel.settle(delivery_tag, b"+ACK")

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """End the message, or give it back."""
        super().ack(delivery_tag)
        if requeue:
            self.channel.settle(delivery_tag, b"-NAK")
        else:
            self.channel.bury(delivery_tag)

    def restore_unacked(self) -> list[Any]:
        """Give back everything that is held."""
        self._flush()
        for delivery_tag in list(self._delivered):
            self.reject(delivery_tag, requeue=True)
        self._flush()
        return []


class Message(frames.Message):
    """A delivered message. What couldn't be read can't be acknowledged: it is a dead letter.

    Celery's worker acknowledges it, which would be the end of it.
    """

    def _decode(self) -> Any:
        try:
            return super()._decode()
        except Exception:
            self.errors = [sys.exc_info()]
            raise

    def ack(self, multiple: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Acknowledge."""
        if self.errors:
            self.reject()
        else:
            super().ack(multiple)
