"""Does every committed task take effect exactly once, whatever is killed, stopped, cut or restarted on the way?

`make chaos SEED=7 FAULTS=1000`: the shop under load on PostgreSQL, over NATS and over Redis, side by side. The faults
are drawn from the seed, and the audit at the end is SQL. Status 1 if anything was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import sys
import zlib
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from workers.interrupts import Interrupted
from workers.schedule import KINDS, schedule
from workers.servers import die_with_parent
from workers.trial import BROKERS, Outcome, perform

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess

NAMES = {"nats": "NATS", "redis": "Redis"}


def table(outcomes: list[Outcome], *, seed: int, faults: int) -> Table:
    """Return the table of all numbers, with a column for each broker."""
    # Two runs with the same seed show the same mark.
    mark = zlib.crc32(repr(schedule(seed, faults)).encode())
    found = Table("What", title=f"Chaos on PostgreSQL, seed {seed}, schedule {mark:08x}")
    for outcome in outcomes:
        found.add_column(NAMES[outcome.broker], justify="right")
    for kind in KINDS:
        found.add_row(kind, *(str(outcome.faults.get(kind, 0)) for outcome in outcomes))
    found.add_section()
    for name in outcomes[0].counts:
        found.add_row(name, *(str(outcome.counts[name]) for outcome in outcomes))
    found.add_section()
    for name in outcomes[0].verdict:
        numbers = [outcome.verdict[name] for outcome in outcomes]
        found.add_row(name, *map(str, numbers), style="bold red" if any(numbers) else "bold")
    return found


def line(outcomes: list[Outcome]) -> str:
    """Return all brokers' numbers that matter in one line."""

    def total(name: str) -> int:
        return sum({**outcome.counts, **outcome.verdict}[name] for outcome in outcomes)

    return (
        f"{total('Faults')} faults, {total('Deliveries')} deliveries, {total('Duplicates seen by the broker')} "
        f"duplicates, {total('Duplicates suppressed by the inbox')} suppressed, {total('Lost')} lost, "
        f"{total('Doubled')} doubled"
    )


def tell(outcome: Outcome, console: Console) -> None:
    """Say what went wrong."""
    for effect, number in sorted(outcome.missing.items()):
        console.print(f"{NAMES[outcome.broker]}: {effect}: {number} missing.")
    if outcome.problem:
        console.print(f"{NAMES[outcome.broker]}: {outcome.problem}.")
    console.print(f"{NAMES[outcome.broker]}: the logs are in {outcome.logs}")


def _try(broker: str, seed: int, faults: int, outcomes: Any) -> None:
    """Try the shop over one broker, in a process of its own: an application has one."""
    die_with_parent()
    Interrupted.note()
    with contextlib.suppress(Interrupted):
        outcomes.put(perform(broker, seed, schedule(seed, faults)))


def _gather(processes: Sequence[BaseProcess], outcomes: Any) -> list[Outcome]:
    """Return what the processes say; raise `Interrupted`, or `RuntimeError` if one of them fails."""
    found: list[Outcome] = []
    while len(found) < len(processes):
        Interrupted.check()
        with contextlib.suppress(queue.Empty):
            found.append(outcomes.get(timeout=0.2))
        if any(process.exitcode for process in processes):
            raise RuntimeError("A trial failed; its error stands above.")
    return sorted(found, key=lambda outcome: outcome.broker)


def run(brokers: list[str], seed: int, faults: int) -> int:
    """Try the brokers side by side, print the table and return the exit status."""
    console = Console()
    names = " and over ".join(NAMES[broker] for broker in brokers)
    console.print(f"The shop on PostgreSQL over {names}: {faults} faults each, drawn from seed {seed}.")
    context = multiprocessing.get_context("spawn")
    outcomes: Any = context.Queue()
    processes = [context.Process(target=_try, args=(broker, seed, faults, outcomes)) for broker in brokers]
    try:
        for process in processes:
            process.start()
        found = _gather(processes, outcomes)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()
    for outcome in found:
        if outcome.failed:
            tell(outcome, console)
    console.print(table(found, seed=seed, faults=faults))
    print(line(found), flush=True)
    return 1 if any(outcome.failed for outcome in found) else 0


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m workers.chaos")
    parser.add_argument("--seed", type=int, default=7, help="what the faults and the orders are drawn from (7)")
    parser.add_argument("--faults", type=int, default=1000, help="how many, over each broker (1000)")
    parser.add_argument("--broker", choices=BROKERS, help="one of them alone; both without it")
    options = parser.parse_args()
    Interrupted.note()
    try:
        return run([options.broker] if options.broker else list(BROKERS), options.seed, options.faults)
    except Interrupted:
        return 128 + Interrupted.signals[0]


if __name__ == "__main__":
    sys.exit(main())
