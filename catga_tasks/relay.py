"""The loop that brings committed messages to the broker: claim, publish, remove.

Each broker has a lane of its own, in a thread of its own: one that is out, or slow, holds up no other's messages.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import retry, telemetry
from catga_tasks.brokers.contract import Receipt
from catga_tasks.claims import Claims
from catga_tasks.errors import BrokerUnavailable, LeaseLost
from catga_tasks.tallies import Tally
from catga_tasks.wakeup import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Engine

    from catga_tasks.brokers import Publisher
    from catga_tasks.config import Settings
    from catga_tasks.envelope import Envelope, Row
    from catga_tasks.telemetry import Snapshot
    from catga_tasks.tracing import Publishing

logger = logging.getLogger("catga_tasks.relay")

#: The shortest pause between two looks at an empty table, in seconds; it doubles up to outbox_poll_interval_max.
POLL_SECONDS = 0.005
HEARTBEAT_SECONDS = 5.0
REPORT_SECONDS = 60.0
#: Pauses while the broker or the database is out, in seconds: from the first to the cap.
OUTAGE_SECONDS = (0.1, 15.0)


class Relay:
    """One relay, with a lane for each broker. Any number may run side by side; `run` returns after `stop`."""

    def __init__(self, lanes: Sequence[Lane], snapshot: Callable[[], Snapshot | None] = lambda: None) -> None:
        self.lanes = tuple(lanes)
        self._snapshot = snapshot

    @property
    def published(self) -> int:
        """How many messages the brokers confirmed so far."""
        return sum(lane.published for lane in self.lanes)

    def run(self) -> None:
        """Work until `stop`. Outages of a broker or the database are waited out."""
        first, *others = self.lanes
        telemetry.observe(self._snapshot)
        threads = [threading.Thread(target=lane.run, name=f"catga-outbox-{lane.broker}") for lane in others]
        for thread in threads:
            thread.start()
        try:
            first.run()
        finally:
            self.stop()
            for thread in threads:
                thread.join()
            telemetry.forget(self._snapshot)

    def run_once(self) -> int:
        """Publish what is due now and return how many messages the brokers confirmed.

        Raises SQLAlchemy's errors, and `BrokerUnavailable` in an outage, with the rows left for later. A broker that
        is out is no reason not to publish to the others first.
        """
        outages = []
        for lane in self.lanes:
            try:
                lane.run_once()
            except BrokerUnavailable as error:
                outages.append(str(error))
        if outages:
            raise BrokerUnavailable(" ".join(outages))
        return self.published

    def stop(self) -> None:
        """Finish the batches in hand and return from `run`. Safe in a signal handler."""
        for lane in self.lanes:
            lane.stop()

    def pause(self) -> None:
        """Wait until no lane holds a connection to the database, for a fork; `resume` lets them go on.

        A fork copies what SQLite knows of the locks that its process holds, and the child would trust in it. Bounded by
        the time that a publish may take.
        """
        for lane in self.lanes:
            lane.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        for lane in self.lanes:
            lane.resume()


class Lane:
    """A relay's way to one broker.

    `brokers` are the names of all that the relay has a lane for. `published` is called with the envelopes of each batch
    that the broker confirmed. `result_expires` is how long results are kept, in seconds; None keeps them. `system` is
    what telemetry calls the broker. With `timed`, messages tell workers since when they could have run, as they do
    where telemetry is on.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        settings: Settings,
        *,
        broker: str = "",
        brokers: Sequence[str] = (),
        queues: Sequence[str] = (),
        published: Callable[[list[Envelope]], None] | None = None,
        result_expires: float | None = None,
        system: str = "",
        timed: bool = False,
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.broker = broker
        self.published = 0
        self._brokers = frozenset(brokers)
        self._publisher = publisher
        self._settings = settings
        self._on_published = published
        self._system = system
        self._timed = timed
        self._tally = Tally()
        self._claims = Claims(
            engine,
            settings,
            relay=self.id,
            broker=broker,
            queues=queues,
            result_expires=result_expires,
            timed=self._is_timed,
        )
        self._listener = Listener(engine)
        self._fork_waits, self._fork_may, self._fork_over = threading.Event(), threading.Event(), threading.Event()
        self._stopping = threading.Event()
        self._pause = POLL_SECONDS
        self._failures = 0
        self._heartbeat_due = 0.0
        self._report_due = time.monotonic() + REPORT_SECONDS
        self._reported = 0
        self._strangers: list[str] = []

    def run(self) -> None:
        """Work until `stop`; see `Relay.run`."""
        logger.info("Relay %s is ready%s.", self.id, f" for broker {self.broker}" if self.broker else "")
        try:
            while not self._stopping.is_set():
                self._make_way()
                self._round()
        finally:
            self._end()

    def run_once(self) -> None:
        """Publish what is due now; see `Relay.run_once`."""
        try:
            self._housekeep()
            while self._step() and not self._stopping.is_set():
                if self._failures:
                    name = f"The broker {self.broker}".rstrip()
                    message = f"{name} is out; {self.published} were published, the others stay in the outbox."
                    raise BrokerUnavailable(message)
        finally:
            self._end()

    def stop(self) -> None:
        """Finish the batch in hand; see `Relay.stop`."""
        self._stopping.set()
        self._listener.interrupt()

    def pause(self) -> None:
        """Wait until this lane holds no connection; see `Relay.pause`."""
        self._fork_may.clear()
        self._fork_over.clear()
        self._fork_waits.set()
        self._listener.interrupt()
        self._fork_may.wait(self._settings.outbox_publish_timeout)

    def resume(self) -> None:
        """Go on; see `Relay.resume`."""
        self._fork_waits.clear()
        self._fork_over.set()

    def _make_way(self) -> None:
        if self._fork_waits.is_set():
            self._claims.release()
            self._listener.disconnect()
            self._fork_may.set()
            self._fork_over.wait()

    def _round(self) -> None:
        try:
            self._housekeep()
            taken = self._step()
            if self._failures:
                self._wait_out()
            elif not taken:
                self._rest()
        except LeaseLost as error:
            logger.warning("Relay %s: %s", self.id, error)
        except SQLAlchemyError as error:
            self._database_failed(error)
        except Exception:
            # Whatever it is, a relay that ends would leave the messages waiting.
            logger.exception("Relay %s failed at a batch and goes on; its rows are released.", self.id)
            self._claims.release()
            self._failures += 1
            self._wait_out()

    def _step(self) -> int:
        """Take a batch, publish it, settle it; return how many rows were taken."""
        rows = self._claims.take()
        if not rows:
            self._recovered()
            return 0
        started = time.monotonic()
        receipt = self._publish(rows)
        if receipt is None:
            return len(rows)
        dead = self._claims.settle(receipt.confirmed, receipt.rejected)
        self.published += len(receipt.confirmed)
        self._pause = POLL_SECONDS
        logger.debug(
            "Relay %s: %d published, %d failed (%d of them dead) of %d in %.1f ms.",
            self.id,
            len(receipt.confirmed),
            len(receipt.rejected),
            dead,
            len(rows),
            1000 * (time.monotonic() - started),
        )
        self._report(receipt)
        if self._on_published and receipt.confirmed:
            self._on_published([row.envelope for row in receipt.confirmed])
        return len(rows)

    def _publish(self, rows: Sequence[Row]) -> Receipt | None:
        """Publish the rows, and count what became of them; None if nobody knows, and each is to be tried alone."""
        spans = None
        started = time.perf_counter()
        try:
            with self._traced(rows) as spans:
                receipt = self._publisher.publish(
                    [telemetry.stamped(row) for row in rows] if self._is_timed() else rows
                )
        except Exception as problem:
            # Nobody foresaw it, so a row may be to blame: each is tried alone, and one that fails alone is counted.
            logger.exception("Relay %s: the publisher failed.", self.id)
            if len(rows) > 1:
                self._claims.doubt(rows)
                return None
            receipt = Receipt(rejected=[(rows[0], f"{type(problem).__name__}: {problem}")])
        except BaseException:
            self._claims.release()
            self._claims.forget_journal()
            raise
        measured = list(telemetry.publishing(self._system, receipt, time.perf_counter() - started))
        self._tally.add(measured)
        telemetry.record(measured, spans.done(receipt) if spans else None)
        return receipt

    def _traced(self, rows: Sequence[Row]) -> AbstractContextManager[Publishing | None]:
        """Return the spans of this publish, if anybody listens."""
        if not telemetry.on():
            return nullcontext()
        from catga_tasks import tracing

        return tracing.Publishing(rows, self._system)

    def _is_timed(self) -> bool:
        return self._timed or telemetry.on()

    def _report(self, receipt: Receipt) -> None:
        """Say what went wrong, and remember whether the broker is out."""
        for row, error in receipt.rejected:
            logger.warning(
                "Message %d (task %s, id %s) failed: %s",
                row.id,
                row.envelope.task,
                row.envelope.task_id,
                error,
                extra=_fields(row),
            )
        if receipt.outage is not None:
            self._failures += 1
            name, why = f"the broker {self.broker}".rstrip(), receipt.outage.rstrip(".")
            logger.warning("Relay %s: %s is out, %s. No attempts are used up.", self.id, name, why)
        else:
            self._recovered()

    def _recovered(self) -> None:
        self._failures = 0

    def _rest(self) -> None:
        """Wait for a commit, the next ETA or the end of the pause, which grows while nothing happens."""
        due = self._claims.next_due()
        seconds = min(self._pause, self._until_heartbeat(), *(() if due is None or due == 0 else (due,)))
        woken = self._listener.wait(seconds)
        self._pause = POLL_SECONDS if woken else min(self._settings.outbox_poll_interval_max, self._pause * 2)

    def _wait_out(self) -> None:
        first, longest = OUTAGE_SECONDS
        deadline = time.monotonic() + retry.delay(self._failures, base=first, maximum=longest)
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            self._make_way()
            # Commits don't shorten this wait: they would turn into attempts at a broker that is down.
            self._stopping.wait(min(left, 0.1))

    def _database_failed(self, error: SQLAlchemyError) -> None:
        self._claims.release()
        self._listener.disconnect()
        self._failures += 1
        reason = type(getattr(error, "orig", None) or error).__name__
        logger.warning("Relay %s: the database is out (%s); its rows are released.", self.id, reason)
        self._wait_out()
        try:
            self._claims.forget_journal()
        except SQLAlchemyError:
            logger.debug("Relay %s: still no database.", self.id)

    def _housekeep(self) -> None:
        now = time.monotonic()
        if now >= self._heartbeat_due:
            self._beat()
            self._heartbeat_due = now + HEARTBEAT_SECONDS
            if not self.broker:
                self._warn_of_strangers()
        if now >= self._report_due:
            logger.info("Relay %s: %d published in the last minute.", self.id, self.published - self._reported)
            self._report_due, self._reported = now + REPORT_SECONDS, self.published

    def _beat(self) -> None:
        self._claims.housekeep(
            hostname=socket.gethostname(), pid=os.getpid(), published=self.published, tally=self._tally
        )

    def _warn_of_strangers(self) -> None:
        strangers = [name for name in self._claims.brokers() if name not in self._brokers]
        if strangers != self._strangers:
            self._strangers = strangers
            for name in strangers:
                logger.warning(
                    "Relay %s: messages wait for broker %r, which outbox_brokers doesn't name here.", self.id, name
                )

    def _until_heartbeat(self) -> float:
        return max(0.0, self._heartbeat_due - time.monotonic())

    def _end(self) -> None:
        self._publisher.close()
        try:
            self._beat()
            self._claims.farewell()
        except SQLAlchemyError:
            logger.warning("Relay %s ends without a farewell: the database is out.", self.id)
        self._listener.close()
        logger.info("Relay %s ends: %d published.", self.id, self.published)


def _fields(row: Row) -> dict[str, object]:
    """Return what a line about this row carries, for structured logs."""
    return {
        "message_id": row.id,
        "task_id": row.envelope.task_id,
        "task_name": row.envelope.task,
        "trace_id": telemetry.trace_id(row.envelope.headers),
    }
