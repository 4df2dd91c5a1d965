"""How long do the Outbox tab's pages take in a full outbox, and what does looking once a second cost the relay?

A million messages and a tenth as many dead letters. Beside them, in turns, is a page of Flower's own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import text

from benchmarks.bench import Bench, Row, rounds, seconds
from catga_tasks.tables import MESSAGE_COLUMNS
from workers.servers import die_with_parent, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FILL = """
INSERT INTO catga_outbox (task_id, task, queue, exchange, routing_key, content_type, content_encoding, headers,
    properties, body, send_event, attempts, available_at)
SELECT 'id-' || n, 'charge', CASE WHEN n % 10 = 0 THEN 'mails' ELSE 'celery' END, '', 'celery', 'application/json',
    'utf-8', '{"task": "charge", "argsrepr": "(' || n || ', ''somebody@example.org'')", "kwargsrepr": "{}", '
    || '"origin": "gen1@host", "filler": "' || repeat('x', 300) || '"}', '{}', '[[1], {}, {}]', false,
    CASE WHEN n % 1000 = 0 THEN 1 ELSE 0 END, clock_timestamp() + make_interval(secs => 86400 + n)
FROM generate_series(1, :rows) AS n
"""
_NAMES = ", ".join(name for name in MESSAGE_COLUMNS if name != "id")
BURY = f"""
INSERT INTO catga_dead_letters (id, {_NAMES}, died_at, error)
SELECT -id, {_NAMES}, clock_timestamp(), 'the broker refused it' FROM catga_outbox ORDER BY id LIMIT :rows
"""
#: A page of each kind; what is looked for isn't there, so that the search goes as far as one page's does.
PAGES = {
    "the tab": "/outbox",
    "its numbers": "/outbox/api/summary",
    "the list": "/outbox/api/messages",
    "a far page": "/outbox/api/messages?before={middle}",
    "retrying": "/outbox/api/messages?state=retrying",
    "dead letters": "/outbox/api/messages?state=dead",
    "a filter": "/outbox/api/messages?task=no.such&queue=mails",
    "a search": "/outbox/api/messages?text=nobody%40example.org",
    "a message": "/outbox/message/{middle}",
}
MILLISECONDS, PERCENT = 200, 2


def run(bench: Bench, *, quick: bool) -> list[Row]:
    many = 5_000 if quick else 1_000_000
    bench.empty()
    with bench.engine.begin() as connection:
        connection.execute(text(FILL), {"rows": many})
        connection.execute(text(BURY), {"rows": many // 10})
        middle = connection.execute(text("SELECT max(id) - :half FROM catga_outbox"), {"half": many // 2}).scalar_one()
    with bench.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    with flower(bench) as url:
        rows = pages(url, middle, many, times=3 if quick else 30)
        rows.append(polled(bench, url, rows=500 if quick else 40_000, times=1 if quick else 41))
    bench.empty()
    return rows


def pages(url: str, middle: int, many: int, *, times: int) -> list[Row]:
    """The slowest of the tab's pages, by its median, against the page that Flower opens with."""
    medians = {}
    for name, path in PAGES.items():
        ours = url + path.format(middle=middle)
        medians[name] = [
            1000 * each for each in rounds(times, lambda at=ours: fetch(at), lambda: fetch(f"{url}/workers"))
        ]
    print("\n".join(f"{name}: {ours:.1f} ms" for name, (ours, _) in medians.items()), file=sys.stderr)
    slowest = max(medians, key=lambda name: medians[name][0])
    ours, theirs = medians[slowest]
    met = ours < MILLISECONDS
    name = f"the slowest page of the Outbox tab ({slowest}), {many:,} messages; Flower's workers page"
    return [
        Row(name, f"{ours:.0f} ms", f"{theirs:.0f} ms", f"{ours / theirs:.1f}x", f"< {MILLISECONDS} ms", met)
    ]  # fmt: skip


def polled(bench: Bench, url: str, *, rows: int, times: int) -> Row:
    """A relay's rate with somebody who looks once a second, and without, in turns."""
    task = bench.ours.tasks["charge"]
    task.typing = False
    arguments = [(number, "somebody@example.org", 100) for number in range(rows)]

    def relay() -> float:
        task.delay_many(arguments)
        return rows / seconds(bench.ours.relay().run_once)

    def watched() -> float:
        with looking(f"{url}/outbox/api/summary"):
            return relay()

    found = [(watched(), relay()) if turn % 2 else (relay(), watched())[::-1] for turn in range(times)]
    ours, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(one / other for one, other in found)
    name = "relay, rows a second with the tab open; nobody looking"
    return Row(name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ratio:.2f}x",
               f"≥ {1 - PERCENT / 100:.2f}x", ratio >= 1 - PERCENT / 100)  # fmt: skip


def fetch(url: str) -> float:
    """How long an answer takes."""

    def get() -> None:
        with urllib.request.urlopen(url, timeout=60) as answer:
            answer.read()

    return seconds(get)


@contextmanager
def looking(url: str) -> Iterator[None]:
    """Ask once a second, as an open tab does."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            fetch(url)
            stop.wait(1)

    asking = threading.Thread(target=ask)
    asking.start()
    yield
    stop.set()
    asking.join()


@contextmanager
def flower(bench: Bench) -> Iterator[str]:
    """Run Flower; yield its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.worker_app", "outbox", "flower", f"--port={port}",
               "--address=127.0.0.1"]  # fmt: skip
    given = {"BENCH_KIND": "at_least_once", "BENCH_URL": bench.broker, "BENCH_DATABASE": bench.database}
    process = subprocess.Popen(
        command, env={**os.environ, **given}, preexec_fn=die_with_parent, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                fetch(f"{url}/outbox")
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)
