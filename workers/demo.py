"""Does every committed task run, though a worker and a relay are killed, and none that was rolled back?

`make demo`: a SQLite file, an embedded NATS server, two workers and two relays, on a free port and in a temporary
folder, and nothing left behind afterwards. `make demo DATABASE=postgresql BROKER=redis` takes the other ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workers.drain import Drain
from workers.interrupts import Interrupted
from workers.load import Load
from workers.servers import NatsServer, PostgresServer, RedisServer, Server
from workers.staff import Staff

if TYPE_CHECKING:
    from workers.audit import Audit

#: The servers; SQLite needs none.
DATABASES: dict[str, type[PostgresServer] | None] = {"sqlite": None, "postgresql": PostgresServer}
BROKERS: dict[str, type[NatsServer | RedisServer]] = {"nats": NatsServer, "redis": RedisServer}
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "nats": "NATS", "redis": "Redis"}
#: Seconds until what the killed had in hand goes to others: a worker's messages, and on SQLite a relay's lease.
TIMEOUTS = {
    "SHOP_ACK_WAIT": "4",
    "SHOP_VISIBILITY_TIMEOUT": "4",
    "SHOP_LEASE_TIMEOUT": "5",
    "SHOP_PUBLISH_TIMEOUT": "4",
}
#: The demo fails if something is still under way after this many seconds.
DEADLINE = 120.0
#: Who is killed, and when: the share of the tasks that have run by then.
KILLS = (("worker", 0.2), ("relay", 0.4))


def working_relay() -> int | None:
    """Return the process id of the relay that has SQLite's lease; elsewhere all work, and nobody has it."""
    from sqlalchemy import text

    from workers.models import Session

    with Session() as session:
        owner = session.scalar(text("SELECT owner FROM catga_outbox_lease"))
    # A relay's id is its host's name, its process id and a random end.
    return int(owner.split("-")[-2]) if owner else None


def watch(load: Load, staff: Staff, orders: int, progress: Progress) -> tuple[Audit, bool]:
    """Follow the deliveries and kill on the way; return the last count, and whether nothing was under way then."""
    from workers.audit import audit
    from workers.models import Session
    from workers.shop import EFFECTS

    placing = progress.add_task("Orders placed", total=orders)
    delivering = progress.add_task("Tasks delivered", total=None)
    kills = list(KILLS)
    expected = orders * EFFECTS
    deadline = time.monotonic() + DEADLINE
    drain = Drain()
    while True:
        Interrupted.check()
        placed = load.placed()
        with Session() as session:
            count = audit(session)
        progress.update(placing, completed=min(orders, count.orders + count.rolled_back))
        progress.update(delivering, completed=count.delivered, total=count.committed if placed else None)
        staff.check()
        if kills and count.delivered >= expected * kills[0][1]:
            kind, _ = kills.pop(0)
            staff.replace(kind, working_relay() if kind == "relay" else None)
            progress.console.print(f"SIGKILL to a {kind} after {count.delivered} deliveries; another one starts.")
        if placed and drain.over():
            with Session() as session:
                return audit(session), True
        if time.monotonic() > deadline:
            return count, False
        time.sleep(0.2)


def report(count: Audit, staff: Staff, seconds: float, *, database: str) -> Table:
    """Return the table of the counts."""
    table = Table("What", "Count", title=f"The audit, counted in {NAMES[database]}")
    table.columns[1].justify = "right"
    rows = {
        "Orders committed": count.orders,
        "Tasks committed (charge, receipt, stock, ...)": count.committed,
        "Tasks delivered": count.delivered,
        "Tasks that took effect twice": count.doubled,
        "Duplicate deliveries, suppressed by the inbox": suppressed(),
        "Orders rolled back": count.rolled_back,
        "Rolled-back orders whose task was sent": count.sent,
        "Workers killed": staff.killed["worker"],
        "Relays killed": staff.killed["relay"],
        "Seconds": f"{seconds:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def suppressed() -> int:
    """Return how many duplicates the inbox has met."""
    from sqlalchemy import text

    from workers.models import Session

    with Session() as session:
        return int(session.scalar(text("SELECT sum(suppressed) FROM catga_inbox_counts")) or 0)


def start_servers(database: str, broker: str, directory: Path, stack: contextlib.ExitStack) -> None:
    """Start what the shop needs, and put the addresses where it looks for them."""
    kind = DATABASES[database]
    store, queues = kind() if kind else None, BROKERS[broker]()
    servers: list[Server] = [queues] if store is None else [store, queues]
    for server in servers:
        stack.callback(server.stop)
    for server in servers:
        server.start()
        Interrupted.check()
    url = store.url if store else f"sqlite:///{directory / 'shop.db'}"
    os.environ.update(TIMEOUTS, SHOP_DATABASE_URL=url, SHOP_BROKER_URL=queues.url)


def run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Run the demo; the stack takes what has to be cleaned up."""
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")  # PostgreSQL's wheel asks for it in vain
    console = Console()
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="catga-demo-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    console.print(f"A shop on {NAMES[options.database]} and {NAMES[options.broker]}: two workers and two relays.")
    start_servers(options.database, options.broker, directory, stack)
    # The application reads its addresses when it is imported.
    from catga_tasks import migrate
    from workers.models import create_tables, engine

    staff = Staff(directory)
    stack.callback(staff.end)
    try:
        migrate.upgrade(engine)
        create_tables()
        Interrupted.check()
        for kind in ("worker", "worker", "relay", "relay"):
            staff.start(kind)
        load = Load(options.orders, options.seed)
        stack.callback(load.end)
        load.start()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            count, finished = watch(load, staff, options.orders, progress)
    except Exception:
        if not Interrupted.signals:
            console.print(staff.logs(), markup=False, highlight=False)
        raise
    status = count.status if finished else 1
    if status:
        console.print(staff.logs(), markup=False, highlight=False)
    if not finished:
        console.print(f"Tasks were still under way after {DEADLINE:g} s.")
    console.print(report(count, staff, time.monotonic() - started, database=options.database))
    print(count.line, flush=True)
    return status


def main() -> int:
    """Read the options, run, and clean up whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m workers.demo")
    parser.add_argument("--orders", type=int, default=500, help="how many orders are placed (500)")
    parser.add_argument("--seed", type=int, default=1, help="which of them are rolled back")
    parser.add_argument("--database", choices=DATABASES, default="sqlite", help="where the shop and its outbox live")
    parser.add_argument("--broker", choices=BROKERS, default="nats", help="what brings the tasks to the workers")
    options = parser.parse_args()
    Interrupted.note()
    try:
        with contextlib.ExitStack() as stack:
            return run(options, stack)
    except Exception:
        if Interrupted.signals:
            return 128 + Interrupted.signals[0]
        raise


if __name__ == "__main__":
    sys.exit(main())
