"""Processes that a test starts: killed, stopped and continued at will, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from workers.servers import die_with_parent

ROOT = Path(__file__).parent.parent


class Process:
    """One process in a group of its own, its output in a file."""

    def __init__(self, command: list[str], log: Path, *, env: dict[str, str] | None = None, cwd: Path | None = None):
        self.command = command
        self._log = log
        path = os.pathsep.join([str(cwd or ROOT), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                cwd=cwd or ROOT, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        if self.alive():
            self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGSTOP."""
        os.killpg(self.popen.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT."""
        os.killpg(self.popen.pid, signal.SIGCONT)

    def wait_exit(self, deadline: float = 30) -> int:
        try:
            return self.popen.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command} didn't end within {deadline:g} s:\n{self.log()[-3000:]}") from None


class Processes:
    """Starts processes and ends them all."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._started: list[Process] = []

    def start(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
        log = self._directory / f"process-{len(self._started)}.log"
        process = Process(list(command), log, env=env, cwd=cwd)
        self._started.append(process)
        return process

    def python(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
        return self.start(sys.executable, *arguments, env=env, cwd=cwd)

    def celery(self, app: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
        return self.python("-m", "celery", "-A", app, *arguments, env=env, cwd=cwd)

    def end(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                process.cont()
            process.kill()
