"""Does the shop hold out over one broker? Servers, staff and load; the faults of a schedule; the drain; the audit."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.deliveries import Deliveries
from workers.drain import Drain
from workers.faults import Faults
from workers.interrupts import Interrupted
from workers.load import Load
from workers.proxy import Proxy
from workers.servers import NatsServer, PostgresServer, RedisServer
from workers.staff import Staff

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.schedule import Fault

BROKERS: dict[str, type[NatsServer | RedisServer]] = {"nats": NatsServer, "redis": RedisServer}
STAFF = ("worker", "worker", "relay", "relay")
#: Seconds until what the killed and the stopped had in hand goes to others.
TIMEOUTS = {
    "SHOP_ACK_WAIT": "2",
    "SHOP_VISIBILITY_TIMEOUT": "5",
    "SHOP_LEASE_TIMEOUT": "4",
    "SHOP_PUBLISH_TIMEOUT": "2.5",
    "SHOP_INBOX_LEASE": "3",
}
#: Orders that are placed and not done; more wait for their turn.
MOST_OPEN = 40
#: A trial fails if no worker gets anything for so many seconds, or if something is under way so long after the end.
DEADLINE = 120.0
#: Faults between two words about how far it is.
REPORT = 100
#: Seconds between two looks at how many orders are open.
LOOK = 0.3


class StalledError(Exception):
    """The shop doesn't get on."""


@dataclass
class Outcome:
    """What came of a trial: numbers by name, and `problem` if it didn't come to its end."""

    broker: str
    faults: dict[str, int]
    counts: dict[str, int]
    #: What all have to be 0.
    verdict: dict[str, int]
    missing: dict[str, int]
    problem: str = ""
    #: The folder with the workers' and relays' logs, which is kept if something is wrong.
    logs: str = ""

    @property
    def failed(self) -> bool:
        """Whether something was lost, doubled or wrong, or wasn't done in time."""
        return bool(self.problem or any(self.verdict.values()))


@dataclass
class Trial:
    """The shop, its load and its faults."""

    broker: str
    staff: Staff
    faults: Faults
    load: Load
    deliveries: Deliveries
    _look_due: float = 0.0

    def suffer(self, plan: Sequence[Fault]) -> None:
        """Do the faults, each after its number of deliveries; raise if nothing moves any more."""
        last, moved = self.deliveries.read(), time.monotonic()
        for number, fault in enumerate(plan, 1):
            due = self.deliveries.total + fault.after
            while self.deliveries.read() < due:
                self._tend()
                if self.deliveries.total > last:
                    last, moved = self.deliveries.total, time.monotonic()
                if time.monotonic() - moved > DEADLINE:
                    message = f"nothing was delivered for {DEADLINE:g} s before fault {number} ({fault.kind})"
                    raise StalledError(message)
            self.faults.do(fault)
            if number % REPORT == 0:
                print(f"{self.broker}: {number} faults, {self.deliveries.total} deliveries", flush=True)

    def finish(self) -> None:
        """Mend everything and wait until nothing is under way; raise if that takes too long."""
        self.load.end()
        self.faults.mend_all()
        drain, deadline = Drain(), time.monotonic() + DEADLINE
        while not drain.over():
            self.faults.mend()
            Interrupted.check()
            if time.monotonic() > deadline:
                raise StalledError(f"something was still under way {DEADLINE:g} s after the last fault")
            time.sleep(0.1)

    def _tend(self) -> None:
        Interrupted.check()
        self.load.placed()
        self.faults.mend()
        if time.monotonic() > self._look_due:
            self._look_due = time.monotonic() + LOOK
            if still_open() < MOST_OPEN:
                self.load.gate.set()
            else:
                self.load.gate.clear()
        time.sleep(0.02)


def perform(broker: str, seed: int, plan: Sequence[Fault]) -> Outcome:
    """Try the shop over one broker, and leave nothing behind but the logs of a failure.

    Once in a process: the application is imported here.
    """
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")  # PostgreSQL's wheel asks for it in vain
    started, problem = time.monotonic(), ""
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="catga-chaos-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        trial = prepare(broker, seed, directory, stack)
        try:
            trial.suffer(plan)
            trial.finish()
        except StalledError as error:
            problem = str(error)
            trial.load.end()
            trial.faults.mend_all()
        outcome = judge(trial, problem)
        outcome.counts["Seconds"] = round(time.monotonic() - started)
        if outcome.failed:
            outcome.logs = str(directory.rename(f"{directory}-failed"))
        return outcome


def prepare(broker: str, seed: int, directory: Path, stack: contextlib.ExitStack) -> Trial:
    """Start the servers, the tables, the workers and relays, and the load."""
    database, queues = PostgresServer(), BROKERS[broker]()
    for server in (database, queues):
        stack.callback(server.stop)
        server.start()
        Interrupted.check()
    proxy = stack.enter_context(Proxy(queues.url))
    path = directory / "deliveries"
    url = f"{broker}://127.0.0.1:{proxy.port}"
    os.environ.update(TIMEOUTS, SHOP_DATABASE_URL=database.url, SHOP_BROKER_URL=url, SHOP_DELIVERIES=str(path))
    # The application reads its addresses when it is imported.
    from catga_tasks import migrate
    from workers.models import create_tables, engine

    migrate.upgrade(engine)
    create_tables()
    staff = Staff(directory)
    stack.callback(staff.end)
    for kind in STAFF:
        staff.start(kind)
    load = Load(None, seed, patient=True)
    stack.callback(load.end)
    load.start()
    return Trial(broker, staff, Faults(staff, queues, database, proxy), load, Deliveries(path))


def judge(trial: Trial, problem: str) -> Outcome:
    """Ask the database what came of it."""
    from sqlalchemy import text

    from workers.audit import audit
    from workers.models import Session

    with Session() as session:
        count = audit(session)
        suppressed = session.scalar(text("SELECT coalesce(sum(suppressed), 0) FROM catga_inbox_counts"))
        dead = session.scalar(text("SELECT count(*) FROM catga_dead_letters"))
    trial.deliveries.read()
    counts: dict[str, Any] = {
        "Faults": trial.faults.done.total(),
        "Workers and relays that ended by themselves": trial.faults.ended,
        "Workers and relays killed: SIGTERM didn't end them": trial.faults.stuck,
        "Deliveries": trial.deliveries.total,
        "Duplicates seen by the broker": trial.deliveries.duplicates,
        "Duplicates suppressed by the inbox": suppressed,
        "Orders committed": count.orders,
        "Orders rolled back": count.rolled_back,
        "Effects due": count.committed,
        "Labels printed again (at least once)": count.reprinted,
    }
    verdict: dict[str, Any] = {
        "Chains unfinished": count.missing.get("receipt", 0),
        "Chords unfinished": count.missing.get("stock movement", 0),
        "Dead letters": dead,
        "Wrong": count.wrong,
        "Rolled-back orders whose task was sent": count.sent,
        "Lost": count.lost,
        "Doubled": count.doubled,
    }
    return Outcome(
        trial.broker,
        faults=dict(trial.faults.done),
        counts={name: int(value) for name, value in counts.items()},
        verdict={name: int(value) for name, value in verdict.items()},
        missing=count.missing,
        problem=problem,
    )


def still_open() -> int:
    """Return how many orders aren't done; `MOST_OPEN` if the database is out."""
    from sqlalchemy import func, select
    from sqlalchemy.exc import DBAPIError

    from workers.models import Order, Session, StockMovement

    counts = (select(func.count()).select_from(table).scalar_subquery() for table in (Order, StockMovement))
    with contextlib.suppress(DBAPIError), Session() as session:
        placed, done = session.execute(select(*counts)).one()
        return int(placed) - int(done)
    return MOST_OPEN
