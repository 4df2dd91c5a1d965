"""What do results, saved groups and chords say to their database? One function a statement.

They stand in the outbox's database, so that they commit with a task's effects and with the messages of a canvas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import text

from catga_tasks.tables import UTCDateTime, dialect, later

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from sqlalchemy import Connection

#: Ids in one statement: well under the drivers' limits on parameters.
_AT_A_TIME = 1000
_CLOCK = {"postgresql": "clock_timestamp()", "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')"}


class Result(NamedTuple):
    """A task's state and result; what is of bytes is serialized as `result_serializer` says."""

    task_id: str
    status: str
    result: bytes | None
    traceback: str | None = None
    children: bytes | None = None
    #: From here on: `result_extended`.
    name: str | None = None
    args: bytes | None = None
    kwargs: bytes | None = None
    worker: str | None = None
    retries: int | None = None
    queue: str | None = None
    stamps: bytes | None = None


class Part(NamedTuple):
    """How one part of a chord's header ended."""

    group_id: str
    task_id: str
    #: Its place in the header.
    position: int | None
    result: bytes


_NAMES = ", ".join(Result._fields)
_RESULTS: sa.BindParameter[Any] = sa.bindparam("task_ids", expanding=True)
_GROUPS: sa.BindParameter[Any] = sa.bindparam("group_ids", expanding=True)


def store(connection: Connection, result: Result) -> None:
    """Write a task's state; a success stays as it is, whoever comes later with a repeated run."""
    # Stamps stay: a state without a request has none to say.
    changed = ", ".join(f"{name} = excluded.{name}" for name in Result._fields[1:-1])
    statement = text(
        f"INSERT INTO catga_results ({_NAMES}) VALUES ({', '.join(f':{name}' for name in Result._fields)}) "
        f"ON CONFLICT (task_id) DO UPDATE SET {changed}, stamps = coalesce(excluded.stamps, catga_results.stamps), "
        f"stored_at = {_CLOCK[dialect(connection)]} WHERE catga_results.status <> 'SUCCESS'"
    )
    connection.execute(statement, result._asdict())


def load(connection: Connection, task_ids: Iterable[str]) -> list[tuple[Result, datetime]]:
    """Return what is stored of these tasks, each with the moment when it was."""
    ids = list(task_ids)
    statement = text(f"SELECT {_NAMES}, stored_at FROM catga_results WHERE task_id IN :task_ids").bindparams(_RESULTS)
    statement = statement.columns(stored_at=UTCDateTime)  # type: ignore[assignment]
    found: list[tuple[Result, datetime]] = []
    for start in range(0, len(ids), _AT_A_TIME):
        rows = connection.execute(statement, {"task_ids": ids[start : start + _AT_A_TIME]})
        found += [(Result._make(row._mapping[name] for name in Result._fields), row.stored_at) for row in rows]
    return found


def forget(connection: Connection, task_id: str) -> None:
    """Delete a task's result."""
    connection.execute(text("DELETE FROM catga_results WHERE task_id = :task_id"), {"task_id": task_id})


def save_group(connection: Connection, group_id: str, result: bytes) -> None:
    """Keep a group's results, in place of what was kept under its id."""
    statement = text(
        "INSERT INTO catga_groups (group_id, result) VALUES (:group_id, :result) ON CONFLICT (group_id) DO UPDATE "
        f"SET result = excluded.result, stored_at = {_CLOCK[dialect(connection)]}"
    )
    connection.execute(statement, {"group_id": group_id, "result": result})


def load_group(connection: Connection, group_id: str) -> tuple[bytes, datetime] | None:
    """Return a saved group, and when it was saved."""
    statement = text("SELECT result, stored_at FROM catga_groups WHERE group_id = :group_id")
    row = connection.execute(statement.columns(stored_at=UTCDateTime), {"group_id": group_id}).one_or_none()
    return None if row is None else (row._mapping["result"], row.stored_at)


def delete_group(connection: Connection, group_id: str) -> None:
    """Delete a saved group."""
    connection.execute(text("DELETE FROM catga_groups WHERE group_id = :group_id"), {"group_id": group_id})


def open_chord(connection: Connection, group_id: str, size: int, header: bytes | None) -> bool:
    """Say how many parts a chord has; return whether all of them have returned already.

    That can be so only for parts that didn't come with this transaction: those of "at_most_once" go straight to the
    broker. `header` is the header's structure, where it isn't a plain list of tasks.
    """
    statement = text(
        "INSERT INTO catga_chords (group_id, size, header) VALUES (:group_id, :size, :header) "
        "ON CONFLICT (group_id) DO UPDATE SET size = excluded.size, header = excluded.header "
        "WHERE catga_chords.size IS NULL RETURNING returned"
    )
    parameters = {"group_id": group_id, "size": size, "header": header}
    return bool(connection.execute(statement, parameters).scalar_one_or_none() == size)


def return_part(connection: Connection, part: Part) -> tuple[bool, bytes | None]:
    """Count a part; return whether it was the last one, and the header's structure.

    The chord's row is locked until the transaction ends, so of concurrent parts exactly one is the last. A part that
    returns twice counts once; one that returns after the last is one too many, and never the last.
    """
    counted = connection.execute(
        text(
            "INSERT INTO catga_chord_parts (group_id, task_id, position, result) "
            "VALUES (:group_id, :task_id, :position, :result) ON CONFLICT DO NOTHING"
        ),
        part._asdict(),
    )
    if not counted.rowcount:
        return False, None
    statement = text(
        "INSERT INTO catga_chords (group_id, returned) VALUES (:group_id, 1) ON CONFLICT (group_id) DO UPDATE "
        f"SET returned = catga_chords.returned + 1, stored_at = {_CLOCK[dialect(connection)]} "
        "RETURNING size, returned, header"
    )
    chord = connection.execute(statement, {"group_id": part.group_id}).one()
    return chord.size == chord.returned, chord.header


def take_parts(connection: Connection, group_id: str) -> list[tuple[str, bytes]]:
    """Return the parts of a chord by their place in its header, each with its task's id, and delete them.

    The chord's own row stays: a part that comes once more finds that it was over.
    """
    found = connection.execute(
        text(
            "SELECT task_id, result FROM catga_chord_parts WHERE group_id = :group_id "
            "ORDER BY position IS NULL, position, task_id"
        ),
        {"group_id": group_id},
    ).all()
    connection.execute(text("DELETE FROM catga_chord_parts WHERE group_id = :group_id"), {"group_id": group_id})
    return [(row.task_id, row._mapping["result"]) for row in found]


def expire(connection: Connection, retention: float, limit: int) -> int:
    """Delete at most `limit` results, the oldest of those over `retention` seconds; return how many."""
    return _expire(connection, "catga_results", "task_id", retention, limit)


def expire_groups(connection: Connection, retention: float, limit: int) -> int:
    """Delete saved groups, as `expire` does results."""
    return _expire(connection, "catga_groups", "group_id", retention, limit)


def expire_chords(connection: Connection, retention: float, limit: int) -> int:
    """Delete chords that are over, as `expire` does results, and those whose header was never committed.

    A chord that waits for a part is kept until that returns, whenever it does: its body must run.
    """
    statement = text(
        f"SELECT group_id FROM catga_chords WHERE stored_at < {later(connection, 'ago')} "
        "AND (size IS NULL OR returned >= size) ORDER BY stored_at LIMIT :limit"
    )
    ids = connection.execute(statement, {"ago": -retention, "limit": limit}).scalars().all()
    for table in ("catga_chord_parts", "catga_chords"):
        if ids:
            deleted = text(f"DELETE FROM {table} WHERE group_id IN :group_ids").bindparams(_GROUPS)
            connection.execute(deleted, {"group_ids": list(ids)})
    return len(ids)


def _expire(connection: Connection, table: str, key: str, retention: float, limit: int) -> int:
    statement = text(
        f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} "
        f"WHERE stored_at < {later(connection, 'ago')} ORDER BY stored_at LIMIT :limit)"
    )
    parameters: dict[str, Any] = {"ago": -retention, "limit": limit}
    return connection.execute(statement, parameters).rowcount
