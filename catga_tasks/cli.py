"""`celery -A app outbox ...`: migrate, run a relay, see how things stand, and put right what doesn't go on."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import COMMA_SEPARATED_LIST, LOG_LEVEL, CeleryCommand
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import admin, health, holds, migrate, steering
from catga_tasks.commands import (
    actor,
    application,
    as_json_option,
    changing,
    chosen,
    command,
    connected,
    console_for_people,
    everything_option,
    max_age_option,
    option,
    selecting,
    yes_option,
)
from catga_tasks.database import in_one_line
from catga_tasks.dead_commands import dead
from catga_tasks.errors import CatgaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from catga_tasks.app import Catga
    from catga_tasks.selection import Selection

#: Exit statuses of `outbox status`.
HEALTHY, NO_RELAY, NO_DATABASE = 0, 1, 2


@click.group()
def outbox() -> None:
    """Look after the transactional outbox: its tables, its relay and its dead letters."""


outbox.add_command(dead)


@command(outbox, "migrate")
@option("--sql", is_flag=True, help="Print the statements instead of running them.")
@option("--check", is_flag=True, help="Change nothing; exit with 1 unless the tables are up to date.")
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


@command(outbox, "relay")
@option("--batch-size", type=click.IntRange(min=1), help="Rows to publish at a time (outbox_batch_size).")
@option("--queues", "-Q", type=COMMA_SEPARATED_LIST, help="Relay only these queues, comma-separated.")
@option("--once", is_flag=True, help="Publish what is due now, and end.")
@option("--loglevel", "-l", type=LOG_LEVEL, default="INFO", show_default="INFO", help="Logging level.")
@option("--logfile", "-f", help="Log to this file; to the terminal if left out.")
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


@command(outbox, "status")
@as_json_option
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


@command(outbox, "check")
@max_age_option
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=health.TIMEOUT,
    show_default=True,
    help="Seconds that the checks may take.",
)
@as_json_option
def check_command(app: Catga, *, max_age: float, timeout: float, as_json: bool) -> None:
    """Tell a probe whether a message could go through now.

    Asked are the database, its schema, the relays, the age of what waits, and, by a real round trip, the broker.

    Exit status: 0 it could, 1 it would wait in the outbox, 2 it couldn't even be enqueued.
    """
    found = health.check(app, max_age=max_age, timeout=timeout)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        for each in found.checks:
            click.echo(f"{'green' if each.ok else 'RED  '}  {each.name}: {each.detail}")
    click.get_current_context().exit(found.status)


@command(outbox, "pause")
@click.argument("queue")
@option("--broker", default="", metavar="NAME", help="One of outbox_brokers, instead of the application's own.")
def pause_command(app: Catga, *, queue: str, broker: str) -> None:
    """Let the messages of a queue wait: relays leave them in the outbox until it is resumed.

    Relays take it up within a second; the batch that one has in hand still goes.
    """
    if broker:
        app.catga_settings.broker(broker)
    with changing(app) as connection:
        done = steering.pause(connection, broker, queue, actor())
    click.echo(f"Queue {queue} is paused." if done else f"Queue {queue} was paused before.")


@command(outbox, "resume")
@click.argument("queue")
@option("--broker", default="", metavar="NAME", help="One of outbox_brokers, instead of the application's own.")
def resume_command(app: Catga, *, queue: str, broker: str) -> None:
    """Let a paused queue go on."""
    with changing(app) as connection:
        done = steering.resume(connection, broker, queue, actor())
    app.outbox.wake()
    click.echo(f"Queue {queue} goes on." if done else f"Queue {queue} wasn't paused.")


@command(outbox, "dev")
@option("--data", default=".catga", show_default=True, help="Folder of the broker's data.")
@option("--concurrency", "-c", type=click.IntRange(min=1), help="The worker's processes or threads.")
@option("--pool", "-P", help="The worker's pool: prefork, threads, solo.")
@option("--flower-port", type=int, default=5555, show_default=True, help="Port of Flower.")
@option("--no-flower", is_flag=True, help="Don't start Flower.")
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
    """Run Flower with an Outbox tab, and with the queues of nats:// on its Broker page.

    Its own options follow, such as --port=5555.
    """
    try:
        from flower.command import flower as program
    except ModuleNotFoundError:
        raise click.ClickException("Flower isn't installed: `pip install 'catga-tasks[flower]'`.") from None
    from catga_tasks import flower

    application(context)
    flower.install()
    context.invoke(program, tornado_argv=tornado_argv)


def _draw_status(found: dict[str, Any]) -> None:
    console = console_for_people()
    oldest = found["oldest_age_seconds"]
    totals = Table("pending", "scheduled", "waiting", "retrying", "dead", "published", "oldest due", title="Outbox")
    states = ("pending", "scheduled", "waiting", "retrying", "dead", "published")
    totals.add_row(*(f"{found[name]:,}" for name in states), "-" if oldest is None else f"{oldest:.1f} s")
    console.print(totals)
    if found["tasks"]:
        tasks = Table("broker", "queue", "task", "pending", "scheduled", "waiting", "retrying", "dead")
        for entry in found["tasks"]:
            names = (entry["broker"] or "-", entry["queue"], entry["task"])
            tasks.add_row(*(escape(name) for name in names), *(f"{entry[name]:,}" for name in states[:5]))
        console.print(tasks)
    if found["duplicates"]:
        duplicates = Table("task", "duplicates suppressed", "too old to tell", title="Inbox")
        for entry in found["duplicates"]:
            duplicates.add_row(escape(entry["task"]), f"{entry['suppressed']:,}", f"{entry['too_old']:,}")
        console.print(duplicates)
    for each in found["paused"]:
        where = f" of broker {each['broker']}" if each["broker"] else ""
        words = f"Queue {each['queue']}{where} is paused, by {each['paused_by']} {each['seconds']:.0f} s ago."
        console.print(escape(words), style="yellow")
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


@command(outbox, "history")
@click.argument("task_id", metavar="TASK_ID")
@as_json_option
def history_command(app: Catga, task_id: str, *, as_json: bool) -> None:
    """Show what became of a task: each attempt that a worker noted, and where its messages wait."""
    with connected(app) as connection:
        found = admin.history(connection, task_id)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        raise click.ClickException(
            f"Nothing is known of task {task_id}: it is with the broker or on a worker, or its task doesn't ask the "
            "inbox, or inbox_retention has passed."
        )
    table = Table("where", "task", "attempt", "state", "at", "error")
    for row in found:
        table.add_row(*(escape("-" if row[name] is None else str(row[name])) for name in row))
    console_for_people().print(table)


@command(outbox, "purge")
@selecting
@everything_option
@yes_option
def purge_command(app: Catga, selection: Selection, *, everything: bool, yes: bool) -> None:
    """Delete messages that wait in the outbox: they are never sent. What a relay has in hand is left alone."""
    with chosen(app, selection, "catga_outbox", "Purge", everything=everything, yes=yes) as connection:
        done = steering.purge(connection, selection, actor())
    click.echo(f"{done:,} {'message' if done == 1 else 'messages'} purged.")


@outbox.group()
def keys() -> None:
    """Look into the keys that keep messages in order (the option `key`)."""


@command(keys, "list")
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Rows to show at most.")
@as_json_option
def keys_command(app: Catga, *, limit: int, as_json: bool) -> None:
    """List the keys in use, the longest turns first: which message has its turn, and how many wait for it."""
    with connected(app) as connection:
        found = holds.turns(connection, limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table("key", "whose turn", "since", "waiting", title="Ordering keys")
    for row in found:
        table.add_row(escape(row["key"]), escape(row["task_id"]), f"{row['seconds']:.1f} s", f"{row['waiting']:,}")
    console_for_people().print(table)


@command(keys, "skip")
@click.argument("key")
@yes_option
def skip_command(app: Catga, key: str, *, yes: bool) -> None:
    """End the turn of the message that has it: the next one is sent.

    For a message that is gone, as with a broker that lost its data. If it comes after all, it isn't run.
    """
    if not yes:
        click.confirm(f"End the turn of the message that has it for {key}?", abort=True)
    with app.outbox.engine.begin() as connection:
        migrate.check(connection)
        passed_on = holds.skip(connection, key)
    if passed_on is None:
        raise click.ClickException(f"No message has the key {key}; `outbox keys list` shows those in use.")
    app.outbox.wake()
    click.echo("The next message is due." if passed_on else "No message waits for it.")
