"""What does Flower learn of us? An Outbox tab, and the queues of `nats://` on its Broker page.

`celery -A app outbox flower` runs Flower so; with Flower's own command, a `flowerconfig.py` does it:

    from catga_tasks import flower; flower.install()
"""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flower.app
import flower.urls
from flower.views import BaseHandler
from tornado.template import Loader, Template

from catga_tasks import monitor, web

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery import Celery

#: A page waits no longer than this for the broker, in seconds.
PAGE_SECONDS = 3.0
#: Everything that we answer to, put before Flower's last handler, which answers 404 to the rest.
HANDLERS = [*monitor.HANDLERS, *web.HANDLERS]

_TAB = b"""
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'outbox' %} active{% end %}"
            href="{{ reverse_url('outbox') }}"
            {% if active_tab == 'outbox' %}aria-current="page"{% end %}>Outbox</a>
        </li>
      """


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


class Templates(Loader):
    """Our templates, then Flower's, whose navigation gets one tab more."""

    def __init__(self, ours: str, flowers: str) -> None:
        super().__init__(flowers)
        self._ours = Path(ours)

    def _create_template(self, name: str) -> Template:
        own = self._ours / name
        source = (own if own.is_file() else Path(self.root) / name).read_bytes()
        if name == "navbar.html":
            # The first list is that of the pages, in all releases.
            source = source.replace(b"</ul>", _TAB + b"</ul>", 1)
        return Template(source, name=name, loader=self)


def install() -> None:
    """Teach Flower; call it before Flower starts."""
    if "template_loader" in flower.urls.settings:
        return
    flower.urls.handlers[-1:-1] = HANDLERS
    templates = Path(__file__).with_name("templates")
    flower.urls.settings["template_loader"] = Templates(str(templates), flower.urls.settings["template_path"])
    monitor.extend_metrics()
    _teach_brokers()
    _follow_start()


def _teach_brokers() -> None:
    """Let pages that show queues ask NATS. Flower 2.1 makes its broker in each of them, 2.2 in one method."""
    if hasattr(BaseHandler, "get_broker"):
        original = BaseHandler.get_broker

        def get_broker(self: Any) -> Any:
            return NatsBroker(self.capp) if self.application.transport == "nats" else original(self)

        BaseHandler.get_broker = get_broker
        return
    for name in ("flower.views.broker", "flower.api.tasks"):
        module: Any = importlib.import_module(name)
        module.Broker = _broker(module.Broker)


def _broker(original: Any) -> Any:
    def broker(url: str, *args: Any, **options: Any) -> Any:
        running = _running[-1]
        return NatsBroker(running.capp) if running.transport == "nats" else original(url, *args, **options)

    return broker


#: The Flower that was started last: one a process.
_running: list[flower.app.Flower] = []


def _follow_start() -> None:
    original = flower.app.Flower.start

    def start(self: Any) -> None:
        _running.append(self)
        web.start(self)
        original(self)

    flower.app.Flower.start = start
