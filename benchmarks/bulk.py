"""How many messages a second does `delay_many` enqueue, and `delay` in a loop?"""

from __future__ import annotations

from benchmarks.bench import Bench, Row, rounds, seconds


def run(bench: Bench, *, quick: bool) -> list[Row]:
    many, few = (1000, 100) if quick else (20_000, 1000)
    ours, plain = bench.ours.tasks["charge"], bench.plain.tasks["charge"]
    ours.typing = plain.typing = False  # positional arguments alone, as delay_many takes them
    arguments = [(number, "somebody@example.org", 100) for number in range(many)]

    def direct():
        for args in arguments[:few]:
            plain.delay(*args)

    count = 1 if quick else 7
    one, two = rounds(count, lambda: many / seconds(lambda: ours.delay_many(arguments)), lambda: few / seconds(direct))
    bench.empty()
    return [Row("delay_many, messages a second", f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.1f}x", "≥ 20x",
                one / two >= 20)]  # fmt: skip
