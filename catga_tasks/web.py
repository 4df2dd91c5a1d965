"""What does Flower's Outbox tab answer? Its pages, and JSON for programs and for the pages themselves.

Reads ask for what Flower's pages ask for. Changes go through Flower's `BaseApiHandler`, which refuses them without
authentication; requests from other sites are refused here, for Flower leaves them to browsers where it asks nobody
who they are.
"""

from __future__ import annotations

import json
import os
from base64 import b64decode
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flower.api import BaseApiHandler
from flower.utils import strtobool
from flower.utils.tasks import get_task_by_id
from flower.views import BaseHandler
from tornado.ioloop import PeriodicCallback
from tornado.web import HTTPError, StaticFileHandler, authenticated, url

from catga_tasks import admin, audit, browse, display, steering
from catga_tasks.audit import Actor
from catga_tasks.desk import CHANGE_SECONDS, Desk
from catga_tasks.errors import CatgaError
from catga_tasks.selection import Selection, seconds
from catga_tasks.tables import now
from catga_tasks.watch import SAMPLE_SECONDS

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: Messages on a page of the list, by default and at most; marked messages of one change.
PAGE, PAGE_MAX, MARKED_MAX = 50, 200, 1000
#: Entries of the record that are shown.
AUDIT_ROWS = 50
#: Ids are whole numbers of 64 bits.
_ID_MAX = 2**63 - 1


def start(flower: Any) -> None:
    """Begin to sample the counters of this Flower's outbox."""
    PeriodicCallback(desk_of(flower).sample, SAMPLE_SECONDS * 1000).start()


def desk_of(flower: Any) -> Desk:
    """Return the desk of a Flower."""
    if not hasattr(flower, "catga_desk"):
        flower.catga_desk = Desk(flower.capp)
    desk: Desk = flower.catga_desk
    return desk


class Ours(BaseHandler):
    """What our handlers have beyond Flower's."""

    @property
    def desk(self) -> Desk:
        """Where to ask the database."""
        return desk_of(self.application)

    @property
    def mask_arguments(self) -> bool:
        """Whether arguments are hidden."""
        return self.desk.app.catga_settings.outbox_mask_arguments

    def set_default_headers(self) -> None:
        """Let no other site read what is here, whatever Flower allows them to read of its own."""
        super().set_default_headers()
        for name in ("Origin", "Headers", "Methods"):
            self.clear_header(f"Access-Control-Allow-{name}")
        self.set_header("Cache-Control", "no-store")

    def why_unchangeable(self) -> str:
        """Return why nothing can be changed here, or an empty string."""
        options = self.application.options
        if options.read_only:
            return "Flower runs in read-only mode."
        if not (options.basic_auth or options.auth or _is_open()):
            return "To change something, start Flower with --basic-auth or --auth."
        return ""

    def selection(self, given: dict[str, Any]) -> Selection:
        """Return the selection that these texts mean; raise `HTTPError` 400 for nonsense."""
        unknown = set(given) - {"task", "queue", "older_than", "text"}
        if unknown or not all(isinstance(value, str) for value in given.values()):
            raise HTTPError(400, reason="A filter has texts: task, queue, older_than, text")
        try:
            age = seconds(given["older_than"]) if given.get("older_than") else None
        except ValueError as error:
            raise HTTPError(400, reason=str(error)) from None
        task, queue, text = (given.get(name) or None for name in ("task", "queue", "text"))
        return Selection(task=task, queue=queue, text=text, older_than=age, in_arguments=not self.mask_arguments)

    def asked(self) -> Selection:
        """Return the selection of the address."""
        names = ("task", "queue", "older_than", "text")
        return self.selection({name: self.get_query_argument(name, "") for name in names})


class Page(Ours):
    """An HTML page. A database that can't be asked is said so on the page itself, with status 503."""

    async def show(self, template: str, **values: Any) -> None:
        """Render a template with what all of ours need."""
        self.render(template, problem=values.pop("problem", ""), version=version("catga-tasks"),
                    unchangeable=self.why_unchangeable(), **values)  # fmt: skip


class OutboxPage(Page):
    """The tab. Its numbers come with it, so that there is something to see at once."""

    @authenticated
    async def get(self) -> None:
        """Show the page."""
        summary, problem = None, ""
        try:
            summary = await summarize(self.desk)
        except CatgaError as error:
            problem = str(error)
            self.set_status(503)
        tasks = sorted(name for name in self.capp.tasks if not name.startswith("celery."))
        # Inside a script element, where only this could end it.
        embedded = json.dumps(summary).replace("<", "\\u003c")
        await self.show("outbox.html", summary=embedded, problem=problem, tasks=tasks)


class MessagePage(Page):
    """One message."""

    @authenticated
    async def get(self, number: str) -> None:
        """Show the page, or 404 for a message that isn't here any more."""
        shown, problem = None, ""
        try:
            shown = await find(self, number)
            if shown is None:
                self.set_status(404)
        except CatgaError as error:
            problem = str(error)
            self.set_status(503)
        known = shown is not None and get_task_by_id(self.application.events, shown["task_id"]) is not None
        await self.show(
            "outbox_message.html", message=shown, number=number, known=known, problem=problem,
            format_bytes=format_bytes, format_seconds=format_seconds,
        )  # fmt: skip


class Reply(Ours):
    """JSON, errors too."""

    def write_error(self, status_code: int, **details: Any) -> None:
        """Say what is wrong as {"error": text}."""
        error = details.get("exc_info", (None, None))[1]
        words = self._reason
        if isinstance(error, CatgaError):
            status_code, words = 503, str(error)
        elif isinstance(error, HTTPError) and (error.reason or error.log_message):
            words = str(error.reason or error.log_message)
        self.set_status(status_code)
        if status_code == 401 and self.application.options.basic_auth:  # noqa: PLR2004 - HTTP's number
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        self.finish({"error": words})

    def log_exception(self, kind: Any, error: Any, traceback: Any) -> None:
        """Leave out a database that is out: it is no fault of this program."""
        if not isinstance(error, CatgaError):
            super().log_exception(kind, error, traceback)


class Read(Reply):
    """What anybody may read who may see Flower's pages."""


class SummaryApi(Read):
    """The numbers of the tab."""

    @authenticated
    async def get(self) -> None:
        """Reply with counts, rates, relays, queues and duplicates."""
        self.write(await summarize(self.desk))


class MessagesApi(Read):
    """The list."""

    @authenticated
    async def get(self) -> None:
        """Reply with a page of the messages that the address selects."""
        state = self.get_query_argument("state", "") or None
        if state not in (None, *browse.STATES):
            raise HTTPError(400, reason=f"state is one of {', '.join(browse.STATES)}")
        before = _number(self.get_query_argument("before", ""), "before")
        limit = min(PAGE_MAX, _number(self.get_query_argument("limit", ""), "limit") or PAGE)
        selection, mask = self.asked(), self.mask_arguments
        found = await self.desk.ask(
            lambda connection: browse.page(connection, selection, state=state, before=before, limit=limit)
        )
        rows = [display.in_short(row, mask_arguments=mask) for row in found.rows]
        self.write({"messages": rows, "next": found.next})


class MessageApi(Read):
    """One message."""

    @authenticated
    async def get(self, number: str) -> None:
        """Reply with a message, or 404."""
        shown = await find(self, number)
        if shown is None:
            raise HTTPError(404, reason="No such message is in the outbox or among the dead letters")
        self.write(shown)


class AuditApi(Read):
    """The record of changes by hand."""

    @authenticated
    async def get(self) -> None:
        """Reply with the last changes, the latest first."""
        self.write({"changes": await self.desk.ask(lambda connection: audit.latest(connection, AUDIT_ROWS))})


class DeadCountApi(Read):
    """How many dead letters a change would be about."""

    @authenticated
    async def get(self) -> None:
        """Reply with the count, and the moment of it: given back as `dead_by`, later ones are left alone."""
        selection = self.asked()

        def count(connection: Connection) -> dict[str, Any]:
            found = admin.count(connection, "catga_dead_letters", selection)
            moment = connection.exec_driver_sql(f"SELECT CAST({now(connection)} AS text)").scalar_one()
            return {"count": found, "dead_by": moment}

        self.write(await self.desk.ask(count, seconds=CHANGE_SECONDS))


class Change(Reply, BaseApiHandler):
    """What changes something: authenticated, from this site, and not in read-only mode."""

    def prepare(self) -> None:
        """Refuse what Flower's API refuses, and other sites always."""
        super().prepare()
        site, origin = self.request.headers.get("Sec-Fetch-Site"), self.request.headers.get("Origin")
        if site not in (None, "same-origin", "none") or (origin and urlsplit(origin).netloc != self.request.host):
            raise HTTPError(403, reason="Requests from other sites are refused")
        # A form of another site can't send this, and a script of it has to ask first.
        if not self.request.headers.get("Content-Type", "").startswith("application/json"):
            raise HTTPError(415, reason="The body must be application/json")
        if self.application.options.read_only:
            raise HTTPError(403, reason="Read only mode is enabled")

    @property
    def given(self) -> dict[str, Any]:
        """The request's body."""
        try:
            found = json.loads(self.request.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise HTTPError(400, reason="The body must be a JSON object")
        return found

    def actor(self) -> Actor:
        """Who asks for it."""
        who = self.current_user
        if not isinstance(who, str):
            who = "anonymous"
        if self.application.options.basic_auth:
            # Flower has checked the pair of name and password.
            pair = b64decode(self.request.headers["Authorization"].partition(" ")[2])
            who = pair.decode().partition(":")[0]
        return Actor(who, f"Flower, {self.request.remote_ip}")


class DeadLettersApi(Change):
    """Replay or discard dead letters: those marked, those of a filter, or all."""

    @authenticated
    async def post(self, verb: str) -> None:
        """Reply with how many it was, and how many stay: another message has the unique key."""
        selection, actor = self.chosen(self.given), self.actor()
        change = {"replay": steering.replay, "discard": steering.discard}[verb]

        def work(connection: Connection) -> dict[str, int]:
            done = change(connection, selection, actor)
            return {"count": done, "left": admin.count(connection, "catga_dead_letters", selection)}

        done = await self.desk.change(work, seconds=CHANGE_SECONDS)
        if verb == "replay":
            await self.desk.wake()
        self.write(done)

    def chosen(self, given: dict[str, Any]) -> Selection:
        """Return what {"ids": [...]}, {"filter": {...}} or {"all": true} means."""
        if len({"ids", "filter", "all"} & set(given)) != 1 or set(given) - {"ids", "filter", "all", "dead_by"}:
            raise HTTPError(400, reason="Give one of ids, filter and all; dead_by may go with it")
        dead_by = given.get("dead_by")
        if dead_by is not None and not isinstance(dead_by, str):
            raise HTTPError(400, reason="dead_by is what the count replied")
        if "ids" in given:
            return Selection(ids=_ids(given["ids"]), dead_by=dead_by)
        if "filter" in given:
            found = self.selection(given["filter"]) if isinstance(given["filter"], dict) else Selection()
            if not found:
                raise HTTPError(400, reason='The filter is empty: all dead letters are {"all": true}')
            return replace(found, dead_by=dead_by)
        if given["all"] is not True:
            raise HTTPError(400, reason="all is true, or left out")
        return Selection(dead_by=dead_by)


class QueuesApi(Change):
    """Pause or resume the relay of a queue."""

    @authenticated
    async def post(self, verb: str) -> None:
        """Reply with whether it made a difference."""
        given = self.given
        queue, broker = given.get("queue"), given.get("broker", "")
        if not isinstance(queue, str) or not queue or not isinstance(broker, str):
            raise HTTPError(400, reason="Give queue, and broker unless it is the application's own")
        change, actor = {"pause": steering.pause, "resume": steering.resume}[verb], self.actor()
        done = await self.desk.change(lambda connection: change(connection, broker, queue, actor))
        if verb == "resume":
            await self.desk.wake()
        self.write({"changed": done})


async def summarize(desk: Desk) -> dict[str, Any]:
    """Return all numbers of the tab."""
    live = await desk.ask(desk.watch.live)
    await desk.count()
    return {**live, **desk.watch.counted(), "rates": desk.watch.rates()}


async def find(handler: Any, number: str) -> dict[str, Any] | None:
    """Return a message as it may be seen, or None."""
    wanted, desk = _number(number, "id") or 0, handler.desk
    row = await desk.ask(lambda connection: browse.message(connection, wanted))
    return None if row is None else display.in_full(desk.app, row, mask_arguments=handler.mask_arguments)


def format_bytes(count: int) -> str:
    """Return a size for people."""
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1024:,.0f} KiB"  # noqa: PLR2004 - short enough to read


def format_seconds(span: float) -> str:
    """Return a span of time for people."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if span >= 2 * size:
            return f"{span / size:.0f} {unit}"
    return f"{span:.1f} s"


def _is_open() -> bool:
    return bool(strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false"))


def _number(given: str, name: str) -> int | None:
    if not given:
        return None
    if not given.isdecimal() or not 0 < int(given) <= _ID_MAX:
        raise HTTPError(400, reason=f"{name} is a whole number above 0")
    return int(given)


def _ids(given: Any) -> tuple[int, ...]:
    whole = isinstance(given, list) and all(type(each) is int and 0 < each <= _ID_MAX for each in given)
    if not whole or not 0 < len(given) <= MARKED_MAX:
        raise HTTPError(400, reason=f"ids are 1 to {MARKED_MAX} whole numbers")
    return tuple(given)


HANDLERS = [
    url(r"/outbox", OutboxPage, name="outbox"),
    url(r"/outbox/message/(\d+)", MessagePage, name="outbox-message"),
    url(r"/outbox/api/summary", SummaryApi),
    url(r"/outbox/api/messages", MessagesApi),
    url(r"/outbox/api/messages/(\d+)", MessageApi),
    url(r"/outbox/api/audit", AuditApi),
    url(r"/outbox/api/dead/count", DeadCountApi),
    url(r"/outbox/api/dead/(replay|discard)", DeadLettersApi),
    url(r"/outbox/api/queues/(pause|resume)", QueuesApi),
    url(
        r"/outbox/static/(.*)",
        StaticFileHandler,
        {"path": str(Path(__file__).with_name("static"))},
        name="outbox-static",
    ),
]
