"""`celery -A app outbox ...`: migrate, run a relay, see how things stand, and deal with dead letters."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import COMMA_SEPARATED_LIST, LOG_LEVEL, CeleryCommand, CeleryOption
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import admin, migrate
from catga_tasks.admin import Selection
from catga_tasks.app import Catga
from catga_tasks.database import in_one_line
from catga_tasks.errors import CatgaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

#: Exit statuses of `outbox status`.
HEALTHY, NO_RELAY, NO_DATABASE = 0, 1, 2
#: Seconds in an age's units.
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _age(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Read a span of time such as 90, 90s, 15m, 2h or 7d; return seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not an age; write 90s, 15m, 2h or 7d.")
    return float(found[1]) * _UNITS[found[2]]


def _command(group: click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Register a command that is handed the application, and whose errors are one line each."""

    def register(function: Callable[..., None]) -> click.Command:
        @group.command(name, cls=CeleryCommand)
        @wraps(function)
        def run(**options: Any) -> None:
            try:
                function(_application(click.get_current_context()), **options)
            except (CatgaError, SQLAlchemyError) as error:
                raise click.ClickException(in_one_line(error)) from None

        return run

    return register


def _option(*names: str, **options: Any) -> Any:
    return click.option(*names, cls=CeleryOption, **options)


def _selecting(function: Any) -> Any:
    """Add the options that select messages; the function gets them as one `Selection`."""

    @click.argument("ids", type=int, nargs=-1, metavar="[ID]...")
    @_option("--task", help_group="Selection", help="Only this task.")
    @_option("--queue", help_group="Selection", help="Only this queue.")
    @_option(
        "--older-than", callback=_age, metavar="AGE", help_group="Selection", help="Only older ones: 90s, 15m, 2h, 7d."
    )
    @wraps(function)
    def select(
        app: Catga, ids: tuple[int, ...], task: str | None, queue: str | None, older_than: float | None, **options: Any
    ) -> None:
        function(app, Selection(ids=ids, task=task, queue=queue, older_than=older_than), **options)

    return select


_as_json = _option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_everything = _option("--all", "everything", is_flag=True, help_group="Selection", help="All of them.")
_yes = _option("--yes", "-y", is_flag=True, help="Don't ask for a confirmation.")


@click.group()
def outbox() -> None:
    """Look after the transactional outbox: its tables, its relay and its dead letters."""


@_command(outbox, "migrate")
@_option("--sql", is_flag=True, help="Print the statements instead of running them.")
@_option("--check", is_flag=True, help="Change nothing; exit with 1 unless the tables are up to date.")
def migrate_command(app: Catga, *, sql: bool, check: bool) -> None:
    """Bring the outbox's tables to what this release needs."""
    engine = app.outbox.engine
    if sql:
        click.echo(migrate.sql(engine.dialect.name))
    elif check:
        with engine.connect() as connection:
            migrate.check(connection)
        click.echo("The outbox's tables are up to date.")
    else:
        before, after = migrate.upgrade(engine)
        same = f"The outbox's tables are up to date, at revision {after}."
        click.echo(same if before == after else f"The outbox's tables went from {before or 'nothing'} to {after}.")


@_command(outbox, "relay")
@_option("--batch-size", type=click.IntRange(min=1), help="Rows to publish at a time (outbox_batch_size).")
@_option("--queues", "-Q", type=COMMA_SEPARATED_LIST, help="Relay only these queues, comma-separated.")
@_option("--once", is_flag=True, help="Publish what is due now, and end.")
@_option("--loglevel", "-l", type=LOG_LEVEL, default="INFO", show_default="INFO", help="Logging level.")
@_option("--logfile", "-f", help="Log to this file; to the terminal if left out.")
def relay_command(
    app: Catga, *, batch_size: int | None, queues: list[str] | None, once: bool, loglevel: Any, logfile: str | None
) -> None:
    """Bring committed messages to the broker, until SIGTERM or SIGINT.

    The first signal lets the batch in hand end; a second one ends the relay at once. Any number of relays may run
    side by side.
    """
    with app.outbox.engine.connect() as connection:
        migrate.check(connection)
    app.log.setup_logging_subsystem(loglevel, logfile)
    logging.getLogger("catga_tasks").setLevel(loglevel)
    relay = app.relay(queues=[name for name in queues or () if name], batch_size=batch_size)
    with _signals(relay.stop):
        if once:
            click.echo(f"{relay.run_once()} published.")
        else:
            relay.run()


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """End cleanly at the first SIGTERM or SIGINT, and at once at the second."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def handle(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, lambda second, _frame: os._exit(128 + second))
        logging.getLogger("catga_tasks.relay").info(
            "%s: the batch in hand is finished first; once more ends it at once.", signal.Signals(number).name
        )
        stop()

    former = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@_command(outbox, "status")
@_as_json
def status_command(app: Catga, *, as_json: bool) -> None:
    """Show what waits, what failed, and which relays are alive.

    Exit status: 0 all is well, 1 messages are due and no relay is alive, 2 the database can't be asked.
    """
    context = click.get_current_context()
    try:
        with app.outbox.engine.connect() as connection:
            migrate.check(connection)
            found = admin.status(connection)
    except (CatgaError, SQLAlchemyError) as error:
        click.echo(
            json.dumps({"error": in_one_line(error)}) if as_json else f"Error: {in_one_line(error)}", err=not as_json
        )
        context.exit(NO_DATABASE)
    waiting = found["oldest_age_seconds"] is not None
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _draw_status(found)
    context.exit(NO_RELAY if waiting and not found["relays"] else HEALTHY)


@_command(outbox, "dev")
@_option("--data", default=".catga", show_default=True, help="Folder of the broker's data.")
@_option("--concurrency", "-c", type=click.IntRange(min=1), help="The worker's processes or threads.")
@_option("--pool", "-P", help="The worker's pool: prefork, threads, solo.")
@_option("--flower-port", type=int, default=5555, show_default=True, help="Port of Flower.")
@_option("--no-flower", is_flag=True, help="Don't start Flower.")
def dev_command(
    app: Catga, *, data: str, concurrency: int | None, pool: str | None, flower_port: int, no_flower: bool
) -> None:
    """Run everything in this terminal, with an embedded NATS server as the broker: for development."""
    from catga_tasks import dev

    context = click.get_current_context()
    name, flower = context.find_root().params["app"], None if no_flower else flower_port
    context.exit(dev.run(app, name, data=data, concurrency=concurrency, pool=pool, flower=flower))


@outbox.command("flower", cls=CeleryCommand, context_settings={"ignore_unknown_options": True})
@click.argument("tornado_argv", nargs=-1, type=click.UNPROCESSED, metavar="[FLOWER OPTIONS]...")
@click.pass_context
def flower_command(context: click.Context, tornado_argv: tuple[str, ...]) -> None:
    """Run Flower, whose Broker page knows nats:// then. Its own options follow, such as --port=5555."""
    try:
        from flower.command import flower as program
    except ModuleNotFoundError:
        raise click.ClickException("Flower isn't installed: `pip install 'catga-tasks[flower]'`.") from None
    from catga_tasks import flower

    _application(context)
    flower.install()
    context.invoke(program, tornado_argv=tornado_argv)


def _draw_status(found: dict[str, Any]) -> None:
    console = _console()
    oldest = found["oldest_age_seconds"]
    totals = Table("pending", "scheduled", "retrying", "dead", "published", "oldest due", title="Outbox")
    states = ("pending", "scheduled", "retrying", "dead", "published")
    totals.add_row(*(f"{found[name]:,}" for name in states), "-" if oldest is None else f"{oldest:.1f} s")
    console.print(totals)
    if found["tasks"]:
        tasks = Table("broker", "queue", "task", "pending", "scheduled", "retrying", "dead")
        for entry in found["tasks"]:
            names = (entry["broker"] or "-", entry["queue"], entry["task"])
            tasks.add_row(*(escape(name) for name in names), *(f"{entry[name]:,}" for name in states[:4]))
        console.print(tasks)
    if not found["relays"]:
        console.print("No relay is alive: start one with `celery -A <your app> outbox relay`.", style="red")
        return
    relays = Table("relay", "broker", "queues", "last heartbeat", "published")
    for each in found["relays"]:
        queues = ", ".join(each["queues"]) or "all"
        relays.add_row(
            each["id"],
            escape(each["broker"] or "-"),
            escape(queues),
            f"{each['heartbeat_age_seconds']:.1f} s ago",
            f"{each['published']:,}",
        )
    console.print(relays)


@outbox.group()
def dead() -> None:
    """Deal with dead letters: messages that used up their attempts."""


@_command(dead, "list")
@_selecting
@_option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Rows to show at most.")
@_as_json
def list_command(app: Catga, selection: Selection, *, limit: int, as_json: bool) -> None:
    """List dead letters, the latest first."""
    with _connected(app) as connection:
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
    console = _console()
    console.print(table)
    if total > len(found):
        console.print(f"{total - len(found):,} more: --limit shows them.")


@_command(dead, "show")
@click.argument("number", type=int, metavar="ID")
@_as_json
def show_command(app: Catga, number: int, *, as_json: bool) -> None:
    """Show one dead letter: its message and what became of each attempt."""
    with _connected(app) as connection:
        found = admin.dead_letter(connection, number)
    if found is None:
        message = f"There is no dead letter {number}; `outbox dead list` shows those there are."
        raise click.ClickException(message)
    found["body"] = found["body"].decode("utf-8", "backslashreplace")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = _console()
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


@_command(dead, "replay")
@_selecting
@_everything
@_yes
def replay_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Put dead letters back into the outbox, to be published again."""
    with _chosen(app, selection, "catga_dead_letters", "Replay", everything=everything, yes=yes) as connection:
        done = admin.replay(connection, selection)
    app.outbox.wake()
    click.echo(f"{done:,} dead {_letters(done)} replayed.")


@_command(dead, "discard")
@_selecting
@_everything
@_yes
def discard_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Delete dead letters for good."""
    with _chosen(app, selection, "catga_dead_letters", "Discard", everything=everything, yes=yes) as connection:
        done = admin.discard(connection, selection)
    click.echo(f"{done:,} dead {_letters(done)} discarded.")


@_command(outbox, "purge")
@_selecting
@_everything
@_yes
def purge_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Delete messages that wait in the outbox: they are never sent. What a relay has in hand is left alone."""
    with _chosen(app, selection, "catga_outbox", "Purge", everything=everything, yes=yes) as connection:
        done = admin.purge(connection, selection)
    click.echo(f"{done:,} {'message' if done == 1 else 'messages'} purged.")


@contextmanager
def _chosen(
    app: Catga, selection: Selection, table: str, verb: str, *, everything: bool, yes: bool
) -> Iterator[Connection]:
    """Yield a transaction for a change of many rows, once their number was shown and confirmed."""
    if not selection and not everything:
        raise click.UsageError("Which ones? Give ids, --task, --queue, --older-than, or --all.")
    if selection and everything:
        raise click.UsageError("--all and a selection contradict each other: leave one out.")
    with _connected(app) as connection:
        found = admin.count(connection, table, selection)
    where = "waiting messages" if table == "catga_outbox" else "dead letters"
    if not found:
        raise click.ClickException(f"No {where} match.")
    few = len(selection.ids) == 1 and found == 1
    if not yes and not few:
        click.confirm(f"{verb} {found:,} {where}?", abort=True)
    with app.outbox.engine.begin() as connection:
        yield connection


@contextmanager
def _connected(app: Catga) -> Iterator[Connection]:
    with app.outbox.engine.connect() as connection:
        migrate.check(connection)
        yield connection


def _letters(number: int) -> str:
    return "letter" if number == 1 else "letters"


def _application(context: click.Context) -> Catga:
    app = context.obj.app
    # `-A` may give a proxy of the current application.
    app = getattr(app, "_get_current_object", lambda: app)()
    if not isinstance(app, Catga):
        message = "-A must name a Catga application: put Catga(...) where Celery(...) is."
        raise click.UsageError(message)
    return app


def _console() -> Console:
    # Piped output isn't wrapped at 80 columns.
    console = Console()
    return console if console.is_terminal else Console(width=200)
