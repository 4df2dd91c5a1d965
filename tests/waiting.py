"""Waiting on a condition, with a deadline: no test sleeps and hopes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], *, deadline: float = 30, what: str = "the condition", every: float = 0.02
) -> T:
    """Return the first truthy value of `condition`; fail with `what` when `deadline` seconds are over."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"Not within {deadline:g} s: {what} (last seen: {value!r})")
        time.sleep(every)
