"""The documentation's examples run, in the order in which a reader meets them.

A fenced block's first words say what becomes of it: `python file=shop.py` is written to that file, `python` is run,
`console` holds commands after a dollar sign, each with lines that its output must contain (a command that ends in `&`
goes on in the background), `text expect` is what those background commands must print. Other blocks are not run.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from catga_tasks import cli
from catga_tasks.brokers.nats_settings import NatsSettings
from catga_tasks.config import Settings
from tests.processes import ROOT, Process
from tests.waiting import wait_until
from workers.servers import NatsServer, ServerMissingError, free_port

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\S[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REDIS, POSTGRES = "redis://127.0.0.1:6379/0", "postgresql+psycopg://127.0.0.1/shop"
NATS = "nats://127.0.0.1:4222"
DEV = "outbox dev"


class Reader:
    """Somebody who does what the page says, in a folder of their own."""

    def __init__(self, folder: Path, addresses: dict[str, str]):
        self.folder = folder
        self.addresses = addresses
        self.background: list[Process] = []
        self.count = 0

    def do(self, kind: str, content: str) -> None:
        for written, real in self.addresses.items():
            content = content.replace(written, real)
        words = kind.split()
        if words[0] == "python" and len(words) == 2:
            (self.folder / words[1].removeprefix("file=")).write_text(content)
        elif kind == "python":
            self.start(sys.executable, "-W", "error::DeprecationWarning", "-c", content)
            self.finish(self.background.pop(), content)
        elif kind == "console":
            self.console(content)
        elif kind == "text expect":
            for line in content.splitlines():
                wait_until(lambda line=line: any(line in each.log() for each in self.background), what=line)

    def console(self, content: str) -> None:
        for step in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            waits = not command.endswith("&")
            self.start("bash", "-c", command if waits else f"exec {command.rstrip(' &')}")
            if waits:
                printed = self.finish(self.background.pop(), command)
                for line in expected.splitlines():
                    assert line.strip() in printed, f"{command}\nprinted\n{printed}\nwithout\n{line}"

    def start(self, *command: str) -> None:
        self.count += 1
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        log = self.folder / f"output-{self.count}.log"
        self.background.append(Process(list(command), log, env={"PATH": path, "COLUMNS": "200"}, cwd=self.folder))

    def finish(self, process: Process, what: str) -> str:
        status = process.wait_exit(60)
        assert status == 0, f"{what}\nended with {status}:\n{process.log()}"
        return process.log()

    def leave(self) -> None:
        for process in self.background:
            process.terminate()
        for process in self.background:
            process.wait_exit(30)


@pytest.fixture
def own_nats():
    """A server without queues of other pages and tests."""
    try:
        with NatsServer() as server:
            yield server.url
    except ServerMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_run(page, tmp_path, redis_url, postgres_url, request):
    text = page.read_text()
    addresses = {REDIS: redis_url, POSTGRES: postgres_url}
    if any(DEV in content for _, content in BLOCK.findall(text)):  # it brings a server
        addresses |= {NATS: f"nats://127.0.0.1:{free_port()}", DEV: f"{DEV} --flower-port {free_port()}"}
    elif NATS in text:
        addresses[NATS] = request.getfixturevalue("own_nats")
    reader = Reader(tmp_path, addresses)
    try:
        for kind, content in BLOCK.findall(text):
            reader.do(kind.strip(), content)
    finally:
        reader.leave()
    if reader.background:
        printed = "".join(process.log() for process in reader.background)
        assert "Traceback" not in printed, printed


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_setting_is_in_the_reference():
    rows = dict(
        re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", (ROOT / "docs/reference/settings.md").read_text(), re.MULTILINE)
    )
    defaults = Settings()
    assert rows == {name: str(getattr(defaults, name)) for name in Settings.__slots__}


def test_every_option_of_nats_is_in_the_reference():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs/reference/nats.md").read_text(), re.MULTILINE))
    assert rows == {field.name: str(field.default) for field in fields(NatsSettings)}


def commands(group: click.Group, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_option_is_in_the_reference():
    reference = (ROOT / "docs/reference/command-line.md").read_text()
    for name, command in commands(cli.outbox):
        _, found, section = reference.partition(f"## `outbox {name}`\n")
        assert found, name
        section = section.partition("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else []:
                assert f"`{option}" in section, f"outbox {name} {option}"
