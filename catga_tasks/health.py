"""Could a message go through now? Each check has a name, and none takes longer than it may.

What a check says holds no address and no password: probes' answers are read by many.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks import liveness, migrate, outbox
from catga_tasks.brokers.generic import describe
from catga_tasks.errors import BrokerUnavailable, CatgaError, MigrationRequired

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from catga_tasks.app import Catga

#: A message may have been due for so long, in seconds, and no check takes longer than the second.
MAX_AGE, TIMEOUT = 300.0, 5.0
#: What `outbox check` exits with: a message goes through; it waits in the outbox; it can't even be enqueued.
HEALTHY, DEGRADED, DOWN = 0, 1, 2
_ENQUEUE = ("database", "schema")
#: Redis' word for what is wrong, at the beginning of its answer.
_REDIS_CODE = re.compile(r"(?:^|error: )([A-Z]{4,})\b")


@dataclass(frozen=True)
class Check:
    """One check: whether it is green, why not or how so, and the seconds that it took."""

    name: str
    ok: bool
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Health:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> int:
        """HEALTHY, DEGRADED or DOWN."""
        red = [check.name for check in self.checks if not check.ok]
        if not red:
            return HEALTHY
        return DOWN if any(name in _ENQUEUE for name in red) else DEGRADED

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"healthy": self.status == HEALTHY, "status": self.status, "checks": [asdict(c) for c in self.checks]}


def check(app: Catga, *, max_age: float = MAX_AGE, timeout: float = TIMEOUT) -> Health:
    """Ask the database and each broker, all at once; what hasn't answered after `timeout` seconds is red."""
    brokers = ("", *app.catga_settings.outbox_brokers)
    groups: dict[tuple[str, ...], Callable[[], list[Check]]] = {
        (*_ENQUEUE, "relay", "age"): lambda: _database(app, brokers, max_age, timeout),
        **{(_named("broker", name),): partial(_broker, app, name) for name in brokers},
    }
    answers: dict[tuple[str, ...], list[Check]] = {}
    deadline = time.monotonic() + timeout

    def run(names: tuple[str, ...], work: Callable[[], list[Check]]) -> None:
        answers[names] = work()

    # Daemons: one that hangs must not keep the program from its end.
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in groups.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = f"no answer within {timeout:g} s"
    found = [
        answers.get(names) or [Check(name, ok=False, detail=silent, seconds=timeout) for name in names]
        for names in groups
    ]
    return Health(tuple(each for group in found for each in group))


def _database(app: Catga, brokers: Sequence[str], max_age: float, timeout: float) -> list[Check]:
    started = time.monotonic()
    done: list[Check] = []
    steps: dict[str, Callable[[Connection], str]] = {
        "database": _answers,
        "schema": _schema,
        "relay": lambda connection: _relay(connection, brokers),
        "age": lambda connection: _age(connection, max_age),
    }
    try:
        with app.outbox.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SET LOCAL statement_timeout = {int(timeout * 1000)}"))
            for name, step in steps.items():
                done.append(_made(name, partial(step, connection)))
                if not done[-1].ok and name in _ENQUEUE:
                    break
    except Exception as error:  # noqa: BLE001 - whatever it is, it is red
        if not done:
            done.append(Check("database", ok=False, detail=_words(error), seconds=time.monotonic() - started))
    skipped = [name for name in steps if name not in {check.name for check in done}]
    return [*done, *(Check(name, ok=False, detail=f"not asked: {done[-1].name} is red") for name in skipped)]


def _broker(app: Catga, broker: str) -> list[Check]:
    def probe() -> str:
        publisher = app.publisher(broker)
        try:
            publisher.probe([app.conf.task_default_queue] if broker else sorted(app.amqp.queues))
        finally:
            publisher.close()
        return "a message could go through"

    return [_made(_named("broker", broker), probe)]


def _made(name: str, work: Callable[[], str]) -> Check:
    started = time.monotonic()
    try:
        detail, ok = work(), True
    except Exception as error:  # noqa: BLE001 - whatever it is, it is red
        detail, ok = _words(error), False
    return Check(name, ok=ok, detail=detail, seconds=round(time.monotonic() - started, 4))


def _answers(connection: Connection) -> str:
    connection.execute(text("SELECT 1"))
    return "answers"


def _schema(connection: Connection) -> str:
    migrate.check(connection)
    return "up to date"


def _relay(connection: Connection, brokers: Sequence[str]) -> str:
    alive = {str(relay["broker"]) for relay in liveness.alive(connection)}
    missing = [broker or "the application's own broker" for broker in brokers if broker not in alive]
    if missing:
        raise _Red(f"no relay is alive for {', '.join(missing)}: start one with `celery -A <your app> outbox relay`")
    return "alive"


def _age(connection: Connection, max_age: float) -> str:
    age = outbox.oldest_age(connection)
    if age is not None and age > max_age:
        message = f"a message has been due for {age:.0f} s, more than {max_age:g} s"
        raise _Red(message)
    return "nothing is due" if age is None else f"the longest due message has been due for {age:.1f} s"


class _Red(CatgaError):
    """A check's own verdict."""


def _words(error: BaseException) -> str:
    """Say what is wrong without an address: our own words, else the error's kind."""
    if isinstance(error, (_Red, MigrationRequired)):
        return str(error)
    if isinstance(error, BrokerUnavailable) and error.__cause__ is not None:
        error = error.__cause__
        words = describe(error).partition(": ")[2]
        code = _REDIS_CODE.search(words)
        if words.startswith(("NATS: ", "NATS has no JetStream")):
            return words
        return f"no message can go through ({type(error).__name__}{': ' + code[1] if code else ''})"
    if isinstance(error, SQLAlchemyError):
        return f"the database doesn't answer ({type(getattr(error, 'orig', None) or error).__name__})"
    return f"can't be checked ({type(error).__name__})"


def _named(check: str, broker: str) -> str:
    return f"{check}:{broker}" if broker else check
