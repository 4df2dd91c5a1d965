"""When is a failed message tried again?"""

from __future__ import annotations

import random


def ceiling(attempt: int, *, base: float, maximum: float) -> float:
    """Return the longest wait in seconds before try number `attempt` + 1: exponential, capped.

    `attempt` counts from 1. The exponent is bounded so that a count of thousands can't overflow.
    """
    return min(maximum, base * 2.0 ** min(attempt - 1, 62))


def delay(attempt: int, *, base: float, maximum: float, jitter: bool = True) -> float:
    """Return the wait in seconds before the next try.

    With `jitter` it is drawn evenly from zero to the ceiling ("full jitter", M. Brooker, "Exponential Backoff
    And Jitter", AWS Architecture Blog, 2015), which spreads out messages that failed together.
    """
    longest = ceiling(attempt, base=base, maximum=maximum)
    return random.uniform(0, longest) if jitter else longest
