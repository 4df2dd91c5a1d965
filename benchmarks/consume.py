"""How fast does a consumer take and acknowledge messages, with our Redis transport and with kombu's?"""

from __future__ import annotations

from kombu import Connection, Queue

from benchmarks.bench import Bench, Row, rounds, seconds


def run(bench: Bench, *, quick: bool) -> list[Row]:
    count = 200 if quick else 3000

    def consume(transport):
        with Connection(bench.broker, transport=transport) as connection:
            producer = connection.Producer()
            Queue("bench")(connection.default_channel).declare()
            for number in range(count):
                producer.publish({"n": number}, routing_key="bench")
            left = count

            def take(_, message):
                nonlocal left
                message.ack()
                left -= 1

            def drain():
                while left:
                    connection.drain_events(timeout=10)

            with connection.Consumer(Queue("bench"), callbacks=[take], prefetch_count=16):
                return count / seconds(drain)

    one, two = rounds(
        1 if quick else 5,
        lambda: consume("catga_tasks.brokers.redis_transport:Transport"),
        lambda: consume("kombu.transport.redis:Transport"),
    )
    bench.empty()
    name = "consume and acknowledge over Redis, messages a second; kombu's transport"
    return [Row(name, f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.1f}x")]
