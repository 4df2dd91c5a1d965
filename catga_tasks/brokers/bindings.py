"""Which stored queues are bound to which exchange, for all processes? And which subjects does an exchange have?

Bindings live in a key-value bucket on the server, and a watched copy in each process that asks. A queue that isn't
stored needs none: the exchange's own subjects reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any

from nats import errors
from nats.js import errors as js_errors

from catga_tasks.brokers.nats_settings import escape

if TYPE_CHECKING:
    from catga_tasks.brokers.jetstream import Connection
    from catga_tasks.brokers.nats_settings import NatsSettings

#: Between two tries to watch the bindings after a reconnect, in seconds.
PAUSE_SECONDS = 0.25
#: After this long without its watcher the server forgets a watch, in seconds.
FORGOTTEN_SECONDS = 30.0
#: One binding: the exchange's type, the routing key, the queue.
Binding = tuple[str, str, str]


class Bindings:
    """The bindings of one connection's `stream_prefix`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = f"{connection.settings.stream_prefix}-bindings"
        self._store: Any = None
        self._following: asyncio.Task[None] | None = None
        self._found: dict[str, tuple[str, Binding]] = {}

    def of(self, exchange: str) -> list[Binding]:
        """Return the exchange's bindings."""
        self._open()
        return [binding for name, binding in list(self._found.values()) if name == exchange]

    def add(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Store a binding, unless it is."""
        self._open()
        key, value = _key(exchange, routing_key, queue), (exchange, (kind, routing_key, queue))
        if self._found.get(key) != value:
            self._connection.call(self._store.put(key, json.dumps([exchange, kind, routing_key, queue]).encode()))
            self._found[key] = value

    def remove(self, exchange: str, routing_key: str, queue: str) -> None:
        """Delete a binding."""
        self._open()
        key = _key(exchange, routing_key, queue)
        if self._found.pop(key, None):
            self._connection.call(self._store.delete(key))

    def forget(self, queue: str) -> None:
        """Delete the bindings of a queue."""
        self._open()
        for exchange, (_, routing_key, bound) in list(self._found.values()):
            if bound == queue:
                self.remove(exchange, routing_key, queue)

    def _open(self) -> None:
        if self._following is None:
            self._connection.call(self._watch())

    async def _watch_again(self) -> None:
        """Look at all of them: the server forgets who watches when it ends."""
        while True:
            with contextlib.suppress(errors.Error, TimeoutError):
                await self._watch()
                return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _watch(self) -> None:
        js = self._connection.js
        try:
            self._store = await js.key_value(self._bucket)
        except js_errors.NotFoundError:
            self._store = await js.create_key_value(
                bucket=self._bucket, replicas=self._connection.settings.replicas, history=1
            )
        watcher = await self._store.watchall(inactive_threshold=FORGOTTEN_SECONDS)
        found: dict[str, tuple[str, Binding]] = {}
        # The bucket's content comes first, and an empty word after it.
        async for entry in watcher:
            if entry is None:
                break
            _take(found, entry)
        self._found = found
        if self._following is None:
            self._connection.returning.append(self._watch_again)
        else:
            self._following.cancel()
        self._following = self._connection.background(self._follow(watcher))

    async def _follow(self, watcher: Any) -> None:
        try:
            async for entry in watcher:
                if entry is not None:
                    _take(self._found, entry)
        finally:
            with contextlib.suppress(errors.Error):
                await watcher.stop()


def _take(found: dict[str, tuple[str, Binding]], entry: Any) -> None:
    if entry.operation in ("DEL", "PURGE"):
        found.pop(entry.key, None)
    else:
        exchange, kind, routing_key, queue = json.loads(entry.value)
        found[entry.key] = (exchange, (kind, routing_key, queue))


def wire_subject(settings: NatsSettings, exchange: str, routing_key: str) -> str:
    """Return the subject of a message that goes to queues that aren't stored."""
    if not exchange:
        return f"{settings.stream_prefix}.t.{escape(routing_key)}"
    return f"{settings.stream_prefix}.x.{escape(exchange)}.{'.'.join(_words(routing_key))}"


def subjects_of(settings: NatsSettings, exchange: str, kind: str, routing_key: str) -> list[str]:
    """Return the subjects that a binding listens to; more may come on them than it wants, see `wanted`.

    A topic's `#` stands for any number of words, none included; NATS' `>` for one or more, at the end alone. So
    `a.#` listens to `a` and `a.>`.
    """
    base = f"{settings.stream_prefix}.x.{escape(exchange)}"
    if kind == "fanout":
        return [f"{base}.>"]
    words = [word if kind == "topic" and word in ("*", "#") else escape(word) or "_" for word in routing_key.split(".")]
    if "#" not in words:
        return [f"{base}.{'.'.join(words)}"]
    before = words[: words.index("#")]
    return [".".join([base, *before, ">"]), *([".".join([base, *before])] if before else [])]


def wanted(kind: str, pattern: str, routing_key: str) -> bool:
    """Return whether a binding takes a message, by the rules of AMQP 0-9-1 (3.1.3)."""
    if kind == "fanout":
        return True
    if kind == "direct":
        return pattern == routing_key
    return _matches(pattern.split("."), routing_key.split("."))


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[start:]) for start in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])


def _words(routing_key: str) -> list[str]:
    return [escape(word) or "_" for word in routing_key.split(".")]


def _key(exchange: str, routing_key: str, queue: str) -> str:
    digest = hashlib.sha256(routing_key.encode()).hexdigest()[:16]
    return f"{escape(exchange)}.{escape(queue)}.{digest}"
