"""What is written with a message, in the same transaction? Everything that must commit or roll back with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from catga_tasks import outbox
from catga_tasks.envelope import Envelope

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: A statement that commits with the caller's transaction: a saved group, a chord's size.
Write = Callable[["Connection"], None]
#: What may be enqueued.
Entry = Envelope | Write


def store(connection: Connection, entries: Sequence[Entry]) -> None:
    """Write the messages, and what goes with them."""
    envelopes = [entry for entry in entries if isinstance(entry, Envelope)]
    if envelopes:
        outbox.add(connection, envelopes)
    if len(envelopes) < len(entries):
        for entry in entries:
            if not isinstance(entry, Envelope):
                entry(connection)
