"""A stored message as it goes out."""

from __future__ import annotations

import base64
import json

import pytest
from kombu import Connection

from catga_tasks.envelope import Envelope, Row, outgoing, virtual_message
from catga_tasks.errors import MessageRejected


def envelope(**changes):
    values = {
        "task_id": "1", "task": "charge", "queue": "celery", "exchange": "", "routing_key": "celery", "priority": None,
        "content_type": "application/json", "content_encoding": "utf-8", "headers": '{"id": "1"}',
        "properties": '{"correlation_id": "1", "delivery_mode": 2}', "body": b'[[1], {}, {"chain": null}]',
    }  # fmt: skip
    return Envelope(**{**values, **changes})


def test_nothing_changes_on_the_way_out():
    row = Row(1, envelope())
    assert outgoing(row) is row.envelope


def test_an_eta_that_has_come_is_taken_out_and_kept():
    sent = outgoing(Row(1, envelope(headers='{"id": "1", "eta": "2026-01-01T00:00:00+00:00"}'), scheduled=True))
    assert json.loads(sent.headers) == {"id": "1", "eta": None, "catga_eta": "2026-01-01T00:00:00+00:00"}


def test_the_time_to_live_runs_while_the_row_waits():
    sent = outgoing(Row(1, envelope(expiration=10.0), age=7.5))
    assert json.loads(sent.properties)["expiration"] == "2500"
    assert json.loads(outgoing(Row(1, envelope(expiration=10.0), age=60)).properties)["expiration"] == "0"


@pytest.mark.parametrize("changes", [{"headers": "{"}, {"headers": "[]"}, {"properties": "x"}, {"properties": "3"}])
def test_06_garbage_is_refused(changes):
    with pytest.raises(MessageRejected, match=r"The row's (headers|properties)"):
        outgoing(Row(1, envelope(**changes)))


@pytest.mark.parametrize("body", [b'[[1], {}, {"chain": null}]', b"\x00\xff\x80binary", b""])
@pytest.mark.parametrize("priority", [None, 0, 6])
@pytest.mark.parametrize("properties", ["{}", '{"correlation_id": "1", "reply_to": "\\u00fc"}'])
def test_the_message_is_the_one_that_kombu_makes(body, priority, properties):
    """Compared with what kombu's virtual channel prepares from the same parts, but for the random delivery tag."""
    stored = envelope(body=body, priority=priority, properties=properties)
    with Connection("memory://") as connection:
        channel = connection.default_channel
        plain = channel.prepare_message(
            body, priority, stored.content_type, stored.content_encoding,
            json.loads(stored.headers), json.loads(properties),
        )  # fmt: skip
        channel._inplace_augment_message(plain, "", "celery")
    sent = json.loads(virtual_message(stored, "tag-1"))
    assert sent["properties"].pop("delivery_tag") == "tag-1"
    assert plain["properties"].pop("delivery_tag")
    assert sent == plain
    assert base64.b64decode(sent["body"]) == body
