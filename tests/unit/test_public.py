"""The public names, and the tree of errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kombu.exceptions import OperationalError

import catga_tasks
from catga_tasks import errors
from catga_tasks.producer import OutboxOperationalError


def test_the_public_names_exist():
    assert [name for name in catga_tasks.__all__ if not hasattr(catga_tasks, name)] == []
    assert len(catga_tasks.__all__) <= 12


def test_every_error_is_ours():
    found = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)]
    assert len(found) > 5
    assert all(issubclass(error, errors.CatgaError) for error in found)


def test_an_outage_is_also_celerys_operational_error():
    assert issubclass(OutboxOperationalError, (errors.OutboxUnavailable, OperationalError))


@pytest.mark.parametrize("module", ["redis", "psycopg", "nats", "flower", "opentelemetry", "pytest"])
def test_extras_are_not_imported(module):
    code = f"import sys, catga_tasks; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
