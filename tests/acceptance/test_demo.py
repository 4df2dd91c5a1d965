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

from tests.processes import ROOT
from tests.waiting import wait_until

LINE = re.compile(r"(\d+) committed, (\d+) delivered, (\d+) lost, (\d+) rolled back, (\d+) of them sent, (\d+) doubled")


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
    wait_until(lambda: len(start_demo.running()) > 4, deadline=90, what="the demo's processes are found by their marks")
    output, errors = demo.communicate(timeout=170)

    assert demo.returncode == 0, output + errors
    committed, delivered, lost, rolled_back, sent, doubled = map(int, LINE.fullmatch(output.splitlines()[-1]).groups())
    assert committed == delivered > 800
    assert ("SQLite and NATS" in output) == (not servers)
    assert (lost, sent, doubled) == (0, 0, 0)
    assert rolled_back > 0
    assert re.search(r"Orders committed\W+1\d\d\b", output)
    assert re.search(r"Duplicate deliveries, suppressed by the inbox\W+\d+", output)
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
    wait_until(lambda: list(directory.glob(seen)), deadline=90, every=0.005, what=seen)
    demo.send_signal(number)
    output, errors = demo.communicate(timeout=60)

    assert demo.returncode == status, output + errors
    assert "Traceback" not in errors
    # The kernel takes its time with the children of the killed.
    wait_until(lambda: not start_demo.running(), deadline=5, what="no process of the demo remains")
