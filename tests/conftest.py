"""The servers of the tests: an address in the environment, else a local binary, else a container.

In CI a missing server is an error; elsewhere its tests say that they were left out.
"""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.processes import Processes
from workers.servers import NatsServer, PostgresServer, RedisServer, ServerMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

pytest_plugins = ["catga_tasks.testing", "pytester"]

REDIS_DATABASES = 16


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let reports pass between xdist's processes: they take no lone surrogates, which some tests are about."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def _missing(server: str, reason: object) -> None:
    message = f"{server} is missing: {reason}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def _container(kind: str) -> Iterator[str]:
    try:
        if kind == "postgres":
            from testcontainers.postgres import PostgresContainer

            with PostgresContainer("postgres:18", driver="psycopg") as container:
                yield container.get_connection_url()
        elif kind == "nats":
            from testcontainers.nats import NatsContainer

            with NatsContainer("nats:2.12-alpine", jetstream=True) as container:
                yield container.nats_uri()
        else:
            from testcontainers.redis import RedisContainer

            with RedisContainer("redis:7") as container:
                yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    except Exception as error:  # noqa: BLE001 - whatever Docker says, the server is missing
        _missing(kind, f"no address, no binary, and no container ({error})")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server on which databases may be created."""
    given = os.environ.get("CATGA_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    server = PostgresServer(durable=False)
    try:
        server.start()
    except ServerMissingError:
        with _container("postgres") as url:
            yield url
        return
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of database 0 of a Redis server."""
    given = os.environ.get("CATGA_TEST_REDIS_URL")
    if given:
        yield given
        return
    server = RedisServer()
    try:
        server.start()
    except ServerMissingError:
        with _container("redis") as url:
            yield url
        return
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def nats_server() -> Iterator[str]:
    """The URL of a NATS server with JetStream."""
    given = os.environ.get("CATGA_TEST_NATS_URL")
    if given:
        yield given
        return
    server = NatsServer()
    try:
        server.start()
    except ServerMissingError:
        with _container("nats") as url:
            yield url
        return
    yield server.url
    server.stop()


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """Yield the URL of a new database on this PostgreSQL server."""
    name = f"catga_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    engine.dispose()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A fresh database."""
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A fresh file."""
    return f"sqlite:///{tmp_path / 'catga.db'}"


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database of each kind."""
    return request.getfixturevalue("postgres_url" if request.param == "postgresql" else "sqlite_url")


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """An empty database of the Redis server; one that isn't empty is somebody's, and is left alone."""
    import redis

    base = redis_server.rpartition("/")[0]
    for number in range(1, REDIS_DATABASES):
        url = f"{base}/{number}"
        with redis.Redis.from_url(url) as client:
            if client.dbsize() == 0:
                yield url
                client.flushdb()
                return
    raise RuntimeError("No database of this Redis is empty.")


@pytest.fixture
def own_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Start servers of this test's own, to be killed and restarted."""
    started: list[PostgresServer] = []

    def start(**options: object) -> PostgresServer:
        server = PostgresServer(durable=False, **options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def own_redis() -> Iterator[Callable[..., RedisServer]]:
    """Start Redis servers of this test's own; arguments are redis-server's."""
    started: list[RedisServer] = []

    def start(*arguments: str) -> RedisServer:
        server = RedisServer(*arguments)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def own_nats() -> Iterator[Callable[..., NatsServer]]:
    """Start NATS servers of this test's own; see `NatsServer` for the arguments."""
    started: list[NatsServer] = []

    def start(settings: str = "", **options: object) -> NatsServer:
        server = NatsServer(settings, **options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes, and ends them whatever becomes of the test."""
    running = Processes(tmp_path)
    yield running
    running.end()
