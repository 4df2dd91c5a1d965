"""Which keys does a message hold, by its task's options and its call's?

`unique` keeps a second message with the same key from being sent, `key` keeps messages with the same key in order. The
keys ride in the message's headers, so that whoever ends it knows what it lets go of, and its retries hold on to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from catga_tasks.errors import ConfigurationError

#: Headers: [key, until, seconds] of a unique message, and the key of one that keeps its order.
UNIQUE, ORDER = "catga_unique", "catga_key"
#: How long a unique key is held at most, in seconds, unless `period` says otherwise: nothing is blocked for ever.
LONGEST = 86400.0
#: Characters in a key: an index holds them.
LONGEST_KEY = 500
_UNTIL = ("start", "end")
#: The types in the first header.
_UNIQUE_HEADER = ([str, str, float], [str, str, int])


class Unique(NamedTuple):
    """What `unique=` says, read and checked."""

    by: str | Callable[..., Any] = "arguments"
    #: "start", "end" or "period".
    until: str = "end"
    seconds: float = LONGEST


class Keys(NamedTuple):
    """What a message holds. `fresh`: it has still to take it; otherwise it goes on with what it has."""

    unique: str | None = None
    until: str = "end"
    seconds: float = LONGEST
    order: str | None = None
    fresh: bool = True

    def __bool__(self) -> bool:
        return self.unique is not None or self.order is not None

    def headers(self) -> dict[str, Any]:
        """Return the headers that say so."""
        headers: dict[str, Any] = {}
        if self.unique is not None:
            headers[UNIQUE] = [self.unique, self.until, self.seconds]
        if self.order is not None:
            headers[ORDER] = self.order
        return headers


def read_headers(headers: Mapping[str, Any]) -> Keys:
    """Return what the message of these headers holds."""
    order, unique = headers.get(ORDER), headers.get(UNIQUE)
    found = Keys(order=order if isinstance(order, str) else None, fresh=False)
    if not isinstance(unique, list) or list(map(type, unique)) not in _UNIQUE_HEADER:
        # There is none, or it is somebody else's.
        return found
    key, until, seconds = unique
    return found._replace(unique=key, until=until, seconds=float(seconds))


def read_unique(name: str, value: Any) -> Unique | None:
    """Check `unique=` of the task or call that `name` describes; raise `ConfigurationError`."""
    if value is None or value is False:
        return None
    if isinstance(value, Unique):
        return value
    if value is True:
        return Unique()
    if not isinstance(value, Mapping) or set(value) - {"by", "until", "period"}:
        raise ConfigurationError(
            f"{name}: unique must be True, or a dictionary with by, until and period, such as "
            f"{{'by': 'task', 'until': 'start'}}, not {value!r:.80}."
        )
    by, until, period = value.get("by", "arguments"), value.get("until"), value.get("period")
    if by not in ("task", "arguments") and not callable(by):
        raise ConfigurationError(
            f"{name}: unique's by must be 'task', 'arguments' or a function of the arguments, not {by!r:.80}."
        )
    if until is not None and until not in _UNTIL:
        raise ConfigurationError(f"{name}: unique's until must be 'start' or 'end', not {until!r:.80}.")
    if period is not None and (
        isinstance(period, bool) or not isinstance(period, (int, float)) or not 0 < period < float("inf")
    ):
        raise ConfigurationError(f"{name}: unique's period must be a number of seconds above 0, not {period!r:.80}.")
    if until is None:
        until = "end" if period is None else "period"
    return Unique(by, until, LONGEST if period is None else float(period))


def check_key(name: str, value: Any) -> str:
    """Return the key if it is one."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_KEY or "\0" in value:
        raise ConfigurationError(f"{name} must be a string of 1 to {LONGEST_KEY} characters, not {value!r:.80}.")
    return value
