"""Who works? The workers and the relays: started, killed and replaced, and none left behind.

Each is a process of its own. It is forked from one that has imported Celery and the shop already, which saves it some
three seconds of a processor: where many are killed, most of the time would go to imports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workers.servers import die_with_parent

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

ROOT = Path(__file__).parent.parent
PRELOAD = ["celery.bin.celery", "celery.bin.worker", "celery.apps.worker", "workers.tasks", "workers.staff"]


@dataclass(frozen=True)
class Member:
    """A worker or a relay, which leads a process group with a log of its own."""

    kind: str
    process: BaseProcess

    @property
    def pid(self) -> int:
        """The process id of its main process."""
        assert self.process.pid is not None  # noqa: S101 - it was started
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether its main process runs."""
        return self.process.is_alive()

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to its main process, or to its children as well; to nobody if they have ended."""
        if self.alive:
            os.kill(self.pid, number)
        if group:
            # Its children may outlive it, and a stranger can't have the group's number while they do.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it and its children, those too that have outlived it."""
        self.signal(signal.SIGKILL, group=True)
        self.process.join()


@dataclass
class Staff:
    """The workers and the relays."""

    directory: Path
    killed: dict[str, int] = field(default_factory=lambda: {"worker": 0, "relay": 0})
    members: list[Member] = field(default_factory=list)
    #: Those that were replaced, and may have children left.
    former: list[Member] = field(default_factory=list)
    _count: int = 0

    def start(self, kind: str) -> Member:
        """Start a worker or a relay."""
        self._count += 1
        name = f"{kind}-{self._count}"
        options = ["--loglevel", "WARNING"]
        if kind == "worker":
            quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
            command = celery("worker", "--concurrency", "2", "-n", f"{name}@shop", *quiet, *options)
        else:
            command = celery("outbox", "relay", *options)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        # Who is killed leaves files in TMPDIR. PostgreSQL shows the application's name with each session.
        environment = {"TMPDIR": str(self.directory), "PGAPPNAME": kind}
        process = context.Process(target=_run, args=(command, environment, self.directory / f"{name}.log"))
        process.start()
        member = Member(kind, process)
        self.members.append(member)
        return member

    def of(self, kind: str) -> list[Member]:
        """Return the members of a kind that live, the eldest first."""
        return [member for member in self.members if member.kind == kind and member.alive]

    def replace(self, kind: str, pid: int | None = None) -> None:
        """SIGKILL the one with this process id, else the eldest of a kind, with its children; start another one."""
        some = self.of(kind)
        chosen = next((member for member in some if member.pid == pid), some[0])
        self.members.remove(chosen)
        chosen.kill()
        self.killed[kind] += 1
        self.start(kind)

    def check(self) -> None:
        """Raise if one has ended by itself."""
        for member in self.members:
            if not member.alive:
                raise RuntimeError(f"A {member.kind} ended with status {member.process.exitcode}.")

    def end(self) -> None:
        """Kill them all."""
        for member in (*self.members, *self.former):
            member.kill()

    def logs(self) -> str:
        """Return the ends of the logs."""
        found = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in found)


def celery(*arguments: str) -> list[str]:
    """Return the command line of `celery -A workers.app`."""
    return ["celery", "-A", "workers.app", *arguments]


def _run(command: list[str], environment: dict[str, str], path: Path) -> None:
    """Be this command, with a process group and a log of its own."""
    os.setsid()
    die_with_parent()
    os.environ.update(environment)
    os.chdir(ROOT)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, stream in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(stream, descriptor)
    from celery.__main__ import main

    sys.argv = command
    main()
