"""Is it time to end? Ctrl-C and SIGTERM are noted, and asked for where it is safe to end."""

from __future__ import annotations

import signal
from typing import ClassVar


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""

    #: The signals that came. They are noted, not raised: an exception amid a fork or a lock leaves both broken.
    signals: ClassVar[list[int]] = []

    @classmethod
    def note(cls) -> None:
        """Note these signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: cls.signals.append(number))

    @classmethod
    def check(cls) -> None:
        """Raise if a signal came."""
        if cls.signals:
            raise cls
