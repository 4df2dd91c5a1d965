"""The benchmarks run; what they measure is for people to read, and nothing here asserts a time."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.processes import ROOT


def test_every_benchmark_runs(tmp_path):
    table = tmp_path / "results.md"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", "--quick", "--markdown", table],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in table.read_text().splitlines() if re.match(r"\| [a-z]", line)]
    assert len(rows) >= 13
    for row in rows:
        for number in row[1:3]:
            assert float(re.match(r"[\d.,]+", number)[0].replace(",", "")) > 0, row
        assert re.fullmatch(r"[\d.]+x", row[3]), row
