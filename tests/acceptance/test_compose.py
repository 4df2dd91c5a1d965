"""docker-compose.yml says what the code can do; whether Docker runs it, Docker must show."""

from __future__ import annotations

import click
import yaml
from celery.bin.celery import celery

from catga_tasks import cli
from tests.processes import ROOT

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_every_lasting_service_has_a_health_check():
    assert SERVICES.keys() >= {"postgres", "redis", "nats", "worker", "relay", "flower"}
    lasting = {name for name, service in SERVICES.items() if service.get("restart") != "no"}
    assert [name for name in lasting if "healthcheck" not in SERVICES[name]] == []


def test_its_commands_parse():
    """Each celery command's options are ones that the command knows."""
    commands = [service["command"] for service in SERVICES.values() if service.get("command", [""])[0] == "celery"]
    assert len(commands) >= 4
    for command in commands:
        rest = command[3:]
        found: click.Command = cli.outbox if rest[0] == "outbox" else celery.commands.get(rest[0])
        if rest[0] == "flower":
            continue
        rest = rest[1:]
        while isinstance(found, click.Group):
            found, rest = found.commands[rest[0]], rest[1:]
        known = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, command
