"""What is written with a message, in the same transaction? Everything that must commit or roll back with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catga_tasks import outbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from catga_tasks.envelope import Envelope


def store(connection: Connection, envelopes: Sequence[Envelope]) -> None:
    """Write the messages."""
    outbox.add(connection, envelopes)
