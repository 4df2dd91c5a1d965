"""The demo ends with the truth: equal numbers and status 0, or what was lost or wrongly sent and status 1."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from tests.processes import ROOT
from tests.waiting import wait_until
from workers.audit import audit
from workers.models import Base, Delivery, Order, Payment, RolledBack

LINE = re.compile(r"(\d+) committed, (\d+) delivered, (\d+) lost, (\d+) rolled back, (\d+) of them sent")
TASKS = ("charge", "send_receipt", "move_stock")


@pytest.fixture
def directory():
    """A temporary folder that PostgreSQL's account may enter, too; nothing is left in it."""
    path = Path(tempfile.mkdtemp(prefix="catga-test-demo-"))
    path.chmod(0o755)
    yield path
    left = [entry.name for entry in path.iterdir()]
    shutil.rmtree(path, ignore_errors=True)
    assert left == []


@pytest.fixture
def start_demo(directory):
    """Start the demo; nothing of it runs afterwards. Its processes are known by a mark or by their folder."""
    mark = uuid.uuid4().hex
    started = []

    def start(*arguments):
        environment = {**os.environ, "TMPDIR": str(directory), "DEMO_MARK": mark, "PYTHONPATH": str(ROOT)}
        demo = subprocess.Popen(
            [sys.executable, "-m", "workers.demo", *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(demo)
        return demo

    start.running = lambda: _marked(mark, str(directory))
    yield start
    for demo in started:
        if demo.poll() is None:
            demo.kill()
        demo.communicate()
    for pid in _marked(mark, str(directory)):
        os.kill(pid, signal.SIGKILL)


def _marked(*marks):
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if any(mark.encode() in text for mark in marks):
            found.append(int(process.name))
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@linux
@pytest.mark.timeout(200)
@pytest.mark.parametrize("servers", [(), ("--database", "postgresql", "--broker", "redis")], ids=["default", "servers"])
def test_demo_delivers_all_and_leaves_nothing(start_demo, servers):
    demo = start_demo("--orders", "200", *servers)
    wait_until(lambda: len(start_demo.running()) > 4, what="the demo's processes are found by their marks")
    output, errors = demo.communicate(timeout=170)

    assert demo.returncode == 0, output + errors
    committed, delivered, lost, rolled_back, sent = map(int, LINE.fullmatch(output.splitlines()[-1]).groups())
    assert committed == delivered > 400
    assert ("SQLite and NATS" in output) == (not servers)
    assert (lost, sent) == (0, 0)
    assert rolled_back > 0
    assert committed == 3 * (200 - rolled_back)
    assert re.search(r"Duplicate deliveries\W+\d+", output)
    assert re.search(r"Workers killed\W+1\b", output)
    assert re.search(r"Relays killed\W+1\b", output)
    # The kernel takes its time with the children of the killed.
    wait_until(lambda: not start_demo.running(), deadline=5, what="no process of the demo remains")


@linux
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["servers", "load"])
def test_interrupted_demo_leaves_nothing(start_demo, directory, number, status, moment):
    demo = start_demo("--orders", "100000", *(("--database", "postgresql") if moment == "servers" else ()))
    seen = "catga-postgresserver-*" if moment == "servers" else "catga-demo-*/worker-2.log"
    wait_until(lambda: list(directory.glob(seen)), deadline=60, every=0.005, what=seen)
    demo.send_signal(number)
    output, errors = demo.communicate(timeout=60)

    assert demo.returncode == status, output + errors
    assert "Traceback" not in errors
    # The kernel takes its time with the children of the killed.
    wait_until(lambda: not start_demo.running(), deadline=5, what="no process of the demo remains")


@pytest.fixture
def session(database_url):
    """A shop with one order, whose tasks have all run, and one that was rolled back."""
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Order(id="good", amount=100))
        session.flush()
        session.add_all([Payment(order_id="good", amount=100), RolledBack(order_id="bad")])
        session.add_all(Delivery(task=task, order_id="good") for task in TASKS)
        session.flush()
        yield session
    engine.dispose()


def test_audit_of_a_good_shop(session):
    count = audit(session)
    assert count.line == "3 committed, 3 delivered, 0 lost, 1 rolled back, 0 of them sent"
    assert count.status == 0


@pytest.mark.parametrize("task", TASKS)
def test_audit_sees_a_lost_task(session, task):
    session.query(Delivery).filter_by(task=task).delete()
    # A second run of another task must not make up for it.
    session.add(Delivery(task=next(other for other in TASKS if other != task), order_id="good"))
    count = audit(session)
    assert count.line == "3 committed, 2 delivered, 1 lost, 1 rolled back, 0 of them sent"
    assert (count.status, count.duplicates) == (1, 1)


@pytest.mark.parametrize("order_id", ["bad", "unheard-of"])
def test_audit_sees_a_task_without_a_right_to_run(session, order_id):
    session.add(Delivery(task="charge", order_id=order_id))
    count = audit(session)
    assert count.line == "3 committed, 3 delivered, 0 lost, 1 rolled back, 1 of them sent"
    assert count.status == 1


def test_audit_counts_duplicates(session):
    session.add_all(Delivery(task="charge", order_id="good") for _ in range(2))
    count = audit(session)
    assert (count.duplicates, count.delivered, count.status) == (2, 3, 0)
