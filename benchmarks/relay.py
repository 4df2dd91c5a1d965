"""How fast does the relay bring rows from PostgreSQL to Redis? Against a `send_task` a row, as simpler outboxes do."""

from __future__ import annotations

from benchmarks.bench import Bench, Row, rounds, seconds


def run(bench: Bench, *, quick: bool) -> list[Row]:
    many, few = (1000, 100) if quick else (30_000, 1000)
    task = bench.ours.tasks["charge"]
    task.typing = False
    arguments = [(number, "somebody@example.org", 100) for number in range(many)]

    def relay():
        task.delay_many(arguments)
        return many / seconds(bench.ours.relay().run_once)

    def sends():
        for args in arguments[:few]:
            bench.plain.send_task("charge", args)

    one, two = rounds(1 if quick else 5, relay, lambda: few / seconds(sends))
    bench.empty()
    return [Row("relay, rows a second; send_task a row", f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.1f}x",
                "≥ 30,000/s or 12x", one >= 30_000 or one / two >= 12)]  # fmt: skip
