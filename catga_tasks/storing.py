"""What is written with a message, in the same transaction? Everything that must commit or roll back with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from catga_tasks import holds, outbox, telemetry
from catga_tasks.envelope import Envelope

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: A statement that commits with the caller's transaction: a saved group, a chord's size.
Write = Callable[["Connection"], None]
#: What may be enqueued.
Entry = Envelope | Write


def store(connection: Connection, entries: Sequence[Entry]) -> None:
    """Write the messages, without those whose unique key is another's, and what goes with them."""
    envelopes = [entry for entry in entries if isinstance(entry, Envelope)]
    if envelopes:
        admitted = holds.admit(connection, envelopes)
        outbox.add(connection, holds.line_up(connection, admitted))
        telemetry.stored(envelopes, admitted)
    if len(envelopes) < len(entries):
        for entry in entries:
            if not isinstance(entry, Envelope):
                entry(connection)


def takes_keys(entries: Sequence[Entry]) -> bool:
    """Return whether writing them locks the keys of unique or ordered messages."""
    return any(isinstance(each, Envelope) and (each.unique_key or each.ordering_key) for each in entries)
