"""Which relays are alive, what have they in hand, and which one may work?

Statements on the relays' heartbeats, the journal of batches in flight, and SQLite's lease.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import text

from catga_tasks.tables import dialect, later, now, seconds_since
from catga_tasks.tallies import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

#: A relay whose last heartbeat is older than this many seconds is taken for dead.
ALIVE_SECONDS = 30.0
#: Heartbeats older than this are folded into the row "retired".
RETIRE_SECONDS = 86400.0
RETIRED = "retired"


def journal_open(connection: Connection, relay: str, ids: Sequence[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """Write down which rows are about to be published; return the entry's id and the entries of other batches.

    On PostgreSQL the entry survives the relay, not the server: its commit doesn't wait for the disk, for a server that
    dies takes no relay with it. That is set for this commit only: a pooler hands the session to others.
    """
    parameters = {"relay": relay, "ids": json.dumps(list(ids)), "zero": 0}
    started = later(connection, "zero")
    values = f"INSERT INTO catga_outbox_journal (relay, row_ids, started_at) VALUES (:relay, :ids, {started})"
    if dialect(connection) == "postgresql":
        statement = (
            f"WITH mine AS ({values} RETURNING id) "
            "SELECT id, NULL AS row_ids, set_config('synchronous_commit', 'off', true) FROM mine "
            "UNION ALL SELECT id, row_ids, NULL FROM catga_outbox_journal"
        )
        found = connection.execute(text(statement), parameters).all()
        mine = next(entry for entry, row_ids, _ in found if row_ids is None)
        return mine, [(entry, json.loads(row_ids)) for entry, row_ids, _ in found if row_ids is not None]
    others = journal(connection)
    mine = connection.execute(text(values + " RETURNING id"), parameters).scalar_one()
    return mine, others


def journal_close(connection: Connection, entry: int) -> None:
    """Strike the entry: its batch is settled, or its rows are marked."""
    connection.execute(text("DELETE FROM catga_outbox_journal WHERE id = :id"), {"id": entry})


def journal_strike(connection: Connection, entries: Sequence[int], ids: set[int]) -> None:
    """Strike these rows from the entries, and the entries that have none left."""
    lock = " FOR UPDATE" if dialect(connection) == "postgresql" else ""
    select = text(f"SELECT row_ids FROM catga_outbox_journal WHERE id = :id{lock}")
    for entry in entries:
        found = connection.execute(select, {"id": entry}).scalar()
        left = [number for number in json.loads(found or "[]") if number not in ids]
        if left:
            update = text("UPDATE catga_outbox_journal SET row_ids = :ids WHERE id = :id")
            connection.execute(update, {"ids": json.dumps(left), "id": entry})
        else:
            journal_close(connection, entry)


def journal_forget(connection: Connection, relay: str) -> None:
    """Strike every entry of a relay that lives and knows that its rows aren't to blame."""
    connection.execute(text("DELETE FROM catga_outbox_journal WHERE relay = :relay"), {"relay": relay})


def journal(connection: Connection) -> list[tuple[int, list[int]]]:
    """Return all entries: id and row ids."""
    found = connection.execute(text("SELECT id, row_ids FROM catga_outbox_journal ORDER BY id"))
    return [(entry, json.loads(row_ids)) for entry, row_ids in found]


def heartbeat(
    connection: Connection,
    relay: str,
    *,
    hostname: str,
    pid: int,
    broker: str,
    queues: Sequence[str],
    published: int,
    tally: Tally,
) -> None:
    """Say that this relay lives, and what it has published and counted so far."""
    moment = later(connection, "zero")
    statement = text(
        "INSERT INTO catga_relays (id, hostname, pid, broker, queues, started_at, heartbeat_at, published, tally) "
        f"VALUES (:id, :hostname, :pid, :broker, :queues, {moment}, {moment}, :published, :tally) "
        f"ON CONFLICT (id) DO UPDATE SET heartbeat_at = {moment}, published = excluded.published, "
        "tally = excluded.tally"
    )
    values = {"id": relay, "hostname": hostname, "pid": pid, "broker": broker, "queues": ",".join(queues) or None}
    connection.execute(statement, {**values, "published": published, "tally": tally.dump(), "zero": 0})


def retire(connection: Connection, relay: str | None = None) -> None:
    """Fold a relay that ends, or all that are long silent, into the row "retired": what they counted stays."""
    gone = "id = :relay" if relay else f"id <> :retired AND heartbeat_at < {later(connection, 'ago')}"
    parameters = {"relay": relay} if relay else {"retired": RETIRED, "ago": -RETIRE_SECONDS}
    # Deleted first: of two relays that see a silent one, one gets it.
    delete = text(f"DELETE FROM catga_relays WHERE {gone} RETURNING published, tally")
    ended = connection.execute(delete, parameters).all()
    if not ended:
        return
    moment = now(connection)
    connection.execute(
        text(
            "INSERT INTO catga_relays (id, hostname, pid, started_at, heartbeat_at, published) "
            f"VALUES (:retired, '', 0, {moment}, {moment}, :published) "
            "ON CONFLICT (id) DO UPDATE SET published = catga_relays.published + excluded.published"
        ),
        {"retired": RETIRED, "published": sum(row.published for row in ended)},
    )
    # That has locked the row.
    whole = text("SELECT tally FROM catga_relays WHERE id = :retired")
    tally = Tally.load(connection.execute(whole, {"retired": RETIRED}).scalar_one())
    for row in ended:
        tally.merge(Tally.load(row.tally))
    update = text("UPDATE catga_relays SET tally = :tally WHERE id = :retired")
    connection.execute(update, {"retired": RETIRED, "tally": tally.dump()})


def take_lease(connection: Connection, owner: str, broker: str, seconds: float) -> bool:
    """Take or renew SQLite's lease of a broker's rows; return whether it is ours.

    The write lock is held until the commit.
    """
    connection.execute(
        text(
            "INSERT INTO catga_outbox_lease (name, owner, expires_at) "
            f"VALUES (:name, :owner, {later(connection, 'for')}) "
            "ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at "
            f"WHERE catga_outbox_lease.owner = excluded.owner OR catga_outbox_lease.expires_at < {now(connection)}"
        ),
        {"name": _lease(broker), "owner": owner, "for": seconds},
    )
    select = text("SELECT owner FROM catga_outbox_lease WHERE name = :name")
    holder = connection.execute(select, {"name": _lease(broker)}).scalar_one()
    return bool(holder == owner)


def hold_lease(connection: Connection, owner: str, broker: str) -> bool:
    """Return whether the lease is still ours; the write lock is held from here to the commit."""
    held = connection.execute(
        text(
            "UPDATE catga_outbox_lease SET owner = owner WHERE name = :name AND owner = :owner "
            f"AND expires_at >= {now(connection)}"
        ),
        {"name": _lease(broker), "owner": owner},
    )
    return held.rowcount == 1


def release_lease(connection: Connection, owner: str) -> None:
    """Give the lease back, so that the next relay need not wait for its end."""
    connection.execute(text("DELETE FROM catga_outbox_lease WHERE owner = :owner"), {"owner": owner})


def _lease(broker: str) -> str:
    return f"relay {broker}".rstrip()


def alive(connection: Connection) -> list[dict[str, object]]:
    """Return the relays whose heartbeat is recent: id, hostname, pid, broker, queues, seconds since it, published."""
    since = seconds_since(connection, "heartbeat_at")
    statement = text(
        f"SELECT id, hostname, pid, broker, queues, {since} AS silent, published FROM catga_relays "
        f"WHERE id <> :retired AND {since} < :alive ORDER BY id"
    )
    found = connection.execute(statement, {"retired": RETIRED, "alive": ALIVE_SECONDS})
    return [
        {
            "id": row.id,
            "hostname": row.hostname,
            "pid": row.pid,
            "broker": row.broker,
            "queues": row.queues.split(",") if row.queues else [],
            "heartbeat_age_seconds": round(float(row.silent), 3),
            "published": row.published,
        }
        for row in found
    ]


def published(connection: Connection) -> int:
    """Return how many messages relays have published since the tables were made."""
    return int(connection.execute(text("SELECT coalesce(sum(published), 0) FROM catga_relays")).scalar_one())


def tally(connection: Connection) -> Tally:
    """Return what relays have counted since the tables were made."""
    found = Tally()
    for content in connection.execute(text("SELECT tally FROM catga_relays")).scalars():
        found.merge(Tally.load(content))
    return found
