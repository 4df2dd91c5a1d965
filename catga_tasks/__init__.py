"""Celery, with tasks that commit with your data."""

from catga_tasks.app import Catga
from catga_tasks.current import current_session
from catga_tasks.errors import (
    CatgaError,
    ConfigurationError,
    MigrationRequired,
    OutboxUnavailable,
    TransactionRequired,
)

__all__ = [
    "Catga",
    "CatgaError",
    "ConfigurationError",
    "MigrationRequired",
    "OutboxUnavailable",
    "TransactionRequired",
    "current_session",
]
