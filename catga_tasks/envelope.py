"""What is a message, as a row and on the wire?"""

from __future__ import annotations

import base64
import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from catga_tasks.errors import MessageRejected

if TYPE_CHECKING:
    from datetime import datetime


#: A header of messages whose tasks ask the inbox: when they were due, in seconds since 1970 by their sender's clock.
DUE_AT = "catga_due_at"


class Claim(Protocol):
    """How a message takes its unique key."""

    #: The longest time that it holds it, in seconds.
    seconds: float

    def refused(self, holder: str) -> None:
        """Learn that the key is another message's, by that one's task id: this message isn't sent."""


class Envelope(NamedTuple):
    """One message as kombu would have published it: serialized, compressed, with its headers and properties.

    `headers` and `properties` are JSON text in kombu's dialect, kept as text so that a relay can send them on
    without building them again.
    """

    task_id: str
    task: str
    queue: str
    exchange: str
    routing_key: str
    priority: int | None
    content_type: str
    content_encoding: str
    headers: str
    properties: str
    body: bytes
    #: Entities to declare before the publish, as JSON; None: the application's own declaration of `queue`.
    declarations: str | None = None
    #: Calls to the result backend to make before the publish, as JSON (a chord's size and saved group).
    backend_calls: str | None = None
    #: Send Celery's task-sent event after the publish.
    send_event: bool = False
    #: Time to live in seconds from now (AMQP's `expiration`); it runs while the row waits.
    expiration: float | None = None
    #: A name of `outbox_brokers`; empty for the application's own broker.
    broker: str = ""
    #: What no other message may hold at the same time.
    unique_key: str | None = None
    #: Messages with the same one are sent one after the other, each when the one before it has ended.
    ordering_key: str | None = None
    #: Not before this many seconds from the insert, by the database's clock ...
    delay: float = 0.0
    #: ... or not before this moment.
    eta: datetime | None = None
    #: What its trace calls its creation; the insert ends it.
    creation: Any = None
    #: How it takes its unique key; None if it has it, as a retry does.
    claim: Claim | None = None
    #: It goes on in the turn that it has, as a retry does.
    resumed: bool = False
    #: Its turn comes when the message before it has ended.
    waits: bool = False


#: The columns that a row and its envelope share: the first fields of `Envelope`, in their order.
STORED = Envelope._fields[: Envelope._fields.index("delay")]


class Row(NamedTuple):
    """A claimed row: its envelope, its place in the table and what became of earlier attempts."""

    id: int
    envelope: Envelope
    attempts: int = 0
    #: One entry an attempt: {"attempt": 1, "at": ISO time, "error": text}.
    history: str | None = None
    #: A relay died with this row in its hands: publish it alone.
    suspect: bool = False
    #: Seconds since the insert, by the database's clock.
    age: float = 0.0
    #: The row was held back until its ETA.
    scheduled: bool = False
    #: Since when it could have run, in seconds since 1970 by the database's clock; None for an ETA that is long past.
    ready_at: float | None = None


def outgoing(row: Row) -> Envelope:
    """Return the envelope as it goes to the broker; raise `MessageRejected` for garbage.

    Two things have changed since the row was written. Its time to live has run on. And its ETA has come by the
    database's clock, so it is taken out of the headers: a worker whose clock is slow would hold the message
    again, past the broker's redelivery time-out. `catga_eta` keeps the original.
    """
    envelope = row.envelope
    headers = _decode("headers", envelope.headers)
    properties = _decode("properties", envelope.properties)
    changes: dict[str, Any] = {}
    if row.scheduled and headers.get("eta"):
        headers["catga_eta"], headers["eta"] = headers["eta"], None
        changes["headers"] = json.dumps(headers)
    if envelope.expiration is not None:
        if not math.isfinite(envelope.expiration):
            message = f"The row's expiration is {envelope.expiration}, not a number of seconds."
            raise MessageRejected(message)
        properties["expiration"] = str(max(0, int((envelope.expiration - row.age) * 1000)))
        changes["properties"] = json.dumps(properties)
    return envelope._replace(**changes) if changes else envelope


def virtual_message(envelope: Envelope, tag: str) -> str:
    """Return the JSON that kombu's virtual transports (Redis) put on a queue, without building it as objects.

    The shape is kombu's own (`kombu.transport.virtual.Channel.prepare_message`); a test compares the two. `tag` is new
    for each publish, for it names one delivery in Redis' table of unacknowledged ones.
    """
    head, delivery_info = _frame(
        envelope.content_encoding, envelope.content_type, envelope.exchange, envelope.routing_key
    )
    properties = "{" if envelope.properties == "{}" else f"{envelope.properties[:-1]}, "
    return (
        f'{{"body": "{base64.b64encode(envelope.body).decode("ascii")}", {head}, "headers": {envelope.headers}, '
        f'"properties": {properties}"delivery_info": {delivery_info}, '
        f'"priority": {envelope.priority or 0}, "body_encoding": "base64", "delivery_tag": "{tag}"}}}}'
    )


@lru_cache(maxsize=1024)
def _frame(content_encoding: str, content_type: str, exchange: str, routing_key: str) -> tuple[str, str]:
    """Return the parts of a virtual message that are the same for all messages of a queue."""
    head = f'"content-encoding": {json.dumps(content_encoding)}, "content-type": {json.dumps(content_type)}'
    return head, json.dumps({"exchange": exchange, "routing_key": routing_key})


_decoder = json.JSONDecoder()


def _decode(what: str, text: str) -> dict[str, Any]:
    try:
        # A relay does this with every row. `json.loads` takes twice the time, for the white space around a value.
        value, end = _decoder.raw_decode(text) if text[:1] == "{" else (None, -1)
        if end != len(text):
            value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"The row's {what} can't be decoded: {error}"
        raise MessageRejected(message) from error
    if not isinstance(value, dict):
        message = f"The row's {what} must be a JSON object, not {type(value).__name__}."
        raise MessageRejected(message)
    return value
