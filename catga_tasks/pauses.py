"""Which queues are paused? Relays leave their messages where they are until somebody resumes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from catga_tasks.tables import seconds_since

if TYPE_CHECKING:
    from sqlalchemy import Connection


def pause(connection: Connection, broker: str, queue: str, who: str) -> bool:
    """Pause a queue; return False if it was paused before. Relays take it up within a second."""
    statement = text(
        "INSERT INTO catga_paused_queues (broker, queue, paused_by) VALUES (:broker, :queue, :who) "
        "ON CONFLICT (broker, queue) DO NOTHING"
    )
    return connection.execute(statement, {"broker": broker, "queue": queue, "who": who}).rowcount == 1


def resume(connection: Connection, broker: str, queue: str) -> bool:
    """Let a queue go on; return False if it wasn't paused."""
    statement = text("DELETE FROM catga_paused_queues WHERE broker = :broker AND queue = :queue")
    return connection.execute(statement, {"broker": broker, "queue": queue}).rowcount == 1


def paused(connection: Connection, broker: str) -> frozenset[str]:
    """Return the names of a broker's paused queues."""
    statement = text("SELECT queue FROM catga_paused_queues WHERE broker = :broker")
    return frozenset(connection.execute(statement, {"broker": broker}).scalars())


def all_paused(connection: Connection) -> list[dict[str, Any]]:
    """Return every paused queue: broker, queue, paused_by, and for how many seconds."""
    statement = text(
        f"SELECT broker, queue, paused_by, {seconds_since(connection, 'paused_at')} AS seconds "
        "FROM catga_paused_queues ORDER BY broker, queue"
    )
    found = connection.execute(statement).mappings()
    return [{**row, "seconds": round(max(0.0, float(row["seconds"])), 3)} for row in found]
