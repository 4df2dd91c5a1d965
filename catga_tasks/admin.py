"""What does somebody who looks after the outbox see, and what can they change?

Counts, dead letters, replay, discard and purge. Each change is one transaction of the caller's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from catga_tasks import holds, inbox, liveness, outbox, pauses
from catga_tasks.keys import read_headers
from catga_tasks.selection import bound, conditions
from catga_tasks.tables import MESSAGE_COLUMNS, dialect, later, now, seconds_since

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from catga_tasks.selection import Selection


_KEYED = "(unique_key IS NOT NULL OR ordering_key IS NOT NULL)"


def status(connection: Connection) -> dict[str, Any]:
    """Return the counts as `outbox status --json` prints them.

    `pending` rows are due and untried, `scheduled` ones wait for their ETA, `waiting` ones for the message before them
    with the same key, `retrying` ones failed at least once: no row is counted twice. `oldest_age_seconds` is how long
    the longest due row has been due, or None.
    """
    due = f"available_at <= {now(connection)}"
    waits = f"available_at = {outbox.NEVER_DUE[dialect(connection)]}"
    names = "broker, queue, task"
    counts = text(
        f"SELECT {names}, "
        f"sum(CASE WHEN attempts = 0 AND {due} THEN 1 ELSE 0 END) AS pending, "
        f"sum(CASE WHEN attempts = 0 AND NOT {due} AND NOT {waits} THEN 1 ELSE 0 END) AS scheduled, "
        f"sum(CASE WHEN {waits} THEN 1 ELSE 0 END) AS waiting, "
        f"sum(CASE WHEN attempts > 0 THEN 1 ELSE 0 END) AS retrying, 0 AS dead FROM catga_outbox GROUP BY {names} "
        f"UNION ALL SELECT {names}, 0, 0, 0, 0, count(*) FROM catga_dead_letters GROUP BY {names}"
    )
    states = ("pending", "scheduled", "waiting", "retrying", "dead")
    by_task: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in connection.execute(counts).mappings():
        whose = {name: row[name] for name in ("broker", "queue", "task")}
        entry = by_task.setdefault(tuple(whose.values()), {**whose, **dict.fromkeys(states, 0)})
        for state in states:
            entry[state] += int(row[state])
    first = text(f"SELECT max({seconds_since(connection, 'available_at')}) FROM catga_outbox WHERE {due}")
    oldest = connection.execute(first).scalar()
    return {
        **{state: sum(entry[state] for entry in by_task.values()) for state in states},
        "published": liveness.published(connection),
        "oldest_age_seconds": None if oldest is None else round(max(0.0, float(oldest)), 3),
        "relays": liveness.alive(connection),
        "duplicates": inbox.duplicates(connection),
        "paused": pauses.all_paused(connection),
        "tasks": [by_task[key] for key in sorted(by_task)],
    }


def history(connection: Connection, task_id: str) -> list[dict[str, Any]]:
    """Return what is known of a task by its id: its attempts on workers, then where its messages wait.

    Each entry has where, task, attempt, state, at (the database's time) and error. Workers note the attempts of tasks
    that ask the inbox.
    """
    statement = text(
        "SELECT 'worker' AS where_, task, attempt + 1 AS attempt, state, CAST(received_at AS text) AS at, error, "
        "replaced AS place "
        "FROM catga_inbox WHERE task_id = :id "
        "UNION ALL SELECT 'outbox', task, attempts, CASE WHEN attempts > 0 THEN 'RETRYING' ELSE 'WAITING' END, "
        "CAST(available_at AS text), history, 1000000 FROM catga_outbox WHERE task_id = :id "
        "UNION ALL SELECT 'dead letters', task, attempts, 'DEAD', CAST(died_at AS text), error, 1000001 "
        "FROM catga_dead_letters WHERE task_id = :id ORDER BY place, attempt"
    )
    found = []
    for row in connection.execute(statement, {"id": task_id}):
        error = _last_error(row.error) if row.where_ == "outbox" else row.error
        names = {"where": row.where_, "task": row.task, "attempt": row.attempt, "state": row.state, "at": row.at}
        found.append({**names, "error": error})
    return found


def _last_error(attempts: str | None) -> str | None:
    entries = _decoded(attempts) if attempts else None
    return str(entries[-1]["error"]) if isinstance(entries, list) and entries else None


def count(connection: Connection, table: str, selection: Selection) -> int:
    """Return how many rows of `catga_outbox` or `catga_dead_letters` are selected."""
    where, parameters = conditions(connection, table, selection)
    return int(connection.execute(bound(f"SELECT count(*) FROM {table}{where}", selection), parameters).scalar_one())


def dead_letters(connection: Connection, selection: Selection, limit: int) -> list[dict[str, Any]]:
    """Return the dead letters, the latest first: id, task, task_id, broker, queue, attempts, died_at, error."""
    where, parameters = conditions(connection, "catga_dead_letters", selection)
    statement = bound(
        "SELECT id, task, task_id, broker, queue, attempts, CAST(died_at AS text) AS died_at, error "
        f"FROM catga_dead_letters{where} ORDER BY died_at DESC, id DESC LIMIT :limit",
        selection,
    )
    return [dict(row) for row in connection.execute(statement, {**parameters, "limit": limit}).mappings()]


def dead_letter(connection: Connection, number: int) -> dict[str, Any] | None:
    """Return one dead letter whole, its headers, properties and history decoded; the body as it is stored."""
    statement = text(
        f"SELECT id, {', '.join(name for name in MESSAGE_COLUMNS if name != 'created_at')}, "
        "CAST(created_at AS text) AS created_at, CAST(died_at AS text) AS died_at, error "
        "FROM catga_dead_letters WHERE id = :id"
    )
    found = connection.execute(statement, {"id": number}).mappings().first()
    if found is None:
        return None
    decoded = {name: _decoded(found[name]) for name in ("headers", "properties", "history")}
    return {**found, **decoded, "body": bytes(found["body"])}


def replay(connection: Connection, selection: Selection) -> int:
    """Put dead letters back into the outbox, due now and with no attempts used up; return how many.

    One with an ordering key lines up behind those that have it by now; one whose unique key is taken stays dead.
    """
    names = ", ".join(name for name in MESSAGE_COLUMNS if name != "attempts")
    where, parameters = conditions(connection, "catga_dead_letters", selection)
    where = _and(where, f"NOT {_KEYED}")
    insert = f"INSERT INTO catga_outbox ({names}) SELECT {names} FROM"
    if dialect(connection) == "postgresql":
        # One statement: two replays at once must not both see a row.
        moved = f"WITH gone AS (DELETE FROM catga_dead_letters{where} RETURNING {names}) {insert} gone"
        replayed = connection.execute(bound(moved, selection), parameters).rowcount
    else:
        # From the first write on SQLite keeps other replays out, also for the rows with keys.
        replayed = connection.execute(bound(f"{insert} catga_dead_letters{where}", selection), parameters).rowcount
        connection.execute(bound(f"DELETE FROM catga_dead_letters{where}", selection), parameters)
    return replayed + _replay_keyed(connection, selection)


def _replay_keyed(connection: Connection, selection: Selection) -> int:
    where, parameters = conditions(connection, "catga_dead_letters", selection)
    kind = dialect(connection)
    lock = " FOR UPDATE SKIP LOCKED" if kind == "postgresql" else ""
    found = connection.execute(
        bound(
            "SELECT id, task_id, unique_key, ordering_key, headers FROM catga_dead_letters"
            f"{_and(where, _KEYED)} ORDER BY id{lock}",
            selection,
        ),
        parameters,
    ).all()
    names = ", ".join(name for name in MESSAGE_COLUMNS if name != "attempts")
    moved = text(
        f"INSERT INTO catga_outbox ({names}, available_at) SELECT {names}, CASE WHEN :waits "
        f"THEN {outbox.NEVER_DUE[kind]} ELSE {later(connection, 'zero')} END FROM catga_dead_letters WHERE id = :id"
    )
    replayed = 0
    for row in found:
        if row.unique_key is not None:
            seconds = read_headers(_decoded(row.headers) or {}).seconds
            if holds.take(connection, row.unique_key, row.task_id, seconds) is not None:
                continue
        waits = row.ordering_key is not None and not holds.first(connection, row.ordering_key, row.task_id)
        connection.execute(moved, {"id": row.id, "waits": waits, "zero": 0})
        connection.execute(text("DELETE FROM catga_dead_letters WHERE id = :id"), {"id": row.id})
        replayed += 1
    return replayed


def discard(connection: Connection, selection: Selection) -> int:
    """Delete dead letters for good; return how many."""
    where, parameters = conditions(connection, "catga_dead_letters", selection)
    return connection.execute(bound(f"DELETE FROM catga_dead_letters{where}", selection), parameters).rowcount


def purge(connection: Connection, selection: Selection) -> int:
    """Delete messages that wait in the outbox, unsent; return how many. A relay's batch in hand isn't touched.

    What they hold is free: a unique key, and the turn among the messages of an ordering key.
    """
    where, parameters = conditions(connection, "catga_outbox", selection)
    keyed = _purge_keyed(connection, selection)
    where = _and(where, f"NOT {_KEYED}")
    if dialect(connection) == "postgresql":
        where = f" WHERE id IN (SELECT id FROM catga_outbox{where} FOR UPDATE SKIP LOCKED)"
    return keyed + connection.execute(bound(f"DELETE FROM catga_outbox{where}", selection), parameters).rowcount


def _purge_keyed(connection: Connection, selection: Selection) -> int:
    where, parameters = conditions(connection, "catga_outbox", selection)
    where = _and(where, _KEYED)
    used = f"SELECT DISTINCT ordering_key FROM catga_outbox{_and(where, 'ordering_key IS NOT NULL')}"
    # Before the rows: who ends a turn locks the key first, and the next row after it.
    holds.lock(connection, connection.execute(bound(used, selection), parameters).scalars().all())
    if dialect(connection) == "postgresql":
        where = f" WHERE id IN (SELECT id FROM catga_outbox{where} FOR UPDATE SKIP LOCKED)"
    statement = f"DELETE FROM catga_outbox{where} RETURNING task_id, unique_key, ordering_key"
    gone = connection.execute(bound(statement, selection), parameters).all()
    for row in gone:
        holds.let_go(connection, row.task_id, unique_key=row.unique_key, ordering_key=row.ordering_key)
    return len(gone)


def _and(where: str, condition: str) -> str:
    return f"{where} AND {condition}" if where else f" WHERE {condition}"


def _decoded(value: str | None) -> Any:
    """Decode JSON, or return the text that should have been some: a dead letter may be garbage."""
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value
