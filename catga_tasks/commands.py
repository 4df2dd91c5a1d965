"""What do the commands of `celery -A app outbox` share? Options, confirmations, and errors in one line."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, CeleryOption
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import admin, migrate
from catga_tasks.app import Catga
from catga_tasks.audit import Actor
from catga_tasks.database import in_one_line
from catga_tasks.errors import CatgaError
from catga_tasks.selection import Selection, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from sqlalchemy import Connection


def _age(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Read a span of time such as 90, 90s, 15m, 2h or 7d; return seconds."""
    try:
        return None if value is None else seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def command(group: click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Register a command that is handed the application, and whose errors are one line each."""

    def register(function: Callable[..., None]) -> click.Command:
        @group.command(name, cls=CeleryCommand)
        @wraps(function)
        def run(**options: Any) -> None:
            try:
                function(application(click.get_current_context()), **options)
            except (CatgaError, SQLAlchemyError) as error:
                raise click.ClickException(in_one_line(error)) from None

        return run

    return register


def option(*names: str, **options: Any) -> Any:
    """Return a decorator that adds an option in Celery's style."""
    return click.option(*names, cls=CeleryOption, **options)


def selecting(function: Any) -> Any:
    """Add the options that select messages; the function gets them as one `Selection`."""

    @click.argument("ids", type=int, nargs=-1, metavar="[ID]...")
    @option("--task", help_group="Selection", help="Only this task.")
    @option("--queue", help_group="Selection", help="Only this queue.")
    @option(
        "--older-than", callback=_age, metavar="AGE", help_group="Selection", help="Only older ones: 90s, 15m, 2h, 7d."
    )
    @wraps(function)
    def select(
        app: Catga, ids: tuple[int, ...], task: str | None, queue: str | None, older_than: float | None, **options: Any
    ) -> None:
        function(app, Selection(ids=ids, task=task, queue=queue, older_than=older_than), **options)

    return select


max_age_option = option(
    "--max-age", callback=_age, default="5m", metavar="AGE", show_default=True,
    help="How long a message may have been due: 90s, 15m, 2h, 7d.",
)  # fmt: skip
as_json_option = option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
everything_option = option("--all", "everything", is_flag=True, help_group="Selection", help="All of them.")
yes_option = option("--yes", "-y", is_flag=True, help="Don't ask for a confirmation.")


@contextmanager
def chosen(
    app: Catga, selection: Selection, table: str, verb: str, *, everything: bool, yes: bool
) -> Iterator[Connection]:
    """Yield a transaction for a change of many rows, once their number was shown and confirmed."""
    if not selection and not everything:
        raise click.UsageError("Which ones? Give ids, --task, --queue, --older-than, or --all.")
    if selection and everything:
        raise click.UsageError("--all and a selection contradict each other: leave one out.")
    with connected(app) as connection:
        found = admin.count(connection, table, selection)
    where = "waiting messages" if table == "catga_outbox" else "dead letters"
    if not found:
        raise click.ClickException(f"No {where} match.")
    few = len(selection.ids) == 1 and found == 1
    if not yes and not few:
        click.confirm(f"{verb} {found:,} {where}?", abort=True)
    with app.outbox.engine.begin() as connection:
        yield connection


def actor() -> Actor:
    """Return who runs this command."""
    try:
        who = getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        who = f"user {os.getuid()}"
    return Actor(who, f"command line, {socket.gethostname()}")


@contextmanager
def connected(app: Catga) -> Iterator[Connection]:
    """Yield a connection to the outbox's database; raise `MigrationRequired` unless its tables are this release's."""
    with app.outbox.engine.connect() as connection:
        migrate.check(connection)
        yield connection


@contextmanager
def changing(app: Catga) -> Iterator[Connection]:
    """Yield a connection whose transaction is committed; raise `MigrationRequired` as `connected` does."""
    with connected(app) as connection:
        yield connection
        connection.commit()


def letters(number: int) -> str:
    """Return the noun that goes with so many."""
    return "letter" if number == 1 else "letters"


def application(context: click.Context) -> Catga:
    """Return the application of `-A`; raise `click.UsageError` if it isn't ours."""
    app = context.obj.app
    # `-A` may give a proxy of the current application.
    app = getattr(app, "_get_current_object", lambda: app)()
    if not isinstance(app, Catga):
        message = "-A must name a Catga application: put Catga(...) where Celery(...) is."
        raise click.UsageError(message)
    return app


def console_for_people() -> Console:
    """Return a console whose piped output isn't wrapped at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what ends one of Celery's own commands (`purge`, `call`, `report`) in one line, if it is an error of ours."""
    ours = next((each for each in (error, error.__cause__) if isinstance(each, CatgaError)), None)
    if ours is None:
        sys.__excepthook__(kind, error, trace)
    else:
        click.echo(f"Error: {in_one_line(ours)}", err=True)


# Who imports this is the command `celery`, to which the package's entry point adds its group.
sys.excepthook = _excepthook
