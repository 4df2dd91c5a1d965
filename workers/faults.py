"""How is a fault done to the shop, and how is it mended?

Who is killed is replaced at once, who is stopped goes on after a while, and a server comes back on the same data.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.proxy import Proxy
    from workers.schedule import Fault
    from workers.servers import PostgresServer, Server
    from workers.staff import Member, Staff

T = TypeVar("T")

#: Seconds that a worker or a relay may take to end after SIGTERM. It is killed then, which is counted. Celery's pool
#: waits 30 s for a child whose last results weren't counted.
GRACE = 45.0
#: Seconds that a fault waits for somebody to be there whom it can hit.
PATIENCE = 20.0


@dataclass
class Faults:
    """The faults that were done, and what is to be mended yet: call `mend` often."""

    staff: Staff
    broker: Server
    database: PostgresServer
    proxy: Proxy
    done: Counter[str] = field(default_factory=Counter)
    #: Workers and relays that ended by themselves, as when they start while a server is away.
    ended: int = 0
    #: Workers and relays that didn't end in `GRACE` seconds after SIGTERM.
    stuck: int = 0
    #: What is to be mended, and when.
    _mending: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    _leaving: list[tuple[float, Member]] = field(default_factory=list)
    _away: dict[int, Server] = field(default_factory=dict)

    def do(self, fault: Fault) -> None:
        """Do it."""
        verb, _, whom = fault.kind.partition(" to a ")
        if verb.startswith("SIG"):
            self._signal(signal.Signals[verb], whom, fault)
        elif fault.kind == "cut: all from the broker":
            self.proxy.cut()
        elif fault.kind.startswith("cut"):
            self._cut_sessions("worker" if "workers" in fault.kind else "relay")
        else:
            self._restart(self.broker if "broker" in fault.kind else self.database, fault.seconds)
        self.done[fault.kind] += 1

    def mend(self) -> None:
        """Let those go on whose time has come, and replace those that have ended."""
        now = time.monotonic()
        due = [work for moment, work in self._mending if moment <= now]
        self._mending = [entry for entry in self._mending if entry[0] > now]
        for work in due:
            work()
        for moment, member in list(self._leaving):
            if moment < now and member.alive:
                self.stuck += 1
                member.kill()
            if not member.alive:
                self._leaving.remove((moment, member))
        for member in list(self.staff.members):
            if not member.alive:
                self.ended += 1
                self._replace(member)

    def mend_all(self) -> None:
        """Mend all at once; those that are leaving may still take their time."""
        for _, work in self._mending:
            work()
        self._mending.clear()
        self.mend()

    def _signal(self, number: int, whom: str, fault: Fault) -> None:
        if whom == "pool child":
            child = self._some(self._children, fault.whom)
            if number == signal.SIGSTOP:
                self._later(fault.seconds, lambda: _send(child, signal.SIGCONT))
            _send(child, number)
            return
        kind, group = whom.partition(" ")[0], whom.endswith("pool")
        member = self._some(lambda: self.staff.of(kind), fault.whom)
        if number == signal.SIGSTOP:
            self._later(fault.seconds, lambda: member.signal(signal.SIGCONT, group=group))
        elif number == signal.SIGTERM:
            # One that is stopped would hear of it only later.
            member.signal(signal.SIGCONT, group=True)
        member.signal(number, group=group)
        if number == signal.SIGTERM:
            self._leaving.append((time.monotonic() + GRACE, member))
        if number != signal.SIGSTOP:
            self._replace(member)

    def _children(self) -> list[psutil.Process]:
        """Return the workers' pool children, in the order of their start."""
        found = []
        for worker in self.staff.of("worker"):
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(worker.pid).children()
        return [child for child in found if _lives(child)]

    def _some(self, living: Callable[[], Sequence[T]], number: int) -> T:
        """Return one of those that live; wait until there is one."""
        deadline = time.monotonic() + PATIENCE
        while not (found := living()):
            if time.monotonic() > deadline:
                raise RuntimeError("Nobody is left to be hit.")
            self.mend()
            time.sleep(0.05)
        return found[number % len(found)]

    def _replace(self, member: Member) -> None:
        self.staff.members.remove(member)
        self.staff.former.append(member)
        self.staff.start(member.kind)

    def _cut_sessions(self, application: str) -> None:
        """End these sessions in the database, if it is there."""
        engine = create_engine(self.database.url, poolclass=NullPool)
        statement = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")
        with suppress(DBAPIError), engine.connect() as connection:
            connection.execute(statement, {"name": application})

    def _restart(self, server: Server, seconds: float) -> None:
        if id(server) in self._away:
            # It is away already: it comes back, and goes again.
            self._return(server)
        self._away[id(server)] = server
        server.crash()
        self._later(seconds, lambda: self._return(server))

    def _return(self, server: Server) -> None:
        if self._away.pop(id(server), None) is not None:
            server.start()

    def _later(self, seconds: float, work: Callable[[], object]) -> None:
        self._mending.append((time.monotonic() + seconds, work))


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _send(process: psutil.Process, number: int) -> None:
    # It compares the time of its start: another process may have its number by now.
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
