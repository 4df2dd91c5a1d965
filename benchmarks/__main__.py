"""`make bench`: run the benchmarks and draw their table. `--markdown FILE` writes it, with the machine's facts."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bench import Row, servers

NAMES = (
    "enqueue", "tracing", "bulk", "relay", "latency", "claim", "consume", "nats", "worker", "inbox", "keys", "flower",
)  # fmt: skip
HEAD = ("", "catga_tasks", "the other", "ratio", "target", "met")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="run this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    console = Console(stderr=True)
    rows: list[Row] = []
    with servers() as bench:
        for name in options.only or NAMES:
            with console.status(f"{name} ..."):
                rows += import_module(f"benchmarks.{name}").run(bench, quick=options.quick)
    table = Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return 0


def cells(row: Row) -> tuple[str, ...]:
    met = {None: "", True: "yes", False: "no"}[row.met]
    return row.name, row.ours, row.theirs, row.ratio, row.target, met


def markdown(rows: list[Row]) -> str:
    """The table for docs/benchmarks/."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "SQLAlchemy", "psycopg", "redis"))
    machine = (
        f"`make bench` on {dt.datetime.now(tz=dt.UTC):%Y-%m-%d}: {os.cpu_count()} cores, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}. PostgreSQL 18 (fsync on) and Redis on "
        "the same machine, which is shared and noisy: read the ratios. Both sides took turns, except for latency and "
        "claim, which ran one after the other."
    )
    lines = [
        "# Results",
        "",
        machine,
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
        "The other is plain Celery on the same Redis, unless the row names something else.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
