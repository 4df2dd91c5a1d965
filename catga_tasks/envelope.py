"""What is a message, as a row and on the wire?"""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from catga_tasks.errors import MessageRejected

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Envelope:
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
    #: Not before this many seconds from the insert, by the database's clock ...
    delay: float = 0.0
    #: ... or not before this moment.
    eta: datetime | None = None


#: The columns that a row and its envelope share, in the order of `Envelope`'s fields.
STORED = tuple(field.name for field in fields(Envelope) if field.name not in ("delay", "eta"))


@dataclass(frozen=True, slots=True)
class Row:
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
        properties["expiration"] = str(max(0, int((envelope.expiration - row.age) * 1000)))
        changes["properties"] = json.dumps(properties)
    return replace(envelope, **changes) if changes else envelope


def virtual_message(envelope: Envelope) -> str:
    """Return the JSON that kombu's virtual transports (Redis) put on a queue, without building it as objects.

    The shape is kombu's own (`kombu.transport.virtual.Channel.prepare_message`); a test compares the two. The
    delivery tag is made afresh for each publish, for it names one delivery in Redis' table of unacknowledged ones.
    """
    body = base64.b64encode(envelope.body).decode("ascii")
    delivery_info = json.dumps({"exchange": envelope.exchange, "routing_key": envelope.routing_key})
    separator = ", " if envelope.properties != "{}" else ""
    return (
        f'{{"body": "{body}", "content-encoding": {json.dumps(envelope.content_encoding)}, '
        f'"content-type": {json.dumps(envelope.content_type)}, "headers": {envelope.headers}, '
        f'"properties": {envelope.properties[:-1]}{separator}"delivery_info": {delivery_info}, '
        f'"priority": {envelope.priority or 0}, "body_encoding": "base64", "delivery_tag": "{uuid.uuid4()}"}}}}'
    )


def _decode(what: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        message = f"The row's {what} can't be decoded: {error}"
        raise MessageRejected(message) from error
    if not isinstance(value, dict):
        message = f"The row's {what} must be a JSON object, not {type(value).__name__}."
        raise MessageRejected(message)
    return value
