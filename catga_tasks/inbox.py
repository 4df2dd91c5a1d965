"""What does the inbox say to its database? One function a statement.

A delivery's row is written in the task's own transaction. Who finds it there has a duplicate in hand; who finds another
transaction writing it waits for that one's end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from catga_tasks.tables import dialect, later, now

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: The state of a delivery that runs under a lease.
STARTED = "STARTED"

_KEY = "task_id = :task_id AND attempt = :attempt AND replaced = :replaced"
_ENTER = text(
    "INSERT INTO catga_inbox (task_id, attempt, replaced, task, state, error) "
    "VALUES (:task_id, :attempt, :replaced, :task, :state, :error) ON CONFLICT DO NOTHING"
)
_SEEN = text(f"SELECT state, content_type, content_encoding, result, error FROM catga_inbox WHERE {_KEY}")
_KEEP = text(
    "UPDATE catga_inbox SET content_type = :content_type, content_encoding = :content_encoding, result = :result "
    f"WHERE {_KEY}"
)
_COUNT = text(
    "INSERT INTO catga_inbox_counts (task, suppressed, too_old) VALUES (:task, :suppressed, :too_old) "
    "ON CONFLICT (task) DO UPDATE SET suppressed = catga_inbox_counts.suppressed + excluded.suppressed, "
    "too_old = catga_inbox_counts.too_old + excluded.too_old"
)


class Key(NamedTuple):
    """Which delivery: what is equal in a message and its duplicates, and differs in all others."""

    task_id: str
    #: Retries so far: a retry keeps its task's id.
    attempt: int = 0
    #: Replacements so far (`self.replace`): so does a replacement.
    replaced: int = 0


class Content(NamedTuple):
    """A serialized result, as kombu's `dumps` returns it."""

    content_type: str
    content_encoding: str
    result: bytes


class Seen(NamedTuple):
    """What became of a delivery that came before."""

    state: str
    content: Content | None
    error: str | None


def enter(connection: Connection, key: Key, task: str, *, state: str, error: str | None = None) -> Seen | None:
    """Write the delivery down, to be seen when the transaction commits; return what is known of it if it came before.

    Waits for a concurrent duplicate's transaction to end.
    """
    parameters = {**key._asdict(), "task": task, "state": state, "error": error}
    while not connection.execute(_ENTER, parameters).rowcount:
        found = seen(connection, key)
        if found is not None:
            return found
        # It was purged in between.
    return None


def seen(connection: Connection, key: Key) -> Seen | None:
    """Return what is known of a delivery."""
    row = connection.execute(_SEEN, key._asdict()).one_or_none()
    if row is None:
        return None
    content = None if row.result is None else Content(row.content_type, row.content_encoding, bytes(row.result))
    return Seen(row.state, content, row.error)


def keep(connection: Connection, key: Key, content: Content) -> None:
    """Keep the result for duplicates."""
    connection.execute(_KEEP, {**key._asdict(), **content._asdict()})


def replaced(connection: Connection, key: Key) -> None:
    """Note that another task has taken this one's place (`self.replace`): it is over, and has no result."""
    connection.execute(text(f"UPDATE catga_inbox SET state = 'REPLACED' WHERE {_KEY}"), key._asdict())


def count(connection: Connection, task: str, *, suppressed: int = 0, too_old: int = 0) -> None:
    """Count duplicates that were suppressed, and messages that came after the retention of what they may repeat."""
    connection.execute(_COUNT, {"task": task, "suppressed": suppressed, "too_old": too_old})


def take_lease(connection: Connection, key: Key, task: str, *, owner: str, seconds: float) -> bool:
    """Begin a delivery for so many seconds unless somebody else has, or has ended it; return whether it is ours."""
    until, moment = later(connection, "for"), now(connection)
    statement = text(
        "INSERT INTO catga_inbox (task_id, attempt, replaced, task, state, owner, lease_until) "
        f"VALUES (:task_id, :attempt, :replaced, :task, '{STARTED}', :owner, {until}) "
        "ON CONFLICT (task_id, attempt, replaced) DO UPDATE SET owner = excluded.owner, "
        f"lease_until = excluded.lease_until WHERE catga_inbox.state = '{STARTED}' "
        f"AND catga_inbox.lease_until < {moment}"
    )
    taken = connection.execute(statement, {**key._asdict(), "task": task, "owner": owner, "for": seconds})
    return taken.rowcount == 1


def renew_lease(connection: Connection, key: Key, *, owner: str, seconds: float) -> bool:
    """Lead the lease on; return whether it is still ours."""
    statement = text(f"UPDATE catga_inbox SET lease_until = {later(connection, 'for')} WHERE {_KEY} AND owner = :owner")
    return connection.execute(statement, {**key._asdict(), "owner": owner, "for": seconds}).rowcount == 1


def lease_left(connection: Connection, key: Key) -> float:
    """Return for how many seconds the lease still holds; 0 if it doesn't."""
    left = (
        f"CAST(extract(epoch FROM lease_until - {now(connection)}) AS float8)"
        if dialect(connection) == "postgresql"
        else "(julianday(lease_until) - julianday('now')) * 86400.0"
    )
    found = connection.execute(text(f"SELECT {left} FROM catga_inbox WHERE {_KEY}"), key._asdict()).scalar()
    return max(0.0, float(found or 0.0))


def end_lease(
    connection: Connection,
    key: Key,
    *,
    state: str,
    owner: str | None = None,
    content: Content | None = None,
    error: str | None = None,
) -> bool:
    """Write down how the delivery ended; return whether it was still the owner's, or anybody's without one."""
    whose = f"state = '{STARTED}'" if owner is None else "owner = :owner"
    statement = text(
        "UPDATE catga_inbox SET state = :state, content_type = :content_type, content_encoding = :content_encoding, "
        f"result = :result, error = :error, owner = NULL, lease_until = NULL WHERE {_KEY} AND {whose}"
    )
    values = content._asdict() if content else dict.fromkeys(Content._fields)
    parameters = {**key._asdict(), **values, "state": state, "error": error, **({"owner": owner} if owner else {})}
    return connection.execute(statement, parameters).rowcount == 1


def free(connection: Connection, key: Key, *, owner: str) -> None:
    """Give a lease back: the message will come again."""
    statement = text(f"DELETE FROM catga_inbox WHERE {_KEY} AND owner = :owner")
    connection.execute(statement, {**key._asdict(), "owner": owner})


def expire(connection: Connection, retention: float, limit: int) -> int:
    """Delete at most `limit` rows, the oldest of those over `retention` seconds, no running ones; return how many."""
    statement = text(
        "DELETE FROM catga_inbox WHERE (task_id, attempt, replaced) IN ("
        "SELECT task_id, attempt, replaced FROM catga_inbox "
        f"WHERE received_at < {later(connection, 'ago')} AND (lease_until IS NULL OR lease_until < {now(connection)}) "
        "ORDER BY received_at LIMIT :limit)"
    )
    return connection.execute(statement, {"ago": -retention, "limit": limit}).rowcount


def duplicates(connection: Connection) -> list[dict[str, Any]]:
    """Return what the inbox met, by task: duplicates `suppressed`, and messages `too_old` to tell."""
    statement = text("SELECT task, suppressed, too_old FROM catga_inbox_counts ORDER BY task")
    return [dict(row) for row in connection.execute(statement).mappings()]
