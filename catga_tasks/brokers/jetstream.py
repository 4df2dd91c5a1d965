"""A connection to NATS JetStream that any thread may use.

Other threads hand the loop thread work: a call waits for its answer, an acknowledgement is only posted. What arrives
waits in buffers, and rings the bell.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import re
import weakref
from typing import TYPE_CHECKING, Any

from nats import errors
from nats.aio.client import Client as NatsClient
from nkeys import NkeysError

from catga_tasks.brokers.dead import DeadLetters
from catga_tasks.brokers.loop import Bell, loop_thread
from catga_tasks.brokers.nats_errors import NoTLS, Unreachable, translated
from catga_tasks.brokers.publishing import Publishing
from catga_tasks.brokers.settling import Settling
from catga_tasks.brokers.streams import Streams
from catga_tasks.errors import CatgaError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from nats.aio.msg import Msg

    from catga_tasks.brokers.nats_settings import NatsSettings
    from catga_tasks.brokers.nats_url import Address
    from catga_tasks.brokers.pulling import Pull

logger = logging.getLogger("catga_tasks.nats")

#: The first release of nats-server that knows all that streams are made with.
OLDEST = (2, 10)


class Client(NatsClient):
    """nats-py's client, which doesn't go on in plain text, and hands on at once what needs no task to be woken."""

    def __init__(self) -> None:
        super().__init__()
        #: By a subscription's number: who takes its messages without headers, by their subject and data.
        self.direct: dict[int, Callable[[bytes, bytes], None]] = {}

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT001, FBT002 - nats-py's signature
        """Refuse a server, or somebody in between, without TLS: nats-py would send it the password all the same."""
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise NoTLS
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """Take nats-py's way through a queue and a task only with what isn't taken here."""
        take = None if headers else self.direct.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            take(subject, data)


class Connection:
    """One connection. `broken` is set once an outage has lasted too long."""

    def __init__(self, address: Address, settings: NatsSettings) -> None:
        self.settings = settings
        self.broken: Unreachable | None = None
        self.nats = Client()
        self.js: Any = None
        self.pid = os.getpid()
        self._address = address
        self.loop = loop_thread.loop()
        self.bell = Bell()
        self.settling = Settling(self)
        self.publishing = Publishing(self)
        self.pulls: set[Pull] = set()
        self.streams = Streams(self)
        self.dead = DeadLetters(self)
        self._grace: asyncio.TimerHandle | None = None
        self._first_error: asyncio.Future[None] | None = None
        self._closing = False
        #: What is to be done when the connection is back after an outage.
        self.returning: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._endless: set[asyncio.Task[None]] = set()
        self._under_way: set[asyncio.Task[None]] = set()
        self._tries = 0
        #: What waits for an answer, and why it won't come.
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._denied: Exception | None = None

    # Any thread

    def connect(self) -> None:
        """Connect; raise `Unreachable`, `AccessRefused` or `ConfigurationError`."""
        try:
            self.call(self._connect(), self.settings.connect_timeout + 1)
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def call(self, work: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Run the coroutine on the loop thread and return its result; raise kombu's kinds of errors."""
        if self.pid != os.getpid():
            work.close()
            raise Unreachable("This connection to NATS is another process's: it was made before a fork.")
        seconds = timeout or self.settings.publish_timeout
        denied = self._denied
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        self._calls.add(future)
        if self._denied is not denied:
            # The server was faster than this thread.
            future.cancel()
        try:
            return future.result(seconds)
        except concurrent.futures.CancelledError:
            raise self._denied or Unreachable("The connection to NATS was closed.") from None
        except concurrent.futures.TimeoutError as error:
            if future.done() and not future.cancelled():
                raise translated(error) from error
            future.cancel()
            message = f"NATS didn't answer within {seconds:g} s."
            raise Unreachable(message) from None
        except (errors.Error, OSError, EOFError, NkeysError) as error:
            raise translated(error) from error
        finally:
            self._calls.discard(future)

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the coroutine on the loop thread for as long as the connection lives. From the loop thread."""
        task = asyncio.ensure_future(work)
        self._endless.add(task)
        task.add_done_callback(self._endless.discard)
        return task

    def finish(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run the coroutine on the loop thread; `close` waits for its end. From the loop thread."""
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def ring_in(self, seconds: float) -> None:
        """Ring the bell after a while."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.call_later, seconds, self.bell.ring)

    @property
    def usable(self) -> bool:
        """Whether it is this process's own, and open."""
        return not self._closing and self.pid == os.getpid()

    def close(self) -> None:
        """Give back what was not settled, and disconnect. A forked child only drops its copy."""
        if self._closing:
            return
        self._closing = True
        if self.pid == os.getpid():
            with contextlib.suppress(CatgaError, concurrent.futures.CancelledError):
                self.call(self._close(), 5)
        self.bell.close()

    # The loop thread

    async def _connect(self) -> None:
        self._first_error = asyncio.get_running_loop().create_future()
        connecting = asyncio.ensure_future(self.nats.connect(**self._options()))
        try:
            await asyncio.wait_for(
                asyncio.wait({connecting, self._first_error}, return_when=asyncio.FIRST_COMPLETED),
                self.settings.connect_timeout,
            )
        except TimeoutError:
            message = f"NATS didn't answer within {self.settings.connect_timeout:g} s (connect_timeout)."
            raise Unreachable(message) from None
        finally:
            if not connecting.done():
                connecting.cancel()
            first_error, self._first_error = self._first_error, None
        if first_error.done():
            first_error.result()
        await connecting
        self._check_version()
        self.js = self.nats.jetstream(timeout=self.settings.publish_timeout)
        await self.settling.start()
        await self.publishing.start()
        self.background(self._beat())

    def _check_version(self) -> None:
        """Refuse a server that would ignore what it doesn't know of a stream's settings."""
        version = str(self.nats._server_info.get("version"))
        found = re.match(r"(\d+)\.(\d+)", version)
        if found and (int(found[1]), int(found[2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ConfigurationError(f"The NATS server's version is {version}: nats:// needs {oldest} or newer.")

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "servers": list(self._address.servers),
            "name": settings.client_name or f"catga-{os.getpid()}",
            "connect_timeout": settings.connect_timeout,
            "reconnect_time_wait": settings.reconnect_wait,
            "max_reconnect_attempts": -1,
            "ping_interval": settings.ping_interval,
            # They are ours, and escaped.
            "skip_subject_validation": True,
            "error_cb": self._failed,
            "disconnected_cb": self._disconnected,
            "reconnected_cb": self._reconnected,
            # The server's own list of its cluster has none, and nats-py doesn't decode a URL's.
            **(settings.access or self._address.credentials),
        }
        for name in ("nkey", "credentials"):
            path = getattr(settings, name)
            if path is not None and not os.access(path, os.R_OK):
                message = f"broker_transport_options: the file {name}={path!r} can't be read."
                raise ConfigurationError(message)
        if self._address.tls or settings.tls_ca_file or settings.tls_cert_file:
            options["tls"] = settings.tls()
        return {name: value for name, value in options.items() if value is not None}

    async def _failed(self, error: Exception) -> None:
        if self._first_error is not None and not self._first_error.done():
            # While connecting for the first time, nats-py would go on for minutes.
            self._tries += 1
            problem = translated(error)
            if self.nats._server_info.get("tls_verify") and not self.settings.tls_cert_file:
                problem = ConfigurationError(
                    "The NATS server wants a client's certificate: set tls_cert_file and tls_key_file."
                )
            if isinstance(problem, ConfigurationError) or self._tries >= len(self._address.servers):
                self._first_error.set_exception(problem)
            return
        if "ermissions" in str(error):
            self._deny(translated(error))
        elif self._grace is not None:
            self._tries += 1
            if self._tries == self.settings.reconnect_attempts:
                self._give_up(f"NATS didn't come back in {self._tries} tries (reconnect_attempts).")
        logger.debug("NATS: %s", type(error).__name__)

    def _deny(self, error: Exception) -> None:
        """End what waits: the server says by the way that it takes no such request, and never answers it."""
        if str(error) != str(self._denied):
            logger.error("%s", error)
        self._denied = error
        for future in list(self._calls):
            future.cancel()

    async def _disconnected(self) -> None:
        if not self._closing and self._grace is None:
            logger.warning("The connection to NATS is lost; it is made again.")
            self._tries = 0
            seconds = self.settings.reconnect_grace
            words = f"NATS was away for more than {seconds:g} s (reconnect_grace)."
            self._grace = self.loop.call_later(seconds, self._give_up, words)

    async def _reconnected(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        logger.warning("The connection to NATS is back.")
        await self.settling.send_again()
        await self.publishing.send_again()
        for pull in self.pulls:
            pull.reset()
        for work in self.returning:
            # Not here: nats-py takes an error for another outage.
            self.background(work())

    def _give_up(self, words: str) -> None:
        self.broken = self.broken or Unreachable(words)
        self.bell.ring()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.ack_wait / 3)
            await self.settling.say_in_progress()
            for pull in self.pulls:
                pull.check()

    async def _close(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
        await self.give_back()
        ending = {*self._endless, *self._under_way}
        for task in ending:
            task.cancel()
        if ending:
            # They unsubscribe, as long as there is a connection.
            await asyncio.wait(ending, timeout=1)
        with contextlib.suppress(Exception):
            await self.nats.close()

    async def give_back(self) -> None:
        """Send the acknowledgements that wait, and give back what is still held."""
        if self.nats.is_connected:
            with contextlib.suppress(errors.Error, asyncio.TimeoutError):
                if self._under_way:
                    # Acknowledgements and dead letters.
                    await asyncio.wait(self._under_way, timeout=1)
                await asyncio.gather(*(pull.stop() for pull in list(self.pulls)))
                await self.settling.give_back()
                await self.nats.flush(timeout=2)

    async def fetch(self, queue: str) -> Msg | None:
        """Take one message now, the first priority first."""
        stream = self.settings.stream(queue)
        for step in self.settings.priority_steps:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.step-{step}"
            # An inbox of its own: a message keeps its stream's subject, by which nats-py's shared inbox can't tell it.
            try:
                msg = await self.nats.request(
                    subject, b'{"batch": 1, "no_wait": true}', timeout=self.settings.publish_timeout, old_style=True
                )
            except errors.NoRespondersError:
                if await self.streams.exists(queue):
                    raise
                return None
            if msg.reply:
                self.settling.hold(msg.reply)
                return msg
        return None


#: A worker ends without closing its connection: its last acknowledgements may still wait for the loop thread.
_open: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _give_back_all() -> None:
    for connection in list(_open):
        if connection.usable:
            with contextlib.suppress(CatgaError):
                connection.call(connection.give_back(), 5)
