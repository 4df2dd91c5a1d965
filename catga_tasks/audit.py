"""Who changed what by hand, in the transaction of the change itself?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from catga_tasks.tables import epoch

if TYPE_CHECKING:
    from sqlalchemy import Connection


class Actor(NamedTuple):
    """Somebody who changes something: their name, and where they do it ("Flower, 10.0.0.7")."""

    who: str
    via: str


def record(connection: Connection, actor: Actor, action: str, rows: int, selection: dict[str, Any]) -> None:
    """Write down a change: its verb ("replay"), how many messages it was, and which ones."""
    statement = text(
        "INSERT INTO catga_audit (who, via, action, rows, selection) VALUES (:who, :via, :action, :rows, :selection)"
    )
    values = {"who": actor.who, "via": actor.via, "action": action, "rows": rows}
    connection.execute(statement, {**values, "selection": json.dumps(selection)})


def latest(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """Return the last changes, the latest first: at (seconds since 1970), who, via, action, rows, selection."""
    statement = text(
        f"SELECT {epoch(connection, 'at')} AS at, who, via, action, rows, selection FROM catga_audit "
        "ORDER BY id DESC LIMIT :limit"
    )
    found = connection.execute(statement, {"limit": limit}).mappings()
    return [{**row, "selection": json.loads(row["selection"])} for row in found]
