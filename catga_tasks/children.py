"""Which processes run under this one, what do they print, and how do they end?"""

from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds that children have to end before they are killed.
GRACE = 10.0
_PR_SET_PDEATHSIG = 1
_COLOURS = {
    "dev": "bold", "nats": "magenta", "migrate": "blue", "relay": "cyan", "worker": "green", "flower": "yellow",
}  # fmt: skip


@dataclass
class Part:
    """One child: what it is started with, and what became of it. `ready` is what it prints when it is."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""
    ready: re.Pattern[str] | None = None
    shown: re.Pattern[str] = re.compile("")
    is_ready: bool = False
    rest: bytes = b""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it in a session of its own: a terminal's Ctrl-C is for us alone, and its group can be killed."""
        parent = os.getpid()

        def tie() -> None:
            die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        self.process = subprocess.Popen(  # noqa: S603 - commands of ours
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            start_new_session=True,
            preexec_fn=tie,  # noqa: PLW1509 - it takes no lock
        )
        os.set_blocking(self._output, False)

    @property
    def _output(self) -> int:
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        return self.process.stdout.fileno()

    def lines(self) -> list[str]:
        """Return the lines that it has printed since the last call."""
        with suppress(BlockingIOError):
            for _ in range(16):
                self.rest += os.read(self._output, 65536)
        *whole, self.rest = self.rest.split(b"\n")
        found = [line.decode(errors="replace").rstrip() for line in whole if line.strip()]
        self.tail.extend(found)
        return found

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it, or to it and its own children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number) if group else self.process.send_signal(number)


class Team:
    """The children, their output, and the signals that end them."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.console = Console(highlight=False, soft_wrap=True)
        self._asked = 0
        self._ended: Part | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._end()
        finally:
            for part in self.parts:
                part.signal(signal.SIGKILL, group=True)
                part.process.wait()
            for number, handler in self._former.items():
                signal.signal(number, handler)

    @property
    def status(self) -> int:
        """Return the exit status: that of the child that ended by itself, 0 if none did."""
        code = 0 if self._ended is None else self._ended.process.returncode
        return code if code >= 0 else 128 - code

    def is_ready(self) -> bool:
        """Return whether all parts are."""
        return all(part.is_ready for part in self.parts)

    def start(self, part: Part) -> None:
        """Start a part."""
        part.start()
        self.parts.append(part)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Show what the children print; return True once the condition holds, False if it is time to end."""
        while True:
            self._show(0.1)
            if self._asked:
                return False
            for part in self.parts:
                if part.process.poll() is not None:
                    self._ended = part
                    return False
            if condition():
                return True

    def say(self, name: str, text: str, style: str = "bold") -> None:
        """Print a line of a part."""
        try:
            self.console.print(Text.assemble((f"{name:<7} ", _COLOURS[name]), (text, style)))
        except OSError:  # the terminal is gone
            self._asked = self._asked or 1

    def _show(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for part in self.parts:
                if part.process.poll() is None:
                    selector.register(part.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            selector.select(seconds)
        for part in self.parts:
            for line in part.lines():
                if part.ready and not part.is_ready and part.ready.search(line):
                    part.is_ready = True
                    self.say(part.name, f"ready: {part.address}" if part.address else "ready")
                elif part.shown.search(line):
                    self.say(part.name, line, "")
            part.is_ready |= part.ready is None

    def _ask(self, _number: int, _frame: object) -> None:
        self._asked += 1

    def _end(self) -> None:
        """SIGTERM to all, the broker last; SIGKILL to whom it takes too long, or at the second signal."""
        if self._ended is not None:
            self._show(0)
            self._report(self._ended)
        elif self._asked:
            self.say("dev", f"ending, {GRACE:g} s for tasks that run; once more ends them at once")
        patience = self._asked + 1
        self._stop(self.parts[1:], patience)
        self._stop(self.parts[:1], patience)
        self._show(0)
        if self.parts:
            self.say("dev", "ended")

    def _report(self, part: Part) -> None:
        """Say which part ended by itself and, unless it was killed, what it printed last."""
        if part.process.returncode < 0:
            name = signal.Signals(-part.process.returncode).name
            self.say("dev", f"{part.name} was killed by {name}: everything ends, with status {self.status}", "bold red")
            return
        self.say("dev", f"{part.name} ended with status {self.status}; it printed last:", "bold red")
        for line in part.tail:
            self.say(part.name, line, "red")

    def _stop(self, parts: list[Part], patience: int) -> None:
        for part in parts:
            part.signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while any(part.process.poll() is None for part in parts):
            if time.monotonic() > deadline or self._asked >= patience:
                break
            self._show(0.1)
        for part in parts:
            if part.process.poll() is None:
                self.say("dev", f"{part.name} is killed; what it had in hand is done again at the next start")
            part.signal(signal.SIGKILL, group=True)


def die_with_parent(**_: object) -> None:
    """Ask Linux to end this process when the one that started it dies."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
