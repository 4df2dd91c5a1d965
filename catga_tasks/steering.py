"""What can somebody change by hand? Each change, and the record of who made it, are one transaction of the caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catga_tasks import admin, audit, pauses

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from catga_tasks.audit import Actor
    from catga_tasks.selection import Selection


def replay(connection: Connection, selection: Selection, actor: Actor) -> int:
    """Put dead letters back into the outbox; return how many. Wake the relays after the commit."""
    done = admin.replay(connection, selection)
    audit.record(connection, actor, "replay", done, selection.as_dict())
    return done


def discard(connection: Connection, selection: Selection, actor: Actor) -> int:
    """Delete dead letters for good; return how many."""
    done = admin.discard(connection, selection)
    audit.record(connection, actor, "discard", done, selection.as_dict())
    return done


def purge(connection: Connection, selection: Selection, actor: Actor) -> int:
    """Delete messages that wait, unsent; return how many."""
    done = admin.purge(connection, selection)
    audit.record(connection, actor, "purge", done, selection.as_dict())
    return done


def pause(connection: Connection, broker: str, queue: str, actor: Actor) -> bool:
    """Pause a queue; return False if it was paused before."""
    done = pauses.pause(connection, broker, queue, actor.who)
    if done:
        audit.record(connection, actor, "pause", 0, _queue(broker, queue))
    return done


def resume(connection: Connection, broker: str, queue: str, actor: Actor) -> bool:
    """Let a queue go on; return False if it wasn't paused. Wake the relays after the commit."""
    done = pauses.resume(connection, broker, queue)
    if done:
        audit.record(connection, actor, "resume", 0, _queue(broker, queue))
    return done


def _queue(broker: str, queue: str) -> dict[str, str]:
    return {"queue": queue, **({"broker": broker} if broker else {})}
