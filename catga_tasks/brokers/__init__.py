"""How does a batch of stored messages reach a broker?

A publisher sends the bytes of claimed rows and waits for the broker's word on each. `KombuPublisher` works with
every broker that kombu knows, one message at a time; a broker that can do better has a module here.
"""

from __future__ import annotations

from catga_tasks.brokers.contract import Publisher, Receipt
from catga_tasks.brokers.generic import KombuPublisher

__all__ = ["KombuPublisher", "Publisher", "Receipt"]
