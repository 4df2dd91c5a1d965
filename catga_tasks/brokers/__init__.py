"""How does a batch of stored messages reach a broker?

A publisher sends the bytes of claimed rows and waits for the broker's word on each. `KombuPublisher` works with
every broker that kombu knows, one message at a time; a broker that can do better has a module here.
"""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

from catga_tasks.brokers.contract import Publisher, Receipt
from catga_tasks.brokers.generic import KombuPublisher

__all__ = ["KombuPublisher", "Publisher", "Receipt"]

#: kombu's own loses messages of workers that are killed. By name: redis is imported when it is used.
TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "catga_tasks.brokers.redis_transport:Transport"))
TRANSPORT_ALIASES.update(dict.fromkeys(("nats", "tls"), "catga_tasks.brokers.nats:Transport"))
