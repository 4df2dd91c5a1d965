"""Every test runs against every broker; `needs` names what one of them may lack."""

from __future__ import annotations

import json

import pytest

from tests.conformance.brokers import BROKERS
from tests.waiting import wait_until
from workers.proxy import Proxy
from workers.servers import ServerMissingError


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*abilities): left out for brokers that can't, with the reason")
    config.addinivalue_line("markers", "defect(broker, reason): fails with this broker until that is mended")


def pytest_generate_tests(metafunc):
    if "broker_kind" not in metafunc.fixturenames:
        return
    wanted = [ability for mark in metafunc.definition.iter_markers("needs") for ability in mark.args]
    for ability in wanted:
        assert any(ability in kind.CANNOT for kind in BROKERS.values()), f"every broker can {ability!r}"
    params = []
    for name, kind in BROKERS.items():
        reasons = [kind.CANNOT[ability] for ability in wanted if ability in kind.CANNOT]
        marks = [pytest.mark.skip(reason=f"{name}: {'; '.join(reasons)}")] if reasons else []
        defects = [mark.args[1] for mark in metafunc.definition.iter_markers("defect") if mark.args[0] == name]
        marks += [pytest.mark.xfail(reason=reason, strict=True) for reason in defects]
        params.append(pytest.param(kind, id=name, marks=marks))
    metafunc.parametrize("broker_kind", params)


@pytest.fixture
def broker(broker_kind, request):
    """The broker on the shared server."""
    broker = broker_kind(request.getfixturevalue(f"{broker_kind.name}_server"))
    yield broker
    broker.close()
    broker.clean()


@pytest.fixture
def start(broker_kind):
    """Starts the broker's server for this test alone: `start(password=...)`."""
    started = []

    def start(**options):
        try:
            broker = broker_kind.started(**options)
        except ServerMissingError as error:
            pytest.skip(f"{broker_kind.name} can't be started here: {error}")
        started.append(broker)
        return broker

    yield start
    for broker in started:
        broker.server.resume()
        broker.close()
        broker.server.stop()


@pytest.fixture
def client(broker, processes):
    """Starts a client of the broker in a process of its own: see tests/conformance/client.py."""

    def start(command, **arguments):
        process = processes.python(
            "-m", "tests.conformance.client", broker.name, broker.url, broker.own, command, json.dumps(arguments)
        )
        wait_until(lambda: "ready" in process.log() or not process.alive(), what="the client")
        assert "ready" in process.log(), process.log()
        return process

    return start


@pytest.fixture
def proxied(broker):
    """The broker behind a proxy that can cut its connections."""
    with Proxy(broker.url) as proxy:
        yield proxy
