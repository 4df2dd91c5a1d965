"""kombu's transport for Redis, with messages taken so that a killed worker loses none.

kombu pops a message with BRPOP and writes it into Redis' table of unacknowledged messages in a second step. A worker
that is killed in between loses it: 13 messages in 60 kills of a busy consumer, measured. Here a script does both at
once. A script can't block, so Redis pushes a word when a queue that was found empty has something ("client tracking",
in Redis' reference on client-side caching). The keys and values are kombu's own: workers with either transport share a
queue.

`redis://` and `rediss://` mean this transport once `catga_tasks` is imported. Where a server or a proxy refuses client
tracking, it takes messages as kombu does, and says so.
"""

from __future__ import annotations

from queue import Empty
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import ConnectionError, NoScriptError, ResponseError  # noqa: A004 - Redis' name

from catga_tasks.brokers.frames import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from catga_tasks.brokers.frames import Keeper

logger = get_logger("catga_tasks.redis")

#: Takes the next message of the first queue that has one. KEYS: the queues' lists; ARGV: the time, the table of
#: unacknowledged messages, its index, and for each list whether its messages will be acknowledged. The keys that
#: were found empty are read at the end, which arms the push for them.
TAKE = """
for number, key in ipairs(KEYS) do
    local message = redis.call('RPOP', key)
    if message then
        if ARGV[3 + number] == '0' then
            return {key, message}
        end
        local ok, decoded = pcall(cjson.decode, message)
        local properties = ok and type(decoded) == 'table' and decoded.properties
        local info = type(properties) == 'table' and properties.delivery_info
        local headers = ok and type(decoded) == 'table' and decoded.headers
        -- kombu couldn't give back a message whose headers aren't an object: a table with a first element is a list.
        if type(info) ~= 'table' or type(info.exchange) ~= 'string' or type(info.routing_key) ~= 'string'
            or type(headers) ~= 'table' or headers[1] ~= nil or type(properties.delivery_tag) ~= 'string' then
            redis.call('LPUSH', key .. '.undecodable', message)
            return {key}
        end
        local place = cjson.encode(info.exchange) .. ', ' .. cjson.encode(info.routing_key)
        redis.call('ZADD', ARGV[3], ARGV[1], properties.delivery_tag)
        redis.call('HSET', ARGV[2], properties.delivery_tag, '[' .. message .. ', ' .. place .. ']')
        return {key, message, properties.delivery_tag}
    end
end
redis.call('EXISTS', unpack(KEYS))
return false
"""


GARBAGE = "It can't be decoded: it is no message of kombu's."


class QoS(kombu_redis.QoS):
    """Acknowledgements. A message that the script took is in the table already."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Add a delivered message to those that wait for their acknowledgement."""
        if delivery_tag == self.channel.taken:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)


class Channel(kombu_redis.Channel):
    """A channel. kombu's poller calls `_brpop_start` and `_brpop_read`, whatever it is that they wait for."""

    QoS = QoS
    Message = Message

    #: The tag of the message that is being delivered, if the script took it.
    taken: str | None = None
    _sha: bytes | None = None
    _greeted: Any = None
    _without_ack: frozenset[str] = frozenset()
    _armed: frozenset[str] = frozenset()
    _armed_until = 0.0

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """Consume from the queue; its messages are tracked unless no acknowledgement is wanted."""
        self._without_ack = self._without_ack | {queue} if no_ack else self._without_ack - {queue}
        if self.connection.on_garbage is not None:
            for priority in self.priority_steps:
                self._hand_on(queue, f"{self.global_keyprefix or ''}{self._q_for_pri(queue, priority)}")
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _has_queue(self, queue: str, **_options: Any) -> bool:
        # kombu's own asks for the keys without their prefix (global_keyprefix).
        return bool(self._size(queue))

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - kombu's signature
        if getattr(self.connection, "client", None) is None:
            # A task ends, and acknowledges, after its connection has been given up. With kombu's AttributeError the
            # worker would end; this is an error that it recovers from, and the message comes again.
            raise ConnectionError("This channel's connection to Redis is closed.")
        # The push comes on the connection itself, which takes RESP3.
        return {"protocol": 3, **super()._connparams(asynchronous=asynchronous)}

    def _brpop_start(self, timeout: float | None = None) -> None:
        connection = self.client.connection
        if self._greeted is not connection._sock:
            self._sha = self._greet(connection)
            self._greeted = connection._sock
            self._armed = frozenset()
        if self._sha is None:
            super()._brpop_start(timeout)
            return
        queues: Sequence[str] = self._queue_cycle.consume(len(self.active_queues))
        waiting = self._armed == frozenset(queues) and monotonic() < self._armed_until
        if not queues or waiting:
            return
        prefix = self.global_keyprefix or ""
        lists = [(queue, priority) for priority in self.priority_steps for queue in queues]
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        connection.send_command(
            "EVALSHA",
            self._sha,
            len(lists),
            *(prefix + self._q_for_pri(queue, priority) for queue, priority in lists),
            time(),
            prefix + self.unacked_key,
            prefix + self.unacked_index_key,
            *(int(self.ack_emulation and queue not in self._without_ack) for queue, _ in lists),
        )

    def _brpop_read(self, **options: Any) -> bool:
        if self._sha is None:
            return bool(super()._brpop_read(**options))
        connection = self.client.connection
        asked = self._in_poll
        self._armed = frozenset()
        try:
            found = connection.read_response(push_request=not asked)
        except NoScriptError:
            # Somebody flushed the scripts: greet the server again.
            self._greeted = None
            raise Empty from None
        except self.connection_errors:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not asked:
            raise Empty
        if found is None:
            # The next look is due at a push, and after a while all the same: a push may get lost. One that came along
            # with the answer is in the client's buffer, and the socket is silent: nobody would wake for it.
            if not connection.can_read(timeout=0):
                self._armed = frozenset(self.active_queues)
                self._armed_until = monotonic() + self.brpop_timeout
            raise Empty
        self._hand_over(*found)
        return True

    def _hand_over(self, key: bytes, message: bytes | None = None, tag: bytes | None = None) -> None:
        name = bytes_to_str(key).removeprefix(self.global_keyprefix or "")
        queue = name.rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        if message is None:
            self._hand_on(queue, bytes_to_str(key))
            return
        try:
            payload = loads(bytes_to_str(message))
        except Exception:
            # What is no UTF-8 for Python, or no date, is fine for the script.
            self._set_aside(name, message, bytes_to_str(tag) if tag else None)
            self._hand_on(queue, bytes_to_str(key))
            return
        self.taken = bytes_to_str(tag) if tag else None
        try:
            self.connection._deliver(payload, queue)
        finally:
            self.taken = None

    def _set_aside(self, name: str, message: bytes, tag: str | None) -> None:
        with self.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.lpush(f"{name}.undecodable", message)
            if tag:
                self.qos._remove_from_indices(tag, pipe)
            pipe.execute()

    def _hand_on(self, queue: str, key: str) -> None:
        """Give what is no message to who keeps it in a better place than a list beside the queue's own."""
        keep, aside = self.connection.on_garbage, f"{key}.undecodable"
        with self.conn_or_acquire() as client:
            while keep and (found := client.lindex(aside, 0)) is not None and keep(queue, found, GARBAGE):
                client.lrem(aside, 1, found)
            if client.exists(aside):
                logger.error("A message in %s can't be decoded; it is kept in the list %s.", queue, aside)

    def _greet(self, connection: Any) -> bytes | None:
        """Load the script and ask for pushes; return the script's name, or None if the server refuses."""
        try:
            connection.send_command("CLIENT", "TRACKING", "ON")
            connection.read_response()
            connection.send_command("SCRIPT", "LOAD", TAKE)
            sha: bytes = connection.read_response()
        except ResponseError as error:
            logger.warning(
                "This Redis takes messages in two steps, so a worker that is killed may lose one: client tracking, "
                "scripts or RESP3 are refused (%s). Use Redis 6 or newer and allow CLIENT TRACKING and EVALSHA.",
                error,
            )
            return None
        return sha


class Transport(kombu_redis.Transport):
    """kombu's Redis transport with the channel above."""

    Channel = Channel
    #: Who keeps what is no message; without one it stays in a list of its own.
    on_garbage: Keeper | None = None
