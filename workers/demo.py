"""Does every committed task run, though a worker and a relay are killed, and none that was rolled back?

`make demo`: a SQLite file, an embedded NATS server, two workers and two relays, on a free port and in a temporary
folder, and nothing left behind afterwards. `make demo DATABASE=postgresql BROKER=redis` takes the other ones.
"""

from __future__ import annotations

import argparse
import asyncio
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
#: Seconds without a message anywhere, after which none is under way: one may be between the broker and a worker.
QUIET = 1.0
#: Who is killed, and when: the share of the tasks that have run by then.
KILLS = (("worker", 0.2), ("relay", 0.4))


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
    """Return whether no message is left: not in the outbox, not in the broker, not in a worker's hands."""
    from sqlalchemy import text

    from workers.app import BROKER_URL, app
    from workers.models import Session

    with Session() as session:
        if session.scalar(text("SELECT count(*) FROM catga_outbox")):
            return False
    held = held_by_nats if BROKER_URL.startswith("nats") else held_by_redis
    return not held(BROKER_URL, app.conf.task_default_queue)


def held_by_nats(url: str, queue: str) -> int:
    """Return how many messages NATS keeps: a stream has those that a worker holds, too."""
    import nats

    from catga_tasks.brokers.nats_settings import NatsSettings

    async def ask() -> int:
        client = await nats.connect(url)
        try:
            return int((await client.jetstream().stream_info(NatsSettings().stream(queue))).state.messages)
        finally:
            await client.close()

    return asyncio.run(ask())


def held_by_redis(url: str, queue: str) -> int:
    """Return how many messages Redis keeps, those that a worker holds among them."""
    import redis

    with redis.Redis.from_url(url) as client:
        return int(client.llen(queue)) + int(client.hlen("unacked"))


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
            staff.replace(kind, working_relay() if kind == "relay" else None)
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


def report(count: Audit, staff: Staff, seconds: float, *, database: str) -> Table:
    """Return the table of the counts."""
    table = Table("What", "Count", title=f"The audit, counted in {NAMES[database]}")
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
    console.print(report(count, staff, time.monotonic() - started, database=options.database))
    print(count.line, flush=True)
    return status


def main() -> int:
    """Read the options, run, and clean up whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m workers.demo")
    parser.add_argument("--orders", type=int, default=2000, help="how many orders are placed (2000)")
    parser.add_argument("--seed", type=int, default=1, help="which of them are rolled back")
    parser.add_argument("--database", choices=DATABASES, default="sqlite", help="where the shop and its outbox live")
    parser.add_argument("--broker", choices=BROKERS, default="nats", help="what brings the tasks to the workers")
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
