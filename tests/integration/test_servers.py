"""The servers that demo, benchmarks and tests run on."""

from __future__ import annotations

import psutil
import psycopg
import pytest
import redis


def libpq(url: str) -> str:
    return url.replace("+psycopg", "")


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_postgres_keeps_commits(own_postgres, end):
    """A commit outlives a restart and a SIGKILL of the server."""
    server = own_postgres()
    url = libpq(server.create_database("kept"))
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE t (a int)")
    if end == "kill":
        server.kill()
        server.start()
    else:
        server.restart()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_redis_keeps_writes(own_redis):
    """A write that Redis answered outlives its SIGKILL."""
    server = own_redis()
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", 1)
    server.kill()
    server.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"1"


def test_a_stopped_server_leaves_nothing(own_redis, own_postgres):
    """After stop there is no process and no folder left."""
    for server in (own_redis(), own_postgres()):
        pid = server._process.pid
        server.stop()
        assert not psutil.pid_exists(pid)
        assert not server.directory.exists()
