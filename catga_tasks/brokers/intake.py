"""Which messages does a channel ask for, and which of those that have come does it deliver next?"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from catga_tasks.brokers.pulling import EXPECTED_SECONDS, Pull

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from nats.aio.msg import Msg

    from catga_tasks.brokers.nats_channel import Channel

#: Messages that are asked for when the prefetch has no limit.
WINDOW = 256


class Intake:
    """The queues that one channel consumes from."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._nats = channel.nats
        self._pulls: dict[str, list[Pull]] = {}
        self._groups: list[list[tuple[str, deque[Msg]]]] | None = None
        self._stalled = False
        self._lock = threading.Lock()

    def start(self, queue: str) -> None:
        """Ask for the messages of a stored queue from now on."""
        if queue in self._pulls:
            return
        self._nats.call(self._nats.streams.ensure(queue))
        steps = enumerate(self._nats.settings.priority_steps)
        pulls = [Pull(self._nats, queue, step, rank) for rank, step in steps]
        for pull in pulls:
            self._nats.call(pull.start())
        # Not before: the loop thread asks for all that is here, and what it asks before they listen comes to nobody.
        self._pulls[queue] = pulls

    def stop(self, queue: str) -> None:
        """Ask no more; what has come and nobody has seen goes back."""
        for pull in self._pulls.pop(queue, []):
            self._nats.call(pull.stop())

    def close(self) -> None:
        """Stop all."""
        for queue in list(self._pulls):
            self.stop(queue)

    def changed(self) -> None:
        """Look at the queues anew: there are others than before."""
        self._groups = None

    def top_up(self) -> None:
        """Ask for as many messages as the prefetch has room for: at once when half of them are missing.

        For fewer, if none is coming, with the acknowledgements that are gathered.
        """
        if self._ask(chunk=max(1, (self._channel.qos.prefetch_count or WINDOW) // 2)):
            self._nats.settling.soon(self._ask)

    def _ask(self, chunk: int = 1) -> bool:
        """Ask where so many are missing; return whether fewer are missing somewhere, and none is coming."""
        asks, fewer = [], False
        with self._lock:
            room = self._channel.qos.can_consume_max_estimate()
            if room is None:
                room = WINDOW
            for pulls in list(self._pulls.values()):
                for pull in pulls:
                    missing = pull.missing(room)
                    if missing >= chunk:
                        pull.asked(missing)
                        asks.append((pull, missing))
                    elif missing > 0 and not pull.coming:
                        fewer = True
        if asks:
            self._nats.settling.ask(asks)
        return fewer

    def go_on(self) -> None:
        """Wake the hub if messages wait for room that there is now."""
        if self._stalled:
            self._nats.bell.ring()

    def deliver(self, limit: int) -> int:
        """Deliver what has arrived, the first priority first, queues in turn; return how many messages."""
        count, channel = 0, self._channel
        # From before the look at the prefetch: what is settled meanwhile must wake the hub.
        self._stalled = True
        can_consume, groups = channel.qos.can_consume, self._waiting()
        while count < limit:
            before = count
            for rank, group in enumerate(groups):
                if rank and self._higher_expected(rank, group):
                    limit = count
                    break
                for queue, messages in group:
                    if messages and can_consume():
                        count += 1
                        channel.hand_over(queue, messages.popleft())
                if count > before:
                    break
            else:
                break
        self._stalled = any(messages for group in groups for _, messages in group)
        self.top_up()
        return count

    def _higher_expected(self, rank: int, group: Sequence[tuple[str, deque[Msg]]]) -> bool:
        """Return whether this group's messages wait: one of a higher priority must be on its way."""
        if not any(messages for _, messages in group):
            return False
        if not any(pull.expected for pulls in self._pulls.values() for pull in pulls[:rank]):
            return False
        self._nats.ring_in(EXPECTED_SECONDS)
        return True

    def _waiting(self) -> list[list[tuple[str, deque[Msg]]]]:
        """Return the buffers with their queues' names, those of one rank together, the first rank first."""
        if self._groups is None:
            taps, active = self._channel.connection.taps, dict.fromkeys(self._channel.active_queues)
            found = [(pull.rank, queue, pull.messages) for queue, pulls in self._pulls.items() for pull in pulls]
            found += [(0, queue, taps[queue].messages) for queue in active if queue in taps]
            ranks = sorted({rank for rank, _, _ in found})
            self._groups = [[each[1:] for each in found if each[0] == rank] for rank in ranks]
        return self._groups
