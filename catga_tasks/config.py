"""Which settings are ours, and are their values right?"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from catga_tasks.errors import ConfigurationError

PREFIXES = ("outbox_", "inbox_")
DELIVERIES = ("at_most_once", "at_least_once", "effectively_once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Our settings, read once from Celery's configuration and validated. Times are seconds."""

    #: SQLAlchemy URL of the outbox's database; an alternative to `Catga(outbox=...)`.
    outbox_url: str | None = None
    #: Rows that a relay claims and publishes at a time.
    outbox_batch_size: int = 500
    #: Attempts at one message before it becomes a dead letter. An outage of the broker uses none up.
    outbox_max_attempts: int = 10
    #: The longest wait before the second attempt; it doubles with each one.
    outbox_retry_backoff: float = 1.0
    #: The cap of that wait.
    outbox_retry_backoff_max: float = 600.0
    #: Draw the wait evenly from zero to its ceiling.
    outbox_retry_jitter: bool = True
    #: How long the relay waits for the broker's confirmation.
    outbox_publish_timeout: float = 10.0
    #: After this long without a word, a relay's claim is void: its rows go to another one.
    outbox_lease_timeout: float = 30.0
    #: The longest pause between two looks at the table; a commit wakes the relay earlier.
    outbox_poll_interval_max: float = 1.0
    #: How long dead letters are kept; None keeps them until they are replayed or discarded.
    outbox_retention: float | None = None
    #: How long the inbox remembers a delivery: a duplicate that comes later runs again. None keeps it for ever.
    inbox_retention: float | None = 604800.0
    #: With `deduplicate=True`: after this long without a word from its worker, a message may be run by another one.
    inbox_lease: float = 60.0
    #: Other brokers by name, for the option `broker` of calls and routes: each a URL, or a dictionary with "url" and
    #: "transport_options".
    outbox_brokers: Mapping[str, Any] = field(default_factory=dict)
    #: Hide the arguments of messages in Flower's Outbox tab.
    outbox_mask_arguments: bool = False
    #: Refuse a task that is enqueued outside a joined transaction.
    outbox_require_transaction: bool = False
    #: The delivery of tasks that don't choose their own.
    task_delivery: str = "at_least_once"

    def __post_init__(self) -> None:
        for name in ("outbox_batch_size", "outbox_max_attempts"):
            _at_least_one(name, getattr(self, name))
        for name in (
            "outbox_retry_backoff",
            "outbox_retry_backoff_max",
            "outbox_publish_timeout",
            "outbox_lease_timeout",
            "outbox_poll_interval_max",
            "inbox_lease",
        ):
            _seconds(name, getattr(self, name))
        for name in ("outbox_retention", "inbox_retention"):
            if getattr(self, name) is not None:
                _seconds(name, getattr(self, name))
        for name in ("outbox_retry_jitter", "outbox_mask_arguments", "outbox_require_transaction"):
            _boolean(name, getattr(self, name))
        _url("outbox_url", self.outbox_url)
        _brokers(self.outbox_brokers)
        check_delivery("task_delivery", self.task_delivery)
        if self.outbox_lease_timeout <= self.outbox_publish_timeout:
            message = (
                f"outbox_lease_timeout ({self.outbox_lease_timeout:g} s) must be longer than outbox_publish_timeout "
                f"({self.outbox_publish_timeout:g} s): a relay that waits for the broker would lose its rows."
            )
            raise ConfigurationError(message)

    def broker(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return a named broker's URL and transport options; raise `ConfigurationError` for an unknown name."""
        found = self.outbox_brokers.get(name)
        if found is None:
            known = ", ".join(sorted(self.outbox_brokers)) or "none"
            message = f"broker={name!r} isn't one of outbox_brokers (which names {known})."
            raise ConfigurationError(message)
        if isinstance(found, str):
            return found, {}
        return found["url"], dict(found.get("transport_options", {}))

    @classmethod
    def read(cls, conf: Mapping[str, Any]) -> Settings:
        """Take our settings from Celery's configuration; raise `ConfigurationError` for an unknown one."""
        known = [each.name for each in fields(cls)]
        for name in _ours(conf):
            if name not in known:
                raise ConfigurationError(_unknown(name, known))
        return cls(**{name: conf[name] for name in known if name in conf})


def check_delivery(name: str, value: object) -> str:
    """Return `value` if it is a delivery that this release offers."""
    if value not in DELIVERIES:
        choices = " or ".join(repr(delivery) for delivery in DELIVERIES)
        message = f"{name} must be {choices}, not {value!r}."
        raise ConfigurationError(message)
    return str(value)


def _ours(conf: Mapping[str, Any]) -> list[str]:
    return [name for name in conf if isinstance(name, str) and name.startswith(PREFIXES)]


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(sorted(known))}."
    return f"Unknown setting {name}: {hint}"


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{name} must be a whole number of at least 1, not {value!r}."
        raise ConfigurationError(message)


def _seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        message = f"{name} must be a number of seconds above 0, not {value!r}."
        raise ConfigurationError(message)


def _url(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        message = f"{name} must be a SQLAlchemy URL such as 'postgresql+psycopg://localhost/shop'."
        raise ConfigurationError(message)


def _brokers(value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        message = "outbox_brokers must be a dictionary of brokers by name, such as {'mail': 'nats://127.0.0.1:4222'}."
        raise ConfigurationError(message)
    for name, broker in value.items():
        url, options = (
            (broker.get("url"), broker.get("transport_options", {})) if isinstance(broker, Mapping) else (broker, {})
        )
        unknown = set(broker) - {"url", "transport_options"} if isinstance(broker, Mapping) else ()
        # A name stands where Celery takes a URL, as in `celery -b mail worker`.
        if unknown or "://" in name or not isinstance(url, str) or "://" not in url or not isinstance(options, Mapping):
            # What it is isn't said: it may hold a password.
            message = (
                f"outbox_brokers[{name!r}] must be a URL such as 'nats://127.0.0.1:4222', or a dictionary with 'url' "
                "and 'transport_options'; its name is no URL."
            )
            raise ConfigurationError(message)


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        message = f"{name} must be True or False, not {value!r}."
        raise ConfigurationError(message)
