"""Does every committed task run, though a worker and a relay are killed, and none that was rolled back?

`make demo`: SQLite and NATS, or `make demo DATABASE=postgresql BROKER=redis`, with two workers and two relays; servers
are on free ports, and nothing is left behind afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workers.servers import NatsServer, PostgresServer, RedisServer, Server
from workers.staff import ROOT, Staff, celery

if TYPE_CHECKING:
    from workers.audit import Audit

PLACING_THREADS = 4
#: Seconds until the work of who is killed goes to another one.
DEAD_AFTER = "4"
#: The demo fails if something is still under way after this many seconds.
DEADLINE = 120.0
#: Seconds without a message anywhere, after which none is under way: one may be between the broker and a worker.
QUIET = 1.0
#: Who is killed, and when: the share of the tasks that have run by then.
KILLS = (("worker", 0.2), ("relay", 0.4))


NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "nats": "NATS", "redis": "Redis"}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""

    #: The signals that came. They are noted, not raised: an exception amid a fork or a lock leaves both broken.
    signals: ClassVar[list[int]] = []

    @classmethod
    def check(cls) -> None:
        """Raise if a signal came."""
        if cls.signals:
            raise cls


class Load:
    """Orders, placed by threads of their own."""

    def __init__(self, orders: int, seed: int) -> None:
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        shares = [len(range(number, orders, PLACING_THREADS)) for number in range(PLACING_THREADS)]
        self._threads = [
            threading.Thread(target=self._place, args=(share, random.Random(seed * PLACING_THREADS + number)))
            for number, share in enumerate(shares)
        ]

    def start(self) -> None:
        """Begin to place orders."""
        for thread in self._threads:
            thread.start()

    def placed(self) -> bool:
        """Return whether all orders are placed; raise what kept one from it."""
        if self._errors:
            raise self._errors[0]
        return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Stop and wait for the orders in hand."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _place(self, count: int, lots: random.Random) -> None:
        from workers.shop import place_or_fail

        try:
            for _ in range(count):
                if self._stop.is_set():
                    return
                place_or_fail(lots)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self._errors.append(error)


def drained() -> bool:
    """Return whether no message is left: not in the outbox, not at the broker, not in a worker's hands."""
    from sqlalchemy import text

    from workers.app import app
    from workers.models import Session

    with Session() as session:
        if session.scalar(text("SELECT count(*) FROM catga_outbox")):
            return False
    queue = app.conf.task_default_queue
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        if connection.transport.driver_type == "nats":
            # A stream keeps what a worker holds, too.
            stream = channel.nats.js.stream_info(channel.settings.stream(queue))
            return not channel.nats.call(stream).state.messages
        return not channel.client.llen(queue) and not channel.client.hlen("unacked")


def watch(load: Load, staff: Staff, orders: int, progress: Progress) -> tuple[Audit, bool]:
    """Follow the deliveries and kill on the way; return the last count, and whether nothing was under way then."""
    from workers.audit import audit
    from workers.models import Session
    from workers.shop import FAILING

    placing = progress.add_task("Orders placed", total=orders)
    delivering = progress.add_task("Tasks delivered", total=None)
    kills = list(KILLS)
    expected = orders * (1 - FAILING) * 3
    deadline = time.monotonic() + DEADLINE
    quiet_since = None
    while True:
        Interrupted.check()
        placed = load.placed()
        with Session() as session:
            count = audit(session)
        progress.update(placing, completed=count.orders + count.rolled_back)
        progress.update(delivering, completed=count.delivered, total=count.committed if placed else None)
        staff.check()
        if kills and count.delivered >= expected * kills[0][1]:
            kind, _ = kills.pop(0)
            staff.replace(kind)
            progress.console.print(f"SIGKILL to a {kind} after {count.delivered} deliveries; another one starts.")
        if not placed or not drained():
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        # Only when nothing is under way is it certain that nothing more is sent, or that a task is lost.
        if quiet_since is not None and time.monotonic() - quiet_since > QUIET:
            return count, True
        if time.monotonic() > deadline:
            return count, False
        time.sleep(0.2)


def report(count: Audit, staff: Staff, seconds: float) -> Table:
    """Return the table of the counts."""
    table = Table("What", "Count", title="The audit, counted by the database")
    table.columns[1].justify = "right"
    rows = {
        "Orders committed": count.orders,
        "Tasks committed (charge, receipt, stock)": count.committed,
        "Tasks delivered": count.delivered,
        "Duplicate deliveries": count.duplicates,
        "Orders rolled back": count.rolled_back,
        "Rolled-back orders whose task was sent": count.sent,
        "Workers killed": staff.killed["worker"],
        "Relays killed": staff.killed["relay"],
        "Seconds": f"{seconds:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Run the demo; the stack takes what has to be cleaned up."""
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")  # PostgreSQL's wheel asks for it in vain
    console = Console()
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="catga-demo-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    console.print(f"A shop on {NAMES[options.database]} and {NAMES[options.broker]} ...")
    broker = NatsServer() if options.broker == "nats" else RedisServer()
    servers: list[Server] = [broker]
    database = f"sqlite:///{directory / 'shop.db'}"
    if options.database == "postgresql":
        postgres = PostgresServer()
        servers.append(postgres)
        database = postgres.url
    for server in servers:
        stack.callback(server.stop)
    for server in servers:
        server.start()
        Interrupted.check()
    os.environ.update(SHOP_DATABASE_URL=database, SHOP_BROKER_URL=broker.url, SHOP_DEAD_AFTER=DEAD_AFTER)
    # The application reads its addresses when it is imported.
    from workers.models import create_tables

    staff = Staff(directory)
    stack.callback(staff.end)
    try:
        migrate = celery("outbox", "migrate")
        subprocess.run(migrate, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
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
    console.print(report(count, staff, time.monotonic() - started))
    print(count.line, flush=True)
    return status


def main() -> int:
    """Read the options, run, and clean up whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m workers.demo")
    parser.add_argument("--orders", type=int, default=2000, help="how many orders are placed (2000)")
    parser.add_argument("--seed", type=int, default=1, help="which of them are rolled back")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite", help="(sqlite)")
    parser.add_argument("--broker", choices=("nats", "redis"), default="nats", help="(nats)")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: Interrupted.signals.append(number))
    try:
        with contextlib.ExitStack() as stack:
            return run(options, stack)
    except Exception:
        if Interrupted.signals:
            return 128 + Interrupted.signals[0]
        raise


if __name__ == "__main__":
    sys.exit(main())
