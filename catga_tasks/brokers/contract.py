"""What does the relay ask of a broker?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from catga_tasks.envelope import Row


@dataclass(slots=True)
class Receipt:
    """What the broker said of a batch. Rows in neither list are still to be sent, without blame."""

    confirmed: list[Row] = field(default_factory=list)
    rejected: list[tuple[Row, str]] = field(default_factory=list)
    #: Why the rest was not sent: the broker doesn't answer, or refuses everything.
    outage: str | None = None


class Publisher(Protocol):
    """One broker. Calls take a bounded time, and an error never leaves a connection in use behind."""

    def publish(self, rows: Sequence[Row]) -> Receipt:
        """Send the rows in their order and wait for the broker's confirmation of each."""
        ...

    def probe(self, queues: Sequence[str]) -> None:
        """Raise `BrokerUnavailable` unless a message to each of these queues could go through; leave none behind."""
        ...

    def close(self) -> None:
        """Close the connection; the next publish opens another."""
        ...
