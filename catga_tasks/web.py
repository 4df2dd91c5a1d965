"""What does Flower's Outbox tab answer? Its pages and its JSON."""

from __future__ import annotations

from flower.views import BaseHandler
from tornado.web import authenticated, url


class OutboxPage(BaseHandler):
    """The tab."""

    @authenticated
    def get(self) -> None:
        """Show the page."""
        self.render("outbox.html")


HANDLERS = [
    url(r"/outbox", OutboxPage, name="outbox"),
]
