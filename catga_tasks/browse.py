"""What is in the outbox, a page at a time, and how fast does it move?

Every statement here is bounded, however many rows there are: it walks along an index and stops. What has to count
rows is `counts`, which the caller paces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from catga_tasks import inbox, liveness, outbox, pauses
from catga_tasks.selection import bound, conditions
from catga_tasks.tables import MESSAGE_COLUMNS, dialect, epoch, now, seconds_since

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection

    from catga_tasks.selection import Selection

STATES = ("pending", "scheduled", "waiting", "retrying", "dead")
#: Rows of a table that one page looks at: what a filter passes over counts, too.
SCAN = 10_000
_TOP = 2**62
_LISTED = "id, task, task_id, queue, broker, headers, history, attempts"
_STATEMENTS = {
    "pending": "attempts = 0 AND available_at <= {now}",
    "scheduled": "attempts = 0 AND available_at > {now} AND available_at < {never}",
    # For the message before them that has the same key.
    "waiting": "available_at = {never}",
    # An index has these rows alone.
    "retrying": "attempts > 0",
}


class Page(NamedTuple):
    """Messages, the newest first. `next` is where to go on, if there may be more: also after an empty page."""

    rows: list[dict[str, Any]]
    next: int | None


def page(
    connection: Connection,
    selection: Selection,
    *,
    state: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> Page:
    """Return up to `limit` messages in a state, or in any, whose ids are below `before`."""
    tables = {"dead": ["catga_dead_letters"], None: ["catga_outbox", "catga_dead_letters"]}.get(state, ["catga_outbox"])
    found: list[dict[str, Any]] = []
    floor = 0
    for table in tables:
        rows, end = _scan(connection, table, selection, state, before=before or _TOP, limit=limit + 1)
        found += rows
        floor = max(floor, end)
    # Below the floor one of the tables wasn't looked at.
    found = sorted((row for row in found if row["id"] >= floor), key=lambda row: -row["id"])
    if len(found) > limit:
        return Page(found[:limit], found[limit - 1]["id"])
    return Page(found, floor or None)


def page_statement(connection: Connection, table: str, selection: Selection, state: str | None) -> tuple[str, Any]:
    """Return the statement of a page of one table, and its values; a test asserts its plan."""
    clause, values = conditions(connection, table, selection)
    condition = _STATEMENTS.get(state or "", "").format(
        now=now(connection), never=outbox.NEVER_DUE[dialect(connection)]
    )
    # The index of failed messages is for the walk itself.
    walked = f" AND {condition}" if state == "retrying" else ""
    if condition and not walked:
        clause = f"{clause} AND {condition}" if clause else f" WHERE {condition}"
    return (
        f"SELECT {_LISTED}, {_moments(connection, table)} FROM "
        f"(SELECT * FROM {table} WHERE id < :before{walked} ORDER BY id DESC LIMIT :scan) AS walked"
        f"{clause} ORDER BY id DESC LIMIT :limit"
    ), values


def message(connection: Connection, number: int) -> dict[str, Any] | None:
    """Return one message whole, from the outbox or the dead letters; None if it is in neither."""
    names = ", ".join(name for name in MESSAGE_COLUMNS if name != "created_at")
    for table in ("catga_outbox", "catga_dead_letters"):
        statement = text(f"SELECT id, {names}, {_moments(connection, table)} FROM {table} WHERE id = :id")
        found = connection.execute(statement, {"id": number}).mappings().first()
        if found is not None:
            return {**found, "body": bytes(found["body"])}
    return None


def counts(connection: Connection) -> list[dict[str, Any]]:
    """Return how many messages are in each state, by broker and queue. It counts every row, along an index."""
    due = f"available_at <= {now(connection)}"
    waits = f"available_at = {outbox.NEVER_DUE[dialect(connection)]}"
    halves = f"count(*) FILTER (WHERE {due}), count(*) FILTER (WHERE NOT {due} AND NOT {waits})"
    waiting = f"count(*) FILTER (WHERE {waits})"
    parts = (
        f"SELECT broker, queue, {halves}, {waiting}, 0, 0, 0 FROM catga_outbox GROUP BY broker, queue",
        f"SELECT broker, queue, 0, 0, 0, {halves}, 0 FROM catga_outbox WHERE attempts > 0 GROUP BY broker, queue",
        "SELECT broker, queue, 0, 0, 0, 0, 0, count(*) FROM catga_dead_letters GROUP BY broker, queue",
    )
    found: dict[tuple[str, str], list[int]] = {}
    for broker, queue, *numbers in connection.execute(text(" UNION ALL ".join(parts))):
        sums = found.setdefault((broker, queue), [0] * len(numbers))
        found[broker, queue] = [total + number for total, number in zip(sums, numbers, strict=True)]
    return [
        {
            "broker": broker,
            "queue": queue,
            "pending": ready - retried,
            "scheduled": later - put_off,
            "waiting": held,
            "retrying": retried + put_off,
            "dead": dead,
        }
        for (broker, queue), (ready, later, held, retried, put_off, dead) in sorted(found.items())
    ]


def live(connection: Connection) -> dict[str, Any]:
    """Return what changes all the time and costs a few index probes.

    `at` is the database's clock, in seconds since 1970. `enqueued` counts rows since the table was made, those that
    were rolled back among them. A relay's `lag_seconds` is for how long the first of its messages has been due.
    """
    paused = pauses.all_paused(connection)
    oldest = outbox.oldest_age(connection)
    relays = liveness.alive(connection)
    for relay in relays:
        relay["lag_seconds"] = _lag(connection, relay, paused)
    return {
        "at": outbox.clock(connection),
        "enqueued": enqueued(connection),
        "published": liveness.published(connection),
        "oldest_age_seconds": None if oldest is None else round(oldest, 3),
        "relays": relays,
        "paused": paused,
        "inbox": inbox.duplicates(connection),
    }


def enqueued(connection: Connection) -> int:
    """Return how many ids the outbox has given to rows."""
    statement = (
        "SELECT coalesce(pg_sequence_last_value(CAST(pg_get_serial_sequence('catga_outbox', 'id') AS regclass)), 0)"
        if dialect(connection) == "postgresql"
        else "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'catga_outbox'"
    )
    return int(connection.execute(text(statement)).scalar_one())


def _scan(
    connection: Connection, table: str, selection: Selection, state: str | None, *, before: int, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """Return matching rows, and the id down to which the table was looked at: 0 if that is its end."""
    statement, values = page_statement(connection, table, selection, state)
    values |= {"before": before, "scan": SCAN, "limit": limit}
    rows = [dict(row) for row in connection.execute(bound(statement, selection), values).mappings()]
    if len(rows) == limit:
        return rows, int(rows[-1]["id"])
    walked = " AND attempts > 0" if state == "retrying" else ""
    ids = f"SELECT id FROM {table} WHERE id < :before{walked} ORDER BY id DESC LIMIT :scan"
    reach = text(f"SELECT count(*), min(id) FROM ({ids}) AS walked")
    seen, lowest = connection.execute(reach, {"before": before, "scan": SCAN}).one()
    return rows, int(lowest) if seen == SCAN else 0


def _moments(connection: Connection, table: str) -> str:
    """Return the columns that say which state a row is in and since when, in seconds since 1970."""
    created = f"{epoch(connection, 'created_at')} AS created_at"
    if table == "catga_dead_letters":
        died = epoch(connection, "died_at")
        return f"{created}, 'dead' AS state, {died} AS died_at, error, NULL AS available_at, NULL AS due_in_seconds"
    state = (
        f"CASE WHEN available_at = {outbox.NEVER_DUE[dialect(connection)]} THEN 'waiting' "
        "WHEN attempts > 0 THEN 'retrying' "
        f"WHEN available_at > {now(connection)} THEN 'scheduled' ELSE 'pending' END AS state"
    )
    due = f"-({seconds_since(connection, 'available_at')}) AS due_in_seconds"
    available = f"{epoch(connection, 'available_at')} AS available_at"
    return f"{created}, {state}, NULL AS died_at, NULL AS error, {available}, {due}"


def _lag(connection: Connection, relay: dict[str, Any], paused: Iterable[dict[str, Any]]) -> float:
    broker = relay["broker"]
    closed = {each["queue"] for each in paused if each["broker"] == broker}
    names: Iterable[str | None] = relay["queues"] or (outbox.queues(connection, broker) if closed else [None])
    ages = (outbox.overdue(connection, broker=broker, queue=name) for name in names if name not in closed)
    return round(max((age for age in ages if age is not None), default=0.0), 3)
