"""Who holds which rows while they are being published?

On PostgreSQL the row lock is the lease: claim, publish and remove are one transaction, so a killed relay frees its
rows at once, and a stalled one finds its connection gone. SQLite has one writer and no row locks: there one
relay at a time works, by a lease row, in short transactions.

A batch in flight stands in the journal. An entry that is left behind names rows of which one may have killed its
relay. They become suspects, published one at a time, and a suspect whose relay dies again has used up an attempt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from catga_tasks import holds, inbox, liveness, outbox, pauses, results, retry
from catga_tasks.errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection, Engine

    from catga_tasks.config import Settings
    from catga_tasks.envelope import Row
    from catga_tasks.outbox import Place
    from catga_tasks.tallies import Tally

KILLED = "The relay's process died while it published this message."
#: Seconds between two looks at which queues are paused.
PAUSES_SECONDS = 0.5
#: The part of a relay's time that sweeps from the table's beginning may take.
SWEEP_SHARE = 0.05
#: How long deleting what is past its retention may take at a heartbeat.
EXPIRE_SECONDS = 0.5
#: Rows that are deleted at a time for it: a small transaction.
EXPIRE_BATCH = 1000


class Claims:
    """What a relay has in hand of one broker's rows: `take`, then `settle` or `release`. Not for several threads."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        relay: str,
        broker: str = "",
        queues: Sequence[str] = (),
        result_expires: float | None = None,
        timed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._relay = relay
        self._broker = broker
        self._result_expires = result_expires
        #: Whether anybody asks since when the rows could have run.
        self._timed = timed
        self._queues = tuple(sorted(queues))
        #: The turn in which each queue was last claimed from.
        self._served: dict[str | None, int] = {}
        self._turn = 0
        self._paused: frozenset[str] = frozenset()
        self._next_pauses = 0.0
        self._locks = engine.dialect.name == "postgresql"
        self._work: Connection | None = None
        self._side: Connection | None = None
        self._entry: int | None = None
        self._places: dict[str | None, Place] = {}
        self._next_sweep: dict[str | None, float] = {}
        self._renew_lease = 0.0
        self._suspects_turn = False
        self._taken = 0

    def take(self) -> list[Row]:
        """Claim the next rows and write them into the journal; an empty list if there are none."""
        while True:
            work = self._open()
            with _released_on_error(self):
                if not self._locks and not self._leased(work):
                    return self._nothing(work)
                self._begin(work)
                chosen = self._claim(work)
                if not chosen:
                    return self._nothing(work)
                entry, others = liveness.journal_open(self._side or work, self._relay, [row.id for row in chosen])
                if self._blame(work, chosen, others):
                    liveness.journal_close(self._side or work, entry)
                    work.commit()
                    continue
                self._entry = entry
                self._taken = len(chosen)
                self._hold(work)
                return chosen

    def settle(self, confirmed: Sequence[Row], rejected: Sequence[tuple[Row, str]]) -> int:
        """Remove what is confirmed, put off what failed, bury what used up its attempts; return how many died.

        Rows that are in neither stay as they were: the broker was out, and no attempt is used up. Raises
        `LeaseLost` on SQLite if another relay has taken over; on PostgreSQL the connection is gone then.
        """
        work = self._open()
        with _released_on_error(self):
            if not self._locks and not liveness.hold_lease(work, self._relay, self._broker):
                message = "Another relay took over while this one was stalled; its rows are left to that one."
                raise LeaseLost(message)
            outbox.remove(work, [row.id for row in confirmed])
            dead = sum(_fail(work, row, error, self._settings) for row, error in rejected)
            if self._entry is not None:
                liveness.journal_close(work, self._entry)
            work.commit()
        self._entry = None
        if len(confirmed) + len(rejected) < self._taken:
            self._places.clear()
        return dead

    def doubt(self, rows: Sequence[Row]) -> None:
        """Put back a batch that failed as a whole: its rows are suspects, published one at a time."""
        work = self._open()
        with _released_on_error(self):
            outbox.suspect(work, [row.id for row in rows])
            if self._entry is not None:
                liveness.journal_close(work, self._entry)
            work.commit()
        self._entry = None

    def release(self) -> None:
        """Let go of whatever is in hand, and of the connections, which may be broken."""
        self._entry = None
        self._places.clear()
        self._renew_lease = 0.0
        for connection in (self._work, self._side):
            if connection is not None:
                _discard(connection)
        self._work = self._side = None

    def housekeep(self, *, hostname: str, pid: int, published: int, tally: Tally) -> None:
        """Write the heartbeat, fold away relays that are long gone, strike journal entries without rows.

        An entry of a living relay always has rows: it goes in the transaction that removes the last of them. Dead
        letters past `outbox_retention` go too, deliveries past `inbox_retention` and results past `result_expires`.
        """
        with self._engine.begin() as connection:
            liveness.heartbeat(
                connection,
                self._relay,
                hostname=hostname,
                pid=pid,
                broker=self._broker,
                queues=self._queues,
                published=published,
                tally=tally,
            )
            liveness.retire(connection)
            for entry, ids in liveness.journal(connection):
                if entry != self._entry and not outbox.count(connection, ids):
                    liveness.journal_close(connection, entry)
        self._expire(outbox.expire, self._settings.outbox_retention)
        self._expire(inbox.expire, self._settings.inbox_retention)
        for expire in (results.expire, results.expire_groups, results.expire_chords):
            self._expire(expire, self._result_expires)
        self._expire(holds.expire, 0.0)

    def _expire(self, expire: Callable[[Connection, float, int], int], retention: float | None) -> None:
        """Delete what is past its retention, in small transactions and for a bounded time: the messages come first."""
        deadline = time.monotonic() + EXPIRE_SECONDS
        while retention is not None:
            with self._engine.begin() as connection:
                if expire(connection, retention, EXPIRE_BATCH) < EXPIRE_BATCH or time.monotonic() > deadline:
                    return

    def forget_journal(self) -> None:
        """Clear this living relay's entries: what broke was a connection, and no row is to blame."""
        with self._engine.begin() as connection:
            liveness.journal_forget(connection, self._relay)

    def farewell(self) -> None:
        """End in good order: the heartbeat row is folded away and the lease is given back."""
        self.release()
        with self._engine.begin() as connection:
            liveness.retire(connection, self._relay)
            liveness.release_lease(connection, self._relay)

    def brokers(self) -> list[str]:
        """Return the named brokers that rows of any kind wait for."""
        with self._engine.connect() as connection:
            return outbox.brokers(connection)

    def next_due(self) -> float | None:
        """Return the seconds until the next row is due, or None if there is none."""
        work = self._open()
        with _released_on_error(self):
            due = [outbox.next_due(work, broker=self._broker, queue=queue) for queue in self._open_queues(work)]
            work.rollback()
            return min((wait for wait in due if wait is not None), default=None)

    def _open(self) -> Connection:
        if self._work is None:
            if self._locks:
                self._work = self._engine.connect().execution_options(isolation_level="READ COMMITTED")
                self._side = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            else:
                self._work = self._engine.connect()
        return self._work

    def _nothing(self, work: Connection) -> list[Row]:
        work.commit()
        return []

    def _leased(self, work: Connection) -> bool:
        if time.monotonic() < self._renew_lease:
            return True
        if not liveness.take_lease(work, self._relay, self._broker, self._settings.outbox_lease_timeout):
            return False
        work.commit()
        self._renew_lease = time.monotonic() + self._settings.outbox_lease_timeout / 3
        return True

    def _claim(self, work: Connection) -> list[Row]:
        """Return a batch of rows that nobody doubts, or one suspect, in turns while there are both.

        The queues of a relay take turns too: a claim along one queue's index is as fast with a million rows of others.
        """
        self._suspects_turn = not self._suspects_turn
        kinds = (self._claim_suspect, self._claim_batch)
        queues = self._open_queues(work)
        for claim in kinds if self._suspects_turn else kinds[::-1]:
            for queue in queues:
                if rows := claim(work, queue):
                    self._turn += 1
                    self._served[queue] = self._turn
                    return rows
        return []

    def _open_queues(self, work: Connection) -> list[str | None]:
        """Return the queues to claim from, the longest unserved first; None stands for all of them.

        While any is paused, those that have rows are named: a walk along all would pass over each paused row again.
        """
        if time.monotonic() >= self._next_pauses:
            self._paused = pauses.paused(work, self._broker)
            self._next_pauses = time.monotonic() + PAUSES_SECONDS
        names: Sequence[str] = self._queues
        if not names:
            if not self._paused:
                return [None]
            names = outbox.queues(work, self._broker)
        waiting = [name for name in names if name not in self._paused]
        waiting.sort(key=lambda name: self._served.get(name, 0))
        return [*waiting]

    def _claim_suspect(self, work: Connection, queue: str | None) -> list[Row]:
        rows, _ = outbox.claim(work, 1, broker=self._broker, queue=queue, suspects=True, timed=self._timed())
        return rows

    def _claim_batch(self, work: Connection, queue: str | None) -> list[Row]:
        started = time.monotonic()
        after = self._places.get(queue) if started < self._next_sweep.get(queue, 0.0) else None
        limit = self._settings.outbox_batch_size
        rows, place = outbox.claim(work, limit, broker=self._broker, queue=queue, after=after, timed=self._timed())
        if after is None:
            ended = time.monotonic()
            self._next_sweep[queue] = ended + (ended - started) / SWEEP_SHARE
        if place:
            self._places[queue] = place
        return rows

    def _begin(self, work: Connection) -> None:
        """Set what holds for this transaction only, in one round trip: a pooler hands the session to others."""
        if not self._locks:
            return
        settings = {
            # The server ends a stalled relay's session: its rows are free, and it can't write late.
            "idle_in_transaction_session_timeout": int(self._settings.outbox_lease_timeout * 1000),
            # A table that was never analyzed looks small: the planner would sort all that is due for each claim, which
            # halved the relay's rate with 10,000 rows. The index has their order.
            "enable_sort": "off",
            "enable_bitmapscan": "off",
        }
        work.execute(text("SELECT " + ", ".join(f"set_config('{k}', '{v}', true)" for k, v in settings.items())))

    def _hold(self, work: Connection) -> None:
        if not self._locks:
            work.commit()

    def _blame(self, work: Connection, rows: Sequence[Row], others: Sequence[tuple[int, list[int]]]) -> bool:
        """Mark rows that stand in the journal of a batch that ended without being settled; return if any does.

        Its relay can't be alive: it would hold their locks, or the lease.
        """
        left_behind = {entry: ids for entry, ids in others if not {row.id for row in rows}.isdisjoint(ids)}
        if not left_behind:
            return False
        ids = {number for entry in left_behind.values() for number in entry}
        blamed = [row for row in rows if row.id in ids]
        outbox.suspect(work, [row.id for row in blamed if not row.suspect])
        for row in blamed:
            if row.suspect:
                _fail(work, row, KILLED, self._settings)
        liveness.journal_strike(work, list(left_behind), {row.id for row in blamed})
        return True


class _released_on_error:  # noqa: N801 - reads as the statement that it is
    """Let go of everything when a step fails: a broken connection must not be used again."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            self._claims.release()


def _fail(connection: Connection, row: Row, error: str, settings: Settings) -> bool:
    """Count the attempt; return True if it was the last and the row is a dead letter now.

    If the move to the dead letters fails, the row stays and is tried again: nothing gets lost on the way.
    """
    if row.attempts + 1 >= settings.outbox_max_attempts:
        try:
            with connection.begin_nested():
                outbox.bury(connection, row, error=error)
                message = row.envelope
                holds.let_go(
                    connection, message.task_id, unique_key=message.unique_key, ordering_key=message.ordering_key
                )
        except DBAPIError as problem:
            error = f"{error} (the move to the dead letters failed: {type(problem.orig).__name__})"
        else:
            return True
    wait = retry.delay(
        row.attempts + 1,
        base=settings.outbox_retry_backoff,
        maximum=settings.outbox_retry_backoff_max,
        jitter=settings.outbox_retry_jitter,
    )
    outbox.reschedule(connection, row, error=error, delay=wait)
    return False


def _discard(connection: Connection) -> None:
    try:
        if connection.dialect.name != "sqlite":
            # SQLite's don't break, and a database in memory goes with its connection.
            connection.invalidate()
        connection.close()
    except DBAPIError:
        # The connection was broken before: that is why it is thrown away.
        connection.detach()
