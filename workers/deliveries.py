"""How many messages did the broker hand to the workers, and how many of them more than once?

Each worker notes what it receives in one file that all of them append to. What is written there outlives a SIGKILL.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from celery.signals import task_received

if TYPE_CHECKING:
    from pathlib import Path


def note(path: str) -> None:
    """Let the workers of this process append the name of each message that they receive to the file."""
    # One write a line, at the file's end: lines of several processes don't mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def received(request: Any, **_: Any) -> None:
        message = request.request_dict
        # A retry and a replacement have their task's id, and are messages of their own.
        name = request.id, message.get("retries") or 0, message.get("replaced_task_nesting") or 0
        os.write(descriptor, (" ".join(map(str, name)) + "\n").encode())

    task_received.connect(received, weak=False)


class Deliveries:
    """What the workers have noted; `read` brings it up to date."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._messages: Counter[bytes] = Counter()
        self.total = 0

    def read(self) -> int:
        """Read what is new and return how many deliveries there were so far."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._messages.update(whole.splitlines())
            self.total += whole.count(b"\n")
        return self.total

    @property
    def duplicates(self) -> int:
        """Deliveries of a message that was delivered before."""
        return self.total - len(self._messages)
