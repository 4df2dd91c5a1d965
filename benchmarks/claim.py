"""Does a claim slow down with a backlog? A thousand rows against a million, and a million that are due later."""

from __future__ import annotations

import statistics

from sqlalchemy import text

from benchmarks.bench import Bench, Row, seconds
from catga_tasks import outbox

FILL = """
INSERT INTO catga_outbox (task_id, task, queue, exchange, routing_key, content_type, content_encoding, headers,
    properties, body, send_event, available_at)
SELECT 'id-' || n, 'charge', 'celery', '', 'celery', 'application/json', 'utf-8', '{}', '{}', '[[1], {}, {}]', false,
    clock_timestamp() + make_interval(secs => :offset + n / 1000.0)
FROM generate_series(1, :rows) AS n
"""


def run(bench: Bench, *, quick: bool) -> list[Row]:
    many = 10_000 if quick else 1_000_000
    few, few_plan = claimed(bench, 1000, 0)
    backlog, plan = claimed(bench, many, many)
    bench.empty()
    same = plan == few_plan == "Index Scan"
    return [Row(f"claim of 500, {many:,} due and {many:,} later; 1,000 due", f"{backlog:.1f} ms", f"{few:.1f} ms",
                f"{backlog / few:.2f}x", "the plan stays an index scan", same)]  # fmt: skip


def claimed(bench: Bench, due: int, later: int) -> tuple[float, str]:
    """Fill the table; return the median of a claim in ms, and how its plan reads the table."""
    bench.empty()
    with bench.engine.begin() as connection:
        connection.execute(text(FILL), {"rows": due, "offset": -10_000_000})
        if later:
            connection.execute(text(FILL), {"rows": later, "offset": 10_000_000})
    with bench.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE catga_outbox"))
    times = []
    for _ in range(9):
        with bench.engine.begin() as connection:
            times.append(1000 * seconds(lambda connection=connection: outbox.claim(connection, 500)))
    with bench.engine.begin() as connection:
        statement = text(f"EXPLAIN {outbox.claim_statement(connection)}")
        plan = "\n".join(connection.execute(statement, {"limit": 500, "broker": ""}).scalars())
    return statistics.median(times), "Index Scan" if "Index Scan using catga_outbox_due " in plan else plan
