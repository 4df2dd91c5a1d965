"""What several integration tests start from: a migrated database, and a site with relays to be killed."""

from __future__ import annotations

import pytest
from redis import Redis
from sqlalchemy import create_engine

from catga_tasks import migrate
from tests.integration.relay_children import Nursery, Site


@pytest.fixture
def engine(database_url):
    """The engine of a migrated database of each kind."""
    engine = create_engine(database_url)
    migrate.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def broker(redis_url):
    """A client of the empty Redis database."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as running:
        yield running


@pytest.fixture
def site(nursery, postgres_url, redis_url, tmp_path):
    with Site(nursery, postgres_url, redis_url, tmp_path) as running:
        yield running
