"""What does a call cost, joined to a transaction with its insert and commit, and on its own?"""

from __future__ import annotations

from sqlalchemy.orm import Session

from benchmarks.bench import Bench, Row, rounds, seconds

CALLS = 100  # in one transaction


def run(bench: Bench, *, quick: bool) -> list[Row]:
    times = 1 if quick else 10
    ours, plain = bench.ours.tasks["charge"], bench.plain.tasks["charge"]

    def call(task):
        for number in range(CALLS):
            task.delay(number, "somebody@example.org", amount=100)

    def joined():
        for _ in range(times):
            with Session(bench.engine) as session, session.begin(), bench.ours.outbox.join(session):
                call(ours)

    def alone():
        call(ours)

    def direct():
        for _ in range(times):
            call(plain)

    count = 1 if quick else 7
    one, two, three = rounds(count, lambda: seconds(joined), lambda: seconds(direct), lambda: seconds(alone))
    one, two, three = one / times / CALLS, two / times / CALLS, three / CALLS
    bench.empty()
    return [
        Row("joined delay(), insert and commit included", f"{one * 1e6:.0f} µs", f"{two * 1e6:.0f} µs",
            f"{one / two:.2f}x", "≤ 0.4x", one / two <= 0.4),
        Row("delay() outside a transaction, with its commit", f"{three * 1e6:.0f} µs", f"{two * 1e6:.0f} µs",
            f"{three / two:.2f}x"),
    ]  # fmt: skip
