"""A connection to NATS JetStream that any thread may use.

nats-py lives on one private loop thread of the process. Other threads hand it work: a call waits for its answer, an
acknowledgement is only posted. What arrives waits in buffers; a file descriptor becomes readable when something does.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ChannelError
from nats import errors
from nats.aio.client import Client as NatsClient
from nkeys import NkeysError

from catga_tasks.brokers.nats_errors import NoTLS, StreamGone, Unreachable, refusal, translated
from catga_tasks.brokers.pulling import consumer_of, place_of, times_delivered
from catga_tasks.brokers.streams import Streams
from catga_tasks.errors import CatgaError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.nats_settings import NatsSettings
    from catga_tasks.brokers.pulling import Pull

logger = logging.getLogger("catga_tasks.nats")

#: Acknowledgements that follow one another are gathered for this long, in seconds: waking the loop thread costs as much
#: as a message does. The first goes at once.
GATHER_SECONDS = 0.005
#: Why a dead letter is one that its consumer rejected without giving it back.
REJECTED = "Its consumer rejected it: the task isn't registered, it can't be decoded, or the task raised Reject."


class _Thread:
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


_thread = _Thread()
os.register_at_fork(after_in_child=_thread.forget)


class _Client(NatsClient):
    """nats-py would go on in plain text, password and all, where a server or somebody in between offers no TLS."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT001, FBT002 - nats-py's signature
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise NoTLS
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


class Connection:
    """One connection. `broken` is set once an outage has lasted too long."""

    def __init__(self, servers: Sequence[str], tls: bool, settings: NatsSettings) -> None:  # noqa: FBT001 - by position from a pair
        self.settings = settings
        self.broken: Unreachable | None = None
        self.nats = _Client()
        self.js: Any = None
        self.pid = os.getpid()
        self._servers = list(servers)
        self._tls = tls
        self._loop = _thread.loop()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signalled = False
        self._posted: deque[tuple[str, bytes]] = deque()
        self._soon: dict[Callable[[], object], None] = {}
        self._gathering = False
        self._sending = False
        self._asks: deque[tuple[Pull, int]] = deque()
        self._held: dict[str, None] = {}
        self._unconfirmed: dict[str, list[tuple[str, bytes]]] = {}
        self._awaited: dict[str, tuple[_Batch, int]] = {}
        self._tokens = 0
        self._inbox = ""
        self.pulls: set[Pull] = set()
        self.streams = Streams(self)
        self._grace: asyncio.TimerHandle | None = None
        self._first_error: asyncio.Future[None] | None = None
        self._closing = False
        self._endless: list[asyncio.Task[None]] = []
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
        seconds = timeout or self.settings.publish_timeout
        denied = self._denied
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
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

    def settle(self, reply: str, verb: bytes) -> None:
        """Acknowledge (`+ACK`), give back (`-NAK`) or end (`+TERM`) a delivery; sent again until it is confirmed."""
        self._posted.append((reply, verb))
        self._wake()

    def reject(self, queue: str, reply: str) -> None:
        """Move a delivery to the dead letters, soon."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self.finish(self._reject(queue, reply)))

    def soon(self, work: Callable[[], object]) -> None:
        """Call the function on the loop thread when acknowledgements are sent next."""
        self._soon[work] = None
        self._wake()

    def ask(self, asks: Sequence[tuple[Pull, int]]) -> None:
        """Send requests for so many messages each, at once."""
        self._asks.extend(asks)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._post)

    def _wake(self) -> None:
        if not self._gathering:
            self._gathering = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._gather)

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run the coroutine on the loop thread for as long as the connection lives. From the loop thread."""
        self._endless.append(asyncio.ensure_future(work))

    def finish(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run the coroutine on the loop thread; `close` waits for its end. From the loop thread."""
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def loop_time(self) -> float:
        """Return the loop's clock, in seconds."""
        return self._loop.time()

    def later(self, seconds: float, work: Callable[[], object]) -> None:
        """Call the function after so many seconds. From the loop thread."""
        self._loop.call_later(seconds, work)

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has arrived."""
        return self._read

    def quieten(self) -> None:
        """Make the descriptor unreadable until the next arrival; look into the buffers after it.

        The flag falls last: an arrival in between sets none, and is in a buffer by then.
        """
        with contextlib.suppress(BlockingIOError, OSError):
            os.read(self._read, 4096)
        self._signalled = False

    def signal(self) -> None:
        """Make the descriptor readable."""
        if not self._signalled:
            self._signalled = True
            with contextlib.suppress(BlockingIOError, OSError):
                os.write(self._write, b"x")

    def signal_in(self, seconds: float) -> None:
        """Make the descriptor readable after a while."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self.signal)

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
        for descriptor in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(descriptor)

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
        if self._first_error.done():
            self._first_error.result()
        await connecting
        self._first_error = None
        self.js = self.nats.jetstream(timeout=self.settings.publish_timeout)
        self._inbox = self.nats.new_inbox()
        await self.nats.subscribe(f"{self._inbox}.*", cb=self._confirmed)
        self.background(self._beat())

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "servers": self._servers,
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
            "user": settings.user,
            "password": settings.password,
            "token": settings.token,
            "nkeys_seed": settings.nkey,
            "user_credentials": settings.credentials,
        }
        for name in ("nkey", "credentials"):
            path = getattr(settings, name)
            if path is not None and not os.access(path, os.R_OK):
                message = f"broker_transport_options: the file {name}={path!r} can't be read."
                raise ConfigurationError(message)
        if self._tls or settings.tls_ca_file or settings.tls_cert_file:
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
            if isinstance(problem, ConfigurationError) or self._tries >= len(self._servers):
                self._first_error.set_exception(problem)
            return
        if "ermissions" in str(error):
            self._deny(translated(error))
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
            self._grace = self._loop.call_later(self.settings.reconnect_grace, self._give_up)

    async def _reconnected(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        logger.warning("The connection to NATS is back.")
        for token, settled in list(self._unconfirmed.items()):
            await self._publish_settled(settled, token)
        for pull in self.pulls:
            pull.reset()

    def _give_up(self) -> None:
        self.broken = Unreachable(f"NATS was away for more than {self.settings.reconnect_grace:g} s (reconnect_grace).")
        self.signal()

    def _gather(self) -> None:
        """Send what is posted, and look again after a while without being woken; nothing is lost between the two."""
        if self._posted or self._soon:
            while self._soon:
                self._soon.popitem()[0]()
            self._post()
            self.later(GATHER_SECONDS, self._gather)
            return
        self._gathering = False
        if self._posted or self._soon:
            self._gathering = True
            self._gather()

    def _post(self) -> None:
        if not self._sending:
            self._sending = True
            self.finish(self._send_posted())

    async def _send_posted(self) -> None:
        try:
            await self._send_settled()
            while self._asks:
                pull, count = self._asks.popleft()
                await pull.ask(count)
        finally:
            self._sending = False
        if self._posted or self._asks:
            self._post()

    async def _send_settled(self) -> None:
        """Send what is posted. A consumer confirms in the order of arrival: the last of a batch answers for all."""
        batches: dict[str, list[tuple[str, bytes]]] = {}
        while self._posted:
            reply, verb = self._posted.popleft()
            self._held.pop(reply, None)
            batches.setdefault(consumer_of(reply), []).append((reply, verb))
        for settled in batches.values():
            self._tokens += 1
            token = str(self._tokens)
            self._unconfirmed[token] = settled
            with contextlib.suppress(errors.Error):
                # In an outage it goes out again when the connection is back.
                await self._publish_settled(settled, token)

    async def _publish_settled(self, settled: Sequence[tuple[str, bytes]], token: str) -> None:
        *others, (last, verb) = settled
        for reply, each in others:
            await self.nats.publish(reply, each)
        await self.nats.publish(last, verb, reply=f"{self._inbox}.{token}")

    async def _confirmed(self, msg: Msg) -> None:
        token = msg.subject.rpartition(".")[2]
        batch, number = self._awaited.pop(token, (None, 0))
        if batch is None:
            self._unconfirmed.pop(token, None)
        else:
            batch.answer(number, refusal(msg))

    async def _beat(self) -> None:
        """Tell the server that what is held is still in hand: the worker's own thread may be busy for hours."""
        while True:
            await asyncio.sleep(self.settings.ack_wait / 3)
            for reply in list(self._held):
                with contextlib.suppress(errors.Error):
                    await self.nats.publish(reply, b"+WPI")
            for pull in self.pulls:
                pull.check()

    async def _close(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
        await self.give_back()
        for task in (*self._endless, *self._under_way):
            task.cancel()
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
                await self._send_settled()
                for reply in list(self._held):
                    await self.nats.publish(reply, b"-NAK")
                await self.nats.flush(timeout=2)

    # Messages

    async def publish(self, entries: Sequence[tuple[str, int, bytes, str]]) -> list[Exception | None]:
        """Publish (queue, step, body, id) each and wait for all confirmations; return each one's error or None.

        What finds its stream gone, as after a delete elsewhere, is published again to a new one; while a cluster elects
        the stream's leader, until there is one.
        """
        deadline = self._loop.time() + self.settings.publish_timeout
        found = await self._publish(entries, deadline)
        pause = 0.0
        while again := [number for number, error in enumerate(found) if isinstance(error, StreamGone)]:
            if self._loop.time() + pause >= deadline:
                for number in again:
                    found[number] = Unreachable("NATS takes nothing now: the queue's stream has no leader.")
                break
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 2 or 0.05)
            for number in list(again):
                queue = entries[number][0]
                self.streams.known.discard(queue)
                if queue in self.streams.expiring:
                    # As AMQP does with what nobody's queue takes: who would have read it is gone.
                    found[number] = None
                    again.remove(number)
            for number, error in zip(again, await self._publish([entries[n] for n in again], deadline), strict=True):
                found[number] = error
        return found

    async def _publish(self, entries: Sequence[tuple[str, int, bytes, str]], deadline: float) -> list[Exception | None]:
        batch = _Batch(len(entries), self._loop)
        late = self._loop.call_at(deadline, batch.end)
        tokens = []
        for number, (queue, step, body, identity) in enumerate(entries):
            self._tokens += 1
            token = str(self._tokens)
            self._awaited[token] = (batch, number)
            tokens.append(token)
            try:
                if queue not in self.streams.known:
                    await self.streams.ensure(queue)
                await self.nats.publish(
                    self.settings.subject(queue, step),
                    body,
                    reply=f"{self._inbox}.{token}",
                    headers={"Nats-Msg-Id": identity},
                )
            except (errors.Error, CatgaError, ChannelError) as error:
                batch.answer(number, translated(error))
        try:
            await batch.complete
        finally:
            late.cancel()
            for token in tokens:
                self._awaited.pop(token, None)
        return batch.outcomes

    async def fetch(self, queue: str) -> Msg | None:
        """Take one message now, the first priority first."""
        stream = self.settings.stream(queue)
        for step in self.settings.priority_steps:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.step-{step}"
            # An inbox of its own: a message keeps its stream's subject, by which nats-py's shared inbox can't tell it.
            msg = await self.nats.request(
                subject, b'{"batch": 1, "no_wait": true}', timeout=self.settings.publish_timeout, old_style=True
            )
            if msg.reply:
                self._held[msg.reply] = None
                return msg
        return None

    def hold(self, msg: Msg) -> None:
        """Keep the server from delivering the message again while it is in hand."""
        self._held[msg.reply] = None

    async def _reject(self, queue: str, reply: str) -> None:
        # If this fails the message isn't in hand any more: it is delivered again, and rejected again.
        self._held.pop(reply, None)
        try:
            stored = await self.js.get_msg(*place_of(reply))
            await self.bury(queue, reply, stored.data or b"", REJECTED)
        except (errors.Error, TimeoutError) as error:
            logger.warning("A rejected message stays in queue %s: %s", queue, translated(error))

    async def bury(self, queue: str, reply: str, body: bytes, reason: str) -> None:
        """Move a message to the dead letters, and only then end it."""
        await self.streams.ensure_dead()
        subject = self.settings.subject(queue, 0).replace(".q.", ".dead.", 1)
        headers = {"Catga-Queue": queue, "Catga-Reason": reason, "Catga-Died-Of": str(times_delivered(reply))}
        await self.js.publish(subject, body, headers=headers)
        self.settle(reply, b"+TERM")


#: A worker ends without closing its connection: its last acknowledgements may still wait for the loop thread.
_open: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _give_back_all() -> None:
    for connection in list(_open):
        if connection.usable:
            with contextlib.suppress(CatgaError):
                connection.call(connection.give_back(), 5)


class _Batch:
    """The confirmations of messages that were published together."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        late: Exception = Unreachable("NATS didn't confirm the message in time (publish_timeout).")
        self.outcomes: list[Exception | None] = [late] * count
        self.complete = loop.create_future()
        self._open = count
        if not count:
            self.end()

    def answer(self, number: int, error: Exception | None) -> None:
        """Note what became of one."""
        self.outcomes[number] = error
        self._open -= 1
        if not self._open:
            self.end()

    def end(self) -> None:
        """Wait no longer."""
        if not self.complete.done():
            self.complete.set_result(None)
