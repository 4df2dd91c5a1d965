"""kombu over NATS JetStream and over kombu's own Redis transport: publish, consume, and the relay."""

from __future__ import annotations

from kombu import Connection, Queue

from benchmarks.bench import Bench, Row, rounds, seconds
from catga_tasks import Catga
from workers.servers import NatsServer

BODY = {"order": 1, "text": "x" * 800}
KOMBU = "kombu.transport.redis:Transport"


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count, many = (200, 500) if quick else (3000, 20_000)
    with NatsServer() as server:
        app = Catga("nats", broker=server.url, outbox=bench.engine, set_as_current=False)
        app.task(name="charge", shared=False, ignore_result=True)(charge)

        def publish(url, transport=None):
            with Connection(url, transport=transport) as connection:
                producer = connection.Producer()
                Queue("bench")(connection.default_channel).declare()
                return count / seconds(lambda: [producer.publish(BODY, routing_key="bench") for _ in range(count)])

        def batched():
            with Connection(server.url) as connection:
                producer = connection.Producer()
                Queue("batched")(connection.default_channel).declare()

                def publish():
                    with producer.batch():
                        for _ in range(count):
                            producer.publish(BODY, routing_key="batched")

                return count / seconds(publish)

        def consume(url, transport=None):
            with Connection(url, transport=transport) as connection:
                left = count

                def take(_, message):
                    nonlocal left
                    message.ack()
                    left -= 1

                def drain():
                    while left:
                        connection.drain_events(timeout=10)

                with connection.Consumer(Queue("bench"), callbacks=[take], prefetch_count=64):
                    return count / seconds(drain)

        def relay():
            app.tasks["charge"].delay_many([(number,) for number in range(many)])
            return many / seconds(app.relay().run_once)

        one, other, together, taken, theirs, rows = rounds(
            1 if quick else 5,
            lambda: publish(server.url),
            lambda: publish(bench.broker, KOMBU),
            batched,
            lambda: consume(server.url),
            lambda: consume(bench.broker, KOMBU),
            relay,
        )
    bench.empty()
    return [
        Row("publish over NATS, confirmed one by one; kombu's Redis", f"{one:,.0f}", f"{other:,.0f}",
            f"{one / other:.2f}x", "≥ 0.5x", one / other >= 0.5),
        Row("publish over NATS in kombu's batches; one by one", f"{together:,.0f}", f"{one:,.0f}",
            f"{together / one:.1f}x", "≥ 5x", together / one >= 5),
        Row("consume and acknowledge over NATS; kombu's Redis", f"{taken:,.0f}", f"{theirs:,.0f}",
            f"{taken / theirs:.1f}x", "≥ 5x", taken / theirs >= 5),
        Row("relay to NATS, rows a second; confirmed one by one", f"{rows:,.0f}", f"{one:,.0f}", f"{rows / one:.1f}x",
            "≥ 20,000/s", rows >= 20_000),
    ]  # fmt: skip


def charge(order):
    """Do nothing."""
