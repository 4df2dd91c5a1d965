"""Which errors can a user of this package see, and what does each one ask for?

CatgaError
├── ConfigurationError       a setting or an argument is wrong; the message names it and the mend
│   └── MigrationRequired    the tables are missing, older or newer than this release
├── TransactionRequired      `outbox_require_transaction` is set and no transaction is joined
├── OutboxUnavailable        the outbox's database refused or didn't answer
├── MessageRejected          the broker answers, but will not take this message
├── BrokerUnavailable        the broker doesn't answer or refuses every message
└── LeaseLost                another relay took over the rows; what was in hand is theirs now
"""

from __future__ import annotations


class CatgaError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(CatgaError):
    """A setting or an argument is wrong. The message names it and says how to mend it."""


class MigrationRequired(ConfigurationError):
    """The outbox's tables are missing, older or newer than this release needs."""


class TransactionRequired(CatgaError):
    """A task was enqueued outside any joined transaction although `outbox_require_transaction` is set."""


class OutboxUnavailable(CatgaError):
    """The database of the outbox refused the message or didn't answer; nothing was enqueued."""


class MessageRejected(CatgaError):
    """The broker is there, but will not take this one message: an attempt of that message is used up."""


class BrokerUnavailable(CatgaError):
    """The broker doesn't answer, or refuses everything: no message is at fault and no attempt is used up."""


class LeaseLost(CatgaError):
    """The claim ran out while its rows were being published; they belong to another relay now."""
