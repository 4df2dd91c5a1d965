"""Which options has the NATS transport, and which names do queues have on the server?"""

from __future__ import annotations

import difflib
import re
import ssl
from bisect import bisect_right
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    _Check = Callable[[str, object], None]

#: Options of `broker_transport_options` that kombu, Celery and our relay read themselves.
_OTHERS = frozenset((
    "confirm_publish", "errback", "interval_max", "interval_start", "interval_step", "max_retries", "on_revive",
    "polling_interval", "queue_order_strategy", "socket_connect_timeout", "socket_timeout",
))  # fmt: skip
#: The longest name that the server takes.
NAME_LENGTH = 255
#: The longest time, in seconds: some thirty years.
_LONGEST = 1e9


class NameTooLong(ConfigurationError):
    """A queue can't be, for its stream's name would be longer than the server takes."""


class Secret:
    """A password among a connection's options. Celery shows those: in `inspect stats`, and so in Flower."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __json__(self) -> str:
        """Return what kombu's JSON has instead."""
        return "**"

    def __repr__(self) -> str:
        # kombu tells connections apart by it.
        return f"<secret {hash(self.value)}>"


def hidden(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with their secrets as such."""
    return {
        name: Secret(value) if name in ("password", "token") and isinstance(value, str) else value
        for name, value in options.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsSettings:
    """The options of `broker_transport_options`, validated. Times are seconds, sizes bytes; None means no limit."""

    #: What the names of streams and subjects begin with: applications with different ones don't see each other.
    stream_prefix: str = "celery"
    #: "file" or "memory".
    storage: str = "file"
    #: "workqueue": a message goes when it is acknowledged; "limits": it stays until `max_age`.
    retention: str = "workqueue"
    #: Copies of each message in a cluster, 1 to 5.
    replicas: int = 1
    #: Compress streams on the server (s2).
    compression: bool = False
    #: How long a message is kept.
    max_age: float | None = None
    #: Limits of one queue's stream. What is over them is refused (discard "new") or drops the oldest ("old").
    max_msgs: int | None = None
    max_bytes: int | None = None
    max_msg_size: int | None = None
    discard: str = "new"
    #: How long the server remembers a message's id: the same id is stored once.
    duplicate_window: float = 120.0
    #: After this long without a word from its worker, a message is delivered again.
    ack_wait: float = 30.0
    #: Deliveries of one message before it becomes a dead letter.
    max_deliver: int | None = None
    #: Waits before a message that was given back is delivered again: the first, the second, ... the last repeats.
    backoff: tuple[float, ...] = ()
    #: Unacknowledged messages of a queue, of all workers together; -1: as many as they prefetch.
    max_ack_pending: int = -1
    #: Priorities that have a place of their own, the first one is served first.
    priority_steps: tuple[int, ...] = (0, 3, 6, 9)
    connect_timeout: float = 5.0
    #: How long a publish waits for the server's confirmation.
    publish_timeout: float = 10.0
    #: Between two tries to reconnect.
    reconnect_wait: float = 0.25
    #: So many tries that fail make an outage an error, also before reconnect_grace is over.
    reconnect_attempts: int | None = None
    #: An outage that is over within this time goes unnoticed; a longer one is an error that Celery recovers from.
    reconnect_grace: float = 10.0
    ping_interval: float = 20.0
    client_name: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    #: Path of a file with an nkey's seed.
    nkey: str | None = None
    #: Path of a .creds file.
    credentials: str | None = None
    #: Refuse a server whose certificate names another host.
    tls_check_hostname: bool = True
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name in _NEEDED:
                check(name, value)
        if (self.user is None) != (self.password is None):
            raise ConfigurationError("broker_transport_options: user and password come together, or neither does.")
        if self.retention == "limits" and self.max_age is None:
            raise ConfigurationError(
                "broker_transport_options: retention='limits' needs max_age, or a queue gets full."
            )
        if self.tls_key_file and not self.tls_cert_file:
            raise ConfigurationError("broker_transport_options: tls_key_file is of no use without tls_cert_file.")

    @property
    def access(self) -> dict[str, str]:
        """The credentials, by nats-py's names."""
        found = {
            "user": self.user, "password": self.password, "token": self.token, "nkeys_seed": self.nkey,
            "user_credentials": self.credentials,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> NatsSettings:
        """Take the options of `broker_transport_options`; raise `ConfigurationError` for an unknown one."""
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known and name not in _OTHERS:
                # What it is called with Redis is like nothing here.
                near = difflib.get_close_matches({"visibility_timeout": "ack_wait"}.get(name, str(name)), known, n=1)
                hint = f"did you mean {near[0]}?" if near else "docs/reference/nats.md lists them."
                message = f"broker_transport_options: nats:// has no option {name}; {hint}"
                raise ConfigurationError(message)
        given = {name: options[name] for name in known if name in options}
        given |= {name: value.value for name, value in given.items() if isinstance(value, Secret)}
        for name in ("backoff", "priority_steps"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)

    def step(self, priority: Any) -> int:
        """Return the step that a priority belongs to: the greatest one that isn't above it. What is no number is 0."""
        if type(priority) is not int:
            try:
                priority = int(priority or 0)
            except (TypeError, ValueError):
                priority = 0
        return self.priority_steps[max(0, bisect_right(self.priority_steps, priority) - 1)]

    def stream(self, queue: str) -> str:
        """Return the name of a queue's stream; raise `NameTooLong` if it gets too long."""
        name = f"{self.stream_prefix}-{escape(queue)}"
        if len(name) > NAME_LENGTH:
            message = (
                f"The queue's name {queue[:40]}... is too long for NATS: with its prefix and special characters "
                f"escaped it has {len(name)} characters, {NAME_LENGTH} are allowed."
            )
            raise NameTooLong(message)
        return name

    @property
    def dead_stream(self) -> str:
        """The name of the stream of dead letters, which no queue's stream can have."""
        return f"{self.stream_prefix}_dead"

    def subject(self, queue: str, step: int | None = None) -> str:
        """Return the subject of a queue's messages with this priority; of all its messages without one."""
        return f"{self.stream_prefix}.q.{escape(queue)}.{'*' if step is None else step}"

    def tls(self) -> ssl.SSLContext:
        """Return the TLS context; raise `ConfigurationError` for files that can't be read."""
        try:
            context = ssl.create_default_context(cafile=self.tls_ca_file)
            context.check_hostname = self.tls_check_hostname
            if self.tls_cert_file:
                context.load_cert_chain(self.tls_cert_file, self.tls_key_file)
        except (OSError, ssl.SSLError) as error:
            message = f"tls_ca_file, tls_cert_file or tls_key_file can't be used: {error}"
            raise ConfigurationError(message) from None
        return context


@lru_cache(maxsize=4096)
def escape(name: str) -> str:
    """Write a name with the characters that streams and subjects allow; `=XX` stands for each byte of the others."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"_-" else f"={byte:02X}"  # noqa: PLR2004 - ASCII
        for byte in name.encode()
    )


def _choice(*choices: str) -> _Check:
    def check(name: str, value: object) -> None:
        if value not in choices:
            _refuse(name, value, " or ".join(map(repr, choices)))

    return check


def _whole(low: int, high: int, wanted: str, *others: int) -> _Check:
    def check(name: str, value: object) -> None:
        if type(value) is not int or not (low <= value <= high or value in others):
            _refuse(name, value, wanted)

    return check


def _seconds(low: float, wanted: str) -> _Check:
    def check(name: str, value: object) -> None:
        if not _is_number(value) or not low <= value <= _LONGEST:
            _refuse(name, value, wanted)

    return check


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "True or False")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        # It may be a secret.
        raise ConfigurationError(
            f"broker_transport_options: {name} must be a string that isn't empty, not a {type(value).__name__}."
        )


def _prefix(name: str, value: object) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value)):
        _refuse(name, value, "1 to 64 letters, digits, - or _")


def _waits(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(_is_number(wait) and 0 <= wait <= _LONGEST for wait in value):
        _refuse(name, value, "a list of numbers of seconds, such as [1, 10, 60]")


def _steps(name: str, value: object) -> None:
    steps = value if isinstance(value, tuple) else ()
    if not steps or not all(type(step) is int for step in steps) or list(steps) != sorted(set(steps)):
        _refuse(name, value, "whole numbers that ascend, such as (0, 3, 6, 9)")


def _refuse(name: str, value: object, wanted: str) -> None:
    message = f"broker_transport_options: {name} must be {wanted}, not {value!r}."
    raise ConfigurationError(message)


_pause = _seconds(1e-3, "a number above 0")
_kept = _seconds(0.1, "a number of seconds, at least 0.1")
_limit = _whole(1, 2**63 - 1, "a whole number above 0")
_CHECKS: dict[str, _Check] = {
    "stream_prefix": _prefix,
    "storage": _choice("file", "memory"),
    "retention": _choice("workqueue", "limits"),
    "replicas": _whole(1, 5, "a whole number from 1 to 5"),
    "compression": _flag,
    "max_age": _kept,
    "max_msgs": _limit,
    "max_bytes": _limit,
    "max_msg_size": _whole(1, 2**31 - 1, "a whole number from 1 to 2147483647"),
    "discard": _choice("new", "old"),
    "duplicate_window": _kept,
    "ack_wait": _pause,
    "max_deliver": _limit,
    "reconnect_attempts": _limit,
    "backoff": _waits,
    "max_ack_pending": _whole(1, 2**31 - 1, "a whole number above 0, or -1", -1),
    "priority_steps": _steps,
    **dict.fromkeys(
        ("connect_timeout", "publish_timeout", "reconnect_wait", "reconnect_grace", "ping_interval"), _pause
    ),
    **dict.fromkeys(("client_name", "user", "password", "token", "nkey", "credentials"), _text),
    "tls_check_hostname": _flag,
    **dict.fromkeys(("tls_ca_file", "tls_cert_file", "tls_key_file"), _text),
}
_NEEDED = frozenset(each.name for each in fields(NatsSettings) if each.default is not None)
