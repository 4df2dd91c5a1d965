"""The short form of `make chaos`: each kind of fault, over NATS and over Redis, and nothing lost or doubled."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.processes import ROOT
from workers.schedule import KINDS

LINE = re.compile(r"(\d+) faults, (\d+) deliveries, (\d+) duplicates, (\d+) suppressed, (\d+) lost, (\d+) doubled")


@pytest.mark.skipif(sys.platform != "linux", reason="servers and children die with their parent only there")
@pytest.mark.timeout(300)
def test_nothing_is_lost_or_doubled():
    """Each kind of fault comes once over each broker, and no effect is missing or there twice."""
    command = [sys.executable, "-m", "workers.chaos", "--seed", "7", "--faults", str(len(KINDS))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    numbers = map(int, LINE.fullmatch(done.stdout.splitlines()[-1]).groups())
    faults, deliveries, duplicates, suppressed, lost, doubled = numbers
    assert faults == 2 * len(KINDS) >= 30
    assert (lost, doubled) == (0, 0)
    assert deliveries > 300
    assert duplicates >= suppressed > 0
    # Every row of the table: both brokers had every kind.
    for kind in KINDS:
        assert re.search(rf"{kind}\W+1\W+1\W", done.stdout), kind
