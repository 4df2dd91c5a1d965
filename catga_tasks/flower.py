"""What does Flower learn of our brokers? Its Broker page shows the queues of `nats://`.

`celery -A app outbox flower` runs Flower so; with Flower's own command, a `flowerconfig.py` does it:

    from catga_tasks import flower; flower.install()
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from flower.views import BaseHandler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery import Celery

#: A page waits no longer than this for the server, in seconds.
PAGE_SECONDS = 3.0


class NatsBroker:
    """The queues of an application on NATS, in the form that Flower's page shows."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return each queue's name, messages, and how many of them are ready and unacknowledged."""
        return await asyncio.get_running_loop().run_in_executor(None, self._counts, list(names))

    def _counts(self, names: list[str]) -> list[dict[str, Any]]:
        with self._app.connection_for_read() as connection:
            limits = {"connect_timeout": PAGE_SECONDS, "publish_timeout": PAGE_SECONDS}
            connection.transport_options = {**connection.transport_options, **limits}
            channel = connection.default_channel
            return [{"name": name, **channel.counts(name)} for name in names]


def install() -> None:
    """Teach Flower's handlers; call it before Flower starts."""
    if hasattr(BaseHandler, "catga_get_broker"):
        return
    BaseHandler.catga_get_broker = BaseHandler.get_broker

    def get_broker(self: Any) -> Any:
        return NatsBroker(self.capp) if self.application.transport == "nats" else self.catga_get_broker()

    BaseHandler.get_broker = get_broker
