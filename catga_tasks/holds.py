"""Which message holds a unique key, and whose turn is it among the messages of an ordering key?

One function a statement. A row says who it is, by its task id. It is written in the caller's transaction, before
the messages, and stays locked until the commit: who wants the same key waits for that, so the order of the messages
is the order of the commits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from catga_tasks.tables import NEVER, dialect, later, now, seconds_since

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

    from catga_tasks.envelope import Claim, Envelope

_HOLDER = text("SELECT task_id FROM catga_unique_keys WHERE key = :key")
_LEAVE = text("DELETE FROM catga_unique_keys WHERE key = :key AND task_id = :task_id")
_FIRST = text("INSERT INTO catga_turns (key, task_id) VALUES (:key, :task_id) ON CONFLICT DO NOTHING")
_LINE_UP = text("UPDATE catga_turns SET key = key WHERE key = :key")
_RESUME = text(
    "INSERT INTO catga_turns (key, task_id) VALUES (:key, :task_id) "
    "ON CONFLICT (key) DO UPDATE SET key = excluded.key RETURNING task_id"
)
_WHOSE = text("SELECT task_id FROM catga_turns WHERE key = :key")
_MINE = text("UPDATE catga_turns SET key = key WHERE key = :key AND task_id = :task_id")
# A range, though no moment is later: by an equality PostgreSQL may walk along the ids of all other keys' messages.
_NEXT = text(
    "SELECT id, task_id FROM catga_outbox WHERE ordering_key = :key AND available_at >= :never "
    "ORDER BY available_at, id LIMIT 1"
)
_OVER = text("DELETE FROM catga_turns WHERE key = :key")


def admit(connection: Connection, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
    """Return the messages that may be sent: those whose unique key is free. It is taken; its waiters learn who has it.

    Waits for the end of a transaction that is about to take, or to free, the same key.
    """
    claiming: dict[str, tuple[Envelope, Claim]] = {}
    for envelope in envelopes:
        if envelope.claim is not None and envelope.unique_key is not None:
            claiming.setdefault(envelope.unique_key, (envelope, envelope.claim))
    if not claiming:
        return envelopes
    # In one order everywhere: two callers that take the same keys must not wait for each other.
    holders: dict[str, str | None] = {}
    for key, (envelope, claim) in ((key, claiming[key]) for key in sorted(claiming)):
        holders[key] = take(connection, key, envelope.task_id, claim.seconds)
    admitted = []
    for envelope in envelopes:
        own, name = envelope.claim, envelope.unique_key
        if own is None or name is None or (claiming[name][0] is envelope and holders[name] is None):
            admitted.append(envelope)
        else:
            own.refused(holders[name] or claiming[name][0].task_id)
    return admitted


def take(connection: Connection, key: str, task_id: str, seconds: float) -> str | None:
    """Take the unique key for this message, for so many seconds at most; return who has it if it isn't free."""
    until = later(connection, "seconds")
    statement = text(
        f"INSERT INTO catga_unique_keys (key, task_id, expires_at) VALUES (:key, :task_id, {until}) "
        "ON CONFLICT (key) DO UPDATE SET task_id = excluded.task_id, taken_at = excluded.taken_at, "
        f"expires_at = excluded.expires_at WHERE catga_unique_keys.expires_at <= {_clock(connection)}"
    )
    parameters = {"key": key, "task_id": task_id, "seconds": seconds}
    while not connection.execute(statement, parameters).rowcount:
        holder = connection.execute(_HOLDER, {"key": key}).scalar()
        if holder is not None:
            return str(holder)
        # It was freed in between.
    return None


def leave(connection: Connection, key: str, task_id: str) -> None:
    """Free the unique key if this message has it."""
    connection.execute(_LEAVE, {"key": key, "task_id": task_id})


def line_up(connection: Connection, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
    """Return the messages, those marked whose turn is yet to come; a key's first one has its turn.

    Waits for other transactions that line up for the same keys.
    """
    places: dict[str, list[int]] = {}
    for place, envelope in enumerate(envelopes):
        if envelope.ordering_key is not None:
            places.setdefault(envelope.ordering_key, []).append(place)
    if not places:
        return envelopes
    lined: list[Envelope] = list(envelopes)
    for key, mine in sorted(places.items()):
        for place in mine:
            envelope = lined[place]
            free = _resume(connection, key, envelope.task_id) if envelope.resumed else False
            if not envelope.resumed and place == mine[0]:
                free = first(connection, key, envelope.task_id)
            lined[place] = envelope._replace(waits=not free)
    return lined


def first(connection: Connection, key: str, task_id: str) -> bool:
    """Take the turn of an ordering key if it is nobody's; return whether it was. The key is locked either way."""
    while not connection.execute(_FIRST, {"key": key, "task_id": task_id}).rowcount:
        if connection.execute(_LINE_UP, {"key": key}).rowcount:
            return False
        # It was the last one's, and is over.
    return True


def _resume(connection: Connection, key: str, task_id: str) -> bool:
    """Return whether a message that goes on, as a retry does, still has its turn, or may have it now."""
    return str(connection.execute(_RESUME, {"key": key, "task_id": task_id}).scalar_one()) == task_id


def has_turn(connection: Connection, key: str, task_id: str) -> bool:
    """Return whether it is this message's turn."""
    return bool(connection.execute(_WHOSE, {"key": key}).scalar() == task_id)


def pass_on(connection: Connection, key: str, task_id: str) -> bool:
    """End this message's turn, if it is its; return whether another message is due by that."""
    if not connection.execute(_MINE, {"key": key, "task_id": task_id}).rowcount:
        return False
    following = connection.execute(_NEXT, {"key": key, "never": never(connection)}).one_or_none()
    if following is None:
        connection.execute(_OVER, {"key": key})
        return False
    moment, latest = later(connection, "zero"), "greatest" if dialect(connection) == "postgresql" else "max"
    connection.execute(
        text(
            f"UPDATE catga_outbox SET available_at = {latest}(coalesce(not_before, {moment}), {moment}), "
            "not_before = NULL WHERE id = :id"
        ),
        {"id": following.id, "zero": 0},
    )
    connection.execute(
        text(f"UPDATE catga_turns SET task_id = :task_id, since = {moment} WHERE key = :key"),
        {"key": key, "task_id": following.task_id, "zero": 0},
    )
    return True


def let_go(connection: Connection, task_id: str, *, unique_key: str | None, ordering_key: str | None) -> bool:
    """Free what a message holds that is over; return whether another one is due by that."""
    if unique_key is not None:
        leave(connection, unique_key, task_id)
    return ordering_key is not None and pass_on(connection, ordering_key, task_id)


def lock(connection: Connection, keys: Iterable[str]) -> None:
    """Keep others from lining up for these keys, and from passing their turns on, until the transaction ends."""
    for key in sorted(keys):
        connection.execute(_LINE_UP, {"key": key})


def expire(connection: Connection, retention: float, limit: int) -> int:
    """Delete at most `limit` unique keys whose time is over since `retention` seconds; return how many."""
    statement = text(
        "DELETE FROM catga_unique_keys WHERE key IN (SELECT key FROM catga_unique_keys "
        f"WHERE expires_at < {later(connection, 'ago')} ORDER BY expires_at LIMIT :limit) "
        f"AND expires_at < {later(connection, 'ago')}"
    )
    return connection.execute(statement, {"ago": -retention, "limit": limit}).rowcount


def turns(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """Return the ordering keys in use, the longest turns first: key, task_id, seconds, waiting."""
    statement = text(
        f"SELECT key, task_id, {seconds_since(connection, 'since')} AS seconds, (SELECT count(*) FROM catga_outbox "
        "WHERE ordering_key = catga_turns.key AND available_at = :never) AS waiting "
        "FROM catga_turns ORDER BY since LIMIT :limit"
    )
    found = connection.execute(statement, {"never": never(connection), "limit": limit}).mappings()
    return [{**row, "seconds": round(max(0.0, float(row["seconds"])), 3)} for row in found]


def skip(connection: Connection, key: str) -> bool | None:
    """End whosever turn it is; return whether another message is due by that, None if the key isn't in use."""
    holder = connection.execute(_WHOSE, {"key": key}).scalar()
    return None if holder is None else pass_on(connection, key, str(holder))


def _clock(connection: Connection) -> str:
    """Return the SQL of the moment at which the statement comes to a row: it may have waited for it."""
    return "clock_timestamp()" if dialect(connection) == "postgresql" else now(connection)


def never(connection: Connection) -> str:
    """Return the moment at which messages are due that wait for their turn."""
    return f"{NEVER}+00" if dialect(connection) == "postgresql" else NEVER
