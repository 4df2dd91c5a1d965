"""Which options has the NATS transport, and which names do queues have on the server?"""

from __future__ import annotations

import difflib
import re
import ssl
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Options of `broker_transport_options` that kombu, Celery and our relay read themselves.
_OTHERS = frozenset((
    "confirm_publish", "errback", "interval_max", "interval_start", "interval_step", "max_retries", "on_revive",
    "polling_interval", "queue_order_strategy", "socket_connect_timeout", "socket_timeout",
))  # fmt: skip
#: The longest name that the server takes.
NAME_LENGTH = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsSettings:
    """The options of `broker_transport_options`, validated. Times are seconds, sizes bytes; None means no limit."""

    #: What the names of streams and subjects begin with: applications with different ones don't see each other.
    stream_prefix: str = "celery"
    #: "file" or "memory".
    storage: str = "file"
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
    #: An outage that is over within this time goes unnoticed; a longer one is an error that Celery recovers from.
    reconnect_grace: float = 10.0
    ping_interval: float = 20.0
    client_name: str | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
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
        _choice("storage", self.storage, ("file", "memory"))
        _choice("discard", self.discard, ("new", "old"))
        _between("replicas", self.replicas, 1, 5)
        for name in ("compression", "tls_check_hostname"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        for name in ("duplicate_window", "ack_wait", "connect_timeout", "publish_timeout", "reconnect_wait",
                     "reconnect_grace", "ping_interval"):  # fmt: skip
            _seconds(name, getattr(self, name))
        for name in ("max_age", "max_msgs", "max_bytes", "max_msg_size", "max_deliver"):
            if getattr(self, name) is not None:
                _seconds(name, getattr(self, name))
        steps = self.priority_steps
        if not (steps and all(type(step) is int for step in steps) and list(steps) == sorted(set(steps))):
            _refuse("priority_steps", steps, "whole numbers that ascend, such as (0, 3, 6, 9)")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.stream_prefix):
            _refuse("stream_prefix", self.stream_prefix, "1 to 64 letters, digits, - or _")

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> NatsSettings:
        """Take the options of `broker_transport_options`; raise `ConfigurationError` for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known and name not in _OTHERS:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "docs/reference/nats.md lists them."
                message = f"broker_transport_options: nats:// has no option {name}; {hint}"
                raise ConfigurationError(message)
        given = {name: options[name] for name in known if name in options}
        for name in ("backoff", "priority_steps"):
            if name in given:
                given[name] = tuple(given[name])
        return cls(**given)

    def step(self, priority: int | None) -> int:
        """Return the step that a priority belongs to: the greatest one that isn't above it."""
        return self.priority_steps[max(0, bisect_right(self.priority_steps, priority or 0) - 1)]

    def stream(self, queue: str) -> str:
        """Return the name of a queue's stream; raise `ConfigurationError` if it gets too long."""
        name = f"{self.stream_prefix}-{escape(queue)}"
        if len(name) > NAME_LENGTH:
            message = (
                f"The queue's name {queue[:40]}... is too long for NATS: with its prefix and special characters "
                f"escaped it has {len(name)} characters, {NAME_LENGTH} are allowed."
            )
            raise ConfigurationError(message)
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


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(name, value, " or ".join(map(repr, choices)))


def _between(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"a whole number from {low} to {high}")


def _seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        _refuse(name, value, "a number above 0")


def _refuse(name: str, value: object, wanted: str) -> None:
    message = f"broker_transport_options: {name} must be {wanted}, not {value!r}."
    raise ConfigurationError(message)
