"""`celery -A app outbox dead ...`: look at dead letters, and replay or discard them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from catga_tasks import admin, steering
from catga_tasks.commands import (
    actor,
    as_json_option,
    chosen,
    command,
    connected,
    console_for_people,
    everything_option,
    letters,
    option,
    selecting,
    yes_option,
)

if TYPE_CHECKING:
    from catga_tasks.app import Catga
    from catga_tasks.selection import Selection


@click.group()
def dead() -> None:
    """Deal with dead letters: messages that used up their attempts."""


@command(dead, "list")
@selecting
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Rows to show at most.")
@as_json_option
def list_command(app: Catga, selection: Selection, *, limit: int, as_json: bool) -> None:
    """List dead letters, the latest first."""
    with connected(app) as connection:
        total = admin.count(connection, "catga_dead_letters", selection)
        found = admin.dead_letters(connection, selection, limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo("No dead letters.")
        return
    table = Table("id", "died at", "task", "queue", "attempts", "error", title=f"{total:,} dead letters")
    for row in found:
        texts = (str(row["id"]), row["died_at"][:19], row["task"], row["queue"], str(row["attempts"]), row["error"])
        table.add_row(*(escape(each) for each in texts))
    console = console_for_people()
    console.print(table)
    if total > len(found):
        console.print(f"{total - len(found):,} more: --limit shows them.")


@command(dead, "show")
@click.argument("number", type=int, metavar="ID")
@as_json_option
def show_command(app: Catga, number: int, *, as_json: bool) -> None:
    """Show one dead letter: its message and what became of each attempt."""
    with connected(app) as connection:
        found = admin.dead_letter(connection, number)
    if found is None:
        message = f"There is no dead letter {number}; `outbox dead list` shows those there are."
        raise click.ClickException(message)
    found["body"] = found["body"].decode("utf-8", "backslashreplace")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = console_for_people()
    headers = found["headers"] if isinstance(found["headers"], dict) else {}
    letter = Table(show_header=False, title=f"Dead letter {number}")
    for name in ("task", "task_id", "broker", "queue", "exchange", "routing_key", "priority", "created_at", "died_at"):
        letter.add_row(name, escape(str(found[name])))
    letter.add_row("args", escape(str(headers.get("argsrepr"))))
    letter.add_row("kwargs", escape(str(headers.get("kwargsrepr"))))
    letter.add_row("error", escape(found["error"]))
    console.print(letter)
    attempts = Table("attempt", "at", "error")
    for entry in found["history"] if isinstance(found["history"], list) else []:
        attempts.add_row(str(entry["attempt"]), str(entry["at"]), escape(str(entry["error"])))
    console.print(attempts)


@command(dead, "replay")
@selecting
@everything_option
@yes_option
def replay_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Put dead letters back into the outbox, to be published again."""
    with chosen(app, selection, "catga_dead_letters", "Replay", everything=everything, yes=yes) as connection:
        done = steering.replay(connection, selection, actor())
        left = admin.count(connection, "catga_dead_letters", selection)
    app.outbox.wake()
    click.echo(f"{done:,} dead {letters(done)} replayed.")
    if left:
        click.echo(f"{left:,} stay: other messages hold their unique keys.")


@command(dead, "discard")
@selecting
@everything_option
@yes_option
def discard_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Delete dead letters for good."""
    with chosen(app, selection, "catga_dead_letters", "Discard", everything=everything, yes=yes) as connection:
        done = steering.discard(connection, selection, actor())
    click.echo(f"{done:,} dead {letters(done)} discarded.")
