"""How Celery's own commands end."""

from __future__ import annotations

import sys

import pytest
from kombu.exceptions import OperationalError

from catga_tasks import ConfigurationError
from catga_tasks.commands import _excepthook
from catga_tasks.errors import BrokerUnavailable


def ending(error, capsys):
    """What is printed when the error ends a command."""
    _excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


def test_an_error_of_ours_is_one_line(capsys):
    """Also one that kombu has put another around."""
    assert ending(ConfigurationError("broker_url:\n no."), capsys) == "Error: broker_url: no.\n"
    around = OperationalError("it is away")
    around.__cause__ = BrokerUnavailable("it is away")
    assert ending(around, capsys) == "Error: it is away\n"
    assert sys.excepthook is _excepthook


def test_another_error_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert "Traceback" in ending(caught.value, capsys)
