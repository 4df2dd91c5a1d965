"""Which thread does nats-py live on, and how does it tell the others that something has come?

It lives on one private loop thread of the process. What has come waits in a buffer, and makes a file descriptor
readable that kombu's hub and `drain_events` wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading


class LoopThread:
    """The loop thread of this process; a forked child starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running loop."""
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="catga-nats", daemon=True).start()
            return self._loop

    def forget(self) -> None:
        """Drop a parent's loop without touching its sockets."""
        self._lock = threading.Lock()
        self._loop = None


loop_thread = LoopThread()
os.register_at_fork(after_in_child=loop_thread.forget)


class Bell:
    """A file descriptor that is readable when something has come."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rung = False

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._read

    def ring(self) -> None:
        """Make it readable."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):
                os.write(self._write, b"x")

    def quieten(self) -> None:
        """Make it unreadable until it rings next; look into the buffers after it.

        The flag falls last: what comes in between rings no more, and is in a buffer by then.
        """
        with contextlib.suppress(OSError):
            os.read(self._read, 4096)
        self._rung = False

    def close(self) -> None:
        """Close both ends. Who rings later rings nobody: the numbers are some other file's by then."""
        both, self._read, self._write = (self._read, self._write), -1, -1
        for descriptor in both:
            with contextlib.suppress(OSError):
                os.close(descriptor)
