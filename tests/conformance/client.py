"""A client of a broker in a process of its own: `client KIND URL OWN COMMAND JSON`. It says "ready" when it is done."""

from __future__ import annotations

import json
import sys

from kombu import Exchange

from tests.conformance.brokers import BROKERS
from tests.conformance.messages import came, consuming, drained


def hold(connection, *, queue, count):
    """Take so many messages and keep them unacknowledged until the process is killed."""
    came(connection, consuming(connection, queue), count)
    ready()
    while True:
        drained(connection)


def publish(connection, *, exchange, kind, keys):
    """Publish each key as a message to the exchange, of which this process knows no binding."""
    declared = Exchange(exchange, type=kind)
    for key in keys:
        connection.Producer().publish(key, exchange=declared, routing_key=key, serializer="json", declare=[declared])
    ready()


def ready():
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def main(name, url, own, command, arguments):
    import catga_tasks  # noqa: F401 - it brings the transports

    broker = BROKERS[name](url)
    broker.own = own
    with broker.connect() as connection:
        {"hold": hold, "publish": publish}[command](connection, **json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
