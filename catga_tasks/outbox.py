"""What does the outbox say to its database? One function a statement.

PostgreSQL and SQLite. Times that decide anything are computed by the database.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import text

from catga_tasks.database import storable
from catga_tasks.envelope import STORED, Envelope, Row
from catga_tasks.tables import MESSAGE_COLUMNS, NEVER, UTCDateTime, dialect, epoch, later, now, seconds_since

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

#: PostgreSQL's channel that wakes relays.
CHANNEL = "catga_outbox"
#: A claim's place in the table: the last row's moment (ISO text) and id.
Place = tuple[str, int]

_NAMES = ", ".join(STORED)
_VALUES = ", ".join(f":{name}" for name in STORED)
_MOMENT = {
    "postgresql": "coalesce(CAST(:eta AS timestamptz), clock_timestamp() + make_interval(secs => :delay))",
    "sqlite": "coalesce(:eta, strftime('%Y-%m-%d %H:%M:%f', 'now', :delay || ' seconds'))",
}
#: The SQL of the moment at which a message is due that waits for its turn.
NEVER_DUE = {"postgresql": f"CAST('{NEVER}+00' AS timestamptz)", "sqlite": f"'{NEVER}'"}
_ADD = {
    kind: text(
        f"INSERT INTO catga_outbox ({_NAMES}, scheduled, available_at, not_before) VALUES ({_VALUES}, :scheduled, "
        f"CASE WHEN :waits THEN {NEVER_DUE[kind]} ELSE {moment} END, CASE WHEN :waits THEN {moment} END)"
    )
    for kind, moment in _MOMENT.items()
}
_ADD["sqlite"] = _ADD["sqlite"].bindparams(sa.bindparam("eta", type_=UTCDateTime))
_COPY = f"COPY catga_outbox ({_NAMES}) FROM STDIN"
_COUNT = len(STORED)
#: The first queue after a name in which rows wait for a broker.
NEXT_QUEUE = text("SELECT min(queue) FROM catga_outbox WHERE broker = :broker AND queue > :last")


def add(connection: Connection, envelopes: Sequence[Envelope]) -> None:
    """Insert the messages, without a round trip a row: by COPY where psycopg can, by one executemany elsewhere."""
    rest = envelopes
    if len(envelopes) > 1 and (cursor := _copier(connection)) is not None:
        ready = [envelope for envelope in envelopes if not (_scheduled(envelope) or envelope.waits)]
        with cursor, cursor.copy(_COPY) as copy:
            for envelope in ready:
                copy.write_row(envelope[:_COUNT])
        rest = [envelope for envelope in envelopes if _scheduled(envelope) or envelope.waits]
    if rest:
        connection.execute(_ADD[dialect(connection)], [_parameters(envelope) for envelope in rest])


def claim(
    connection: Connection,
    limit: int,
    *,
    broker: str = "",
    queue: str | None = None,
    after: Place | None = None,
    suspects: bool = False,
    timed: bool = False,
) -> tuple[list[Row], Place | None]:
    """Return due rows, the longest due first, and the place where they end; on PostgreSQL they are locked.

    Rows for one broker, of one queue or of all; with `timed`, with the moments since when they could have run. Suspects
    are claimed by themselves, with `suspects`. Rows that another relay has locked are passed over. `after` bounds the
    search from below, so that the dead rows that a long transaction holds up aren't walked through again; it is no
    cursor: a transaction that began earlier may still commit below it, so a sweep without it must follow.
    """
    postgresql = dialect(connection) == "postgresql"
    forms = {"queue": queue is not None, "after": after is not None, "suspects": suspects, "timed": timed}
    statement = claim_statement(connection, **forms)
    parameters: dict[str, Any] = {"limit": limit, "broker": broker}
    if after is not None:
        parameters["after_at"], parameters["after_id"] = after
    if queue is not None:
        parameters["queue"] = queue
    found = connection.execute(statement, parameters).all()
    if not found:
        return [], None
    rows = [_row(values, postgresql=postgresql) for values in found]
    return rows, (found[-1].due_at, found[-1].id)


def claim_statement(
    connection: Connection, *, queue: bool = False, after: bool = False, suspects: bool = False, timed: bool = False
) -> sa.TextClause:
    """Return the claim. Each of its forms walks along one index; a test asserts their plans."""
    postgresql = dialect(connection) == "postgresql"
    conditions = ["broker = :broker", "suspect" if suspects else "NOT suspect", f"available_at <= {now(connection)}"]
    if after:
        moment = "CAST(:after_at AS timestamptz)" if postgresql else ":after_at"
        conditions.append(f"(available_at, id) > ({moment}, :after_id)")
    if queue:
        conditions.append("queue = :queue")
    moment = "CAST(available_at AS text)" if postgresql else "available_at"
    return text(
        f"SELECT id, {_NAMES}, {_state(connection, timed=timed)}, {moment} AS due_at "
        f"FROM catga_outbox WHERE {' AND '.join(conditions)} ORDER BY available_at, id LIMIT :limit"
        + (" FOR UPDATE SKIP LOCKED" if postgresql else "")
    )


def count(connection: Connection, ids: Iterable[int]) -> int:
    """Return how many of these rows exist."""
    statement = text("SELECT count(*) FROM catga_outbox WHERE id IN :ids").bindparams(
        sa.bindparam("ids", expanding=True)
    )
    return int(connection.execute(statement, {"ids": list(ids)}).scalar_one())


def remove(connection: Connection, ids: Sequence[int]) -> None:
    """Delete confirmed rows."""
    _by_ids(connection, "DELETE FROM catga_outbox", ids)


def reschedule(connection: Connection, row: Row, *, error: str, delay: float) -> None:
    """Count an attempt, keep its error and put the row off for `delay` seconds."""
    statement = text(
        f"UPDATE catga_outbox SET attempts = :attempts, history = :history, suspect = :suspect, "
        f"available_at = {later(connection, 'delay')} WHERE id = :id"
    )
    connection.execute(
        statement,
        {
            "attempts": row.attempts + 1,
            "history": history(connection, row, error),
            "suspect": row.suspect,
            "delay": delay,
            "id": row.id,
        },
    )


def bury(connection: Connection, row: Row, *, error: str) -> None:
    """Move the row to the dead letters, with its history and the error that ended it."""
    names = ", ".join(name for name in MESSAGE_COLUMNS if name not in ("attempts", "history"))
    statement = text(
        f"INSERT INTO catga_dead_letters (id, {names}, attempts, history, died_at, error) "
        f"SELECT id, {names}, :attempts, :history, {later(connection, 'zero')}, :error FROM catga_outbox WHERE id = :id"
    )
    parameters = {
        "attempts": row.attempts + 1,
        "history": history(connection, row, error),
        # A publisher's words may repeat a broker's, whatever those are.
        "error": storable(error),
        "zero": 0,
    }
    connection.execute(statement, {**parameters, "id": row.id})
    remove(connection, [row.id])


def add_dead(connection: Connection, envelope: Envelope, *, error: str) -> int:
    """Store a message that a worker could make nothing of among the dead letters; return its id there.

    It passes through the outbox within this transaction, so that no row of the outbox has its id, before or after.
    """
    statement = text(f"INSERT INTO catga_outbox ({_NAMES}) VALUES ({_VALUES}) RETURNING id")
    values = dict(zip(STORED, envelope[:_COUNT], strict=True))
    number = int(connection.execute(statement, values).scalar_one())
    bury(connection, Row(number, envelope), error=error)
    return number


def expire(connection: Connection, retention: float, limit: int) -> int:
    """Delete at most `limit` dead letters, the oldest of those kept for over `retention` seconds; return how many."""
    statement = text(
        "DELETE FROM catga_dead_letters WHERE id IN (SELECT id FROM catga_dead_letters "
        f"WHERE died_at < {later(connection, 'ago')} ORDER BY died_at LIMIT :limit)"
    )
    return connection.execute(statement, {"ago": -retention, "limit": limit}).rowcount


def suspect(connection: Connection, ids: Sequence[int]) -> None:
    """Mark rows that a relay may have died of: they are published one at a time from now on."""
    flag = "true" if dialect(connection) == "postgresql" else "1"
    _by_ids(connection, f"UPDATE catga_outbox SET suspect = {flag}", ids)


def history(connection: Connection, row: Row, error: str) -> str:
    """Return the row's history with one attempt more, stamped by the database's clock."""
    try:
        entries = json.loads(row.history or "[]")
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        entries = [{"attempt": row.attempts, "error": f"unreadable history: {row.history}"}]
    moment = connection.execute(text(f"SELECT CAST({now(connection)} AS text)")).scalar_one()
    entries.append({"attempt": row.attempts + 1, "at": moment, "error": error})
    return json.dumps(entries)


def next_due(connection: Connection, *, broker: str = "", queue: str | None = None) -> float | None:
    """Return the seconds until the next row that isn't due yet, or None; 0 if one is due."""
    wait = _first_due(connection, broker, queue)
    return None if wait is None else max(0.0, wait)


def overdue(connection: Connection, *, broker: str = "", queue: str | None = None) -> float | None:
    """Return for how many seconds the row that is due the longest has been due; None if none is."""
    wait = _first_due(connection, broker, queue)
    return None if wait is None or wait > 0 else -wait


def oldest_age(connection: Connection) -> float | None:
    """Return for how many seconds the longest due row has been due, or None, by one probe of the index a broker."""
    ages = (overdue(connection, broker=broker) for broker in ("", *brokers(connection)))
    return max((age for age in ages if age is not None), default=None)


def brokers(connection: Connection) -> list[str]:
    """Return the brokers that rows wait for, by one probe of the index each."""
    statement = text("SELECT min(broker) FROM catga_outbox WHERE broker > :last")
    found: list[str] = []
    while (name := connection.execute(statement, {"last": found[-1] if found else ""}).scalar()) is not None:
        found.append(name)
    return found


def clock(connection: Connection) -> float:
    """Return the database's clock: seconds since 1970."""
    return float(connection.execute(text(f"SELECT {epoch(connection, 'now')}")).scalar_one())


def queues(connection: Connection, broker: str) -> list[str]:
    """Return the queues that a broker's rows of any kind wait in, by one probe of the index each."""
    found: list[str] = []
    values = {"broker": broker}
    while (name := connection.execute(NEXT_QUEUE, {**values, "last": found[-1] if found else ""}).scalar()) is not None:
        found.append(name)
    return found


def notify(connection: Connection) -> None:
    """Wake the relays; on a connection that commits each statement, for NOTIFY locks the database at commit."""
    connection.execute(text(f"NOTIFY {CHANNEL}"))


def _first_due(connection: Connection, broker: str, queue: str | None) -> float | None:
    """Return in how many seconds the first row is due, negative if it is, or None without a row: one index probe."""
    where = "broker = :broker" if queue is None else "broker = :broker AND queue = :queue"
    statement = text(
        f"SELECT -({seconds_since(connection, 'available_at')}) FROM catga_outbox WHERE {where} "
        "ORDER BY available_at, id LIMIT 1"
    )
    wait = connection.execute(statement, {"broker": broker, **({} if queue is None else {"queue": queue})}).scalar()
    return None if wait is None else float(wait)


def _scheduled(envelope: Envelope) -> bool:
    return envelope.eta is not None or envelope.delay > 0


def _parameters(envelope: Envelope) -> dict[str, Any]:
    values = dict(zip(STORED, envelope[:_COUNT], strict=True))
    return {
        **values,
        "eta": envelope.eta,
        "delay": envelope.delay,
        "scheduled": _scheduled(envelope),
        "waits": envelope.waits,
    }


def _copier(connection: Connection) -> Any:
    """Return a cursor that can COPY, if the driver is psycopg's synchronous one."""
    if connection.dialect.driver != "psycopg" or connection.dialect.is_async:
        return None
    driver: Any = connection.connection.driver_connection
    return driver.cursor()


def _state(connection: Connection, *, timed: bool) -> str:
    """Return the columns that `_row` reads behind the stored ones: times only where somebody asks for them."""
    age, ready = seconds_since(connection, "created_at"), "NULL"
    if timed:
        ready = (
            f"CASE WHEN NOT scheduled THEN {epoch(connection, 'created_at')} "
            f"WHEN attempts = 0 THEN {epoch(connection, 'available_at')} END"
        )
    else:
        age = f"CASE WHEN expiration IS NULL THEN 0 ELSE {age} END"
    return f"attempts, history, suspect, scheduled, {age} AS age, {ready} AS ready_at"


def _by_ids(connection: Connection, statement: str, ids: Sequence[int]) -> None:
    if not ids:
        return
    if dialect(connection) == "postgresql":
        connection.execute(text(f"{statement} WHERE id = ANY(:ids)"), {"ids": list(ids)})
        return
    many = text(f"{statement} WHERE id IN :ids").bindparams(sa.bindparam("ids", expanding=True))
    connection.execute(many, {"ids": list(ids)})


def _row(values: Sequence[Any], *, postgresql: bool) -> Row:
    """Build a row from a statement's first columns: id, the stored ones, and those of `_state`."""
    envelope = Envelope(*values[1 : 1 + _COUNT])
    attempts, history, suspect, scheduled, age, ready_at = values[1 + _COUNT : 7 + _COUNT]
    if postgresql:
        return Row(values[0], envelope, attempts, history, suspect, age, scheduled, ready_at)
    envelope = envelope._replace(send_event=bool(envelope.send_event))
    return Row(values[0], envelope, attempts, history, bool(suspect), float(age), bool(scheduled), ready_at)
