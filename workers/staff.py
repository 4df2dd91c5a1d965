"""The demo's workers and relays: started, killed and replaced, and none left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from workers.servers import die_with_parent

ROOT = Path(__file__).parent.parent


@dataclass
class Staff:
    """The workers and the relays, each a process group with a log of its own."""

    directory: Path
    killed: dict[str, int] = field(default_factory=lambda: {"worker": 0, "relay": 0})
    _running: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    _count: int = 0

    def start(self, kind: str) -> None:
        """Start a worker or a relay."""
        self._count += 1
        options = ["--loglevel", "WARNING"]
        if kind == "worker":
            quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
            command = celery("worker", "--concurrency", "2", "-n", f"worker-{self._count}@demo", *quiet, *options)
        else:
            command = celery("outbox", "relay", *options)
        with (self.directory / f"{kind}-{self._count}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.directory)},  # who is killed leaves files there
                start_new_session=True, preexec_fn=die_with_parent,  # noqa: PLW1509 - it takes no lock
            )  # fmt: skip
        self._running.append((kind, process))

    def replace(self, kind: str, pid: int | None = None) -> None:
        """SIGKILL the one with this process id, else the eldest of a kind, with its children; start another one."""
        some = [entry for entry in self._running if entry[0] == kind]
        chosen = next((entry for entry in some if entry[1].pid == pid), some[0])
        self._running.remove(chosen)
        kill(chosen[1])
        self.killed[kind] += 1
        self.start(kind)

    def check(self) -> None:
        """Raise if one has ended by itself."""
        for kind, process in self._running:
            if process.poll() is not None:
                raise RuntimeError(f"A {kind} ended with status {process.returncode}.")

    def end(self) -> None:
        """Kill them all."""
        for _, process in self._running:
            kill(process)

    def logs(self) -> str:
        """Return the ends of the logs."""
        found = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in found)


def celery(*arguments: str) -> list[str]:
    """Return the command line of `celery -A workers.app`."""
    return [sys.executable, "-m", "celery", "-A", "workers.app", *arguments]


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
