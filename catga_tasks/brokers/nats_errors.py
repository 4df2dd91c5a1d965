"""What do NATS' errors mean to kombu, Celery and the relay?"""

from __future__ import annotations

import json
import ssl

from kombu.exceptions import ChannelError
from nats import errors
from nats.js import errors as js_errors

from catga_tasks.brokers.nats_settings import NameTooLong
from catga_tasks.errors import CatgaError, ConfigurationError, MessageRejected


class Unreachable(CatgaError, ConnectionError):
    """The server doesn't answer. kombu and Celery recover from it by connecting again."""


class AccessRefused(ConfigurationError):
    """The server refuses these credentials, or what they may do. Trying again doesn't help."""


class NoTLS(errors.Error):
    """The server offers no TLS where the client wants it."""


class StreamConflict(ConfigurationError):
    """A queue's stream isn't as the settings want it and can't be changed, or belongs to somebody else."""


class StreamGone(CatgaError):
    """Nobody stores what is published to this subject."""


class Full(CatgaError):
    """What is published now isn't stored, for there is no room."""


#: What one queue or one message is to blame for, while the server takes those of others.
AT_FAULT = (MessageRejected, ChannelError, StreamConflict, NameTooLong)
#: The server's codes for an account or a server without JetStream. Its other answers of 503 pass: no leader yet.
_NO_JETSTREAM = (None, 10039, 10076)
#: Its code for replicas where there is no cluster.
_NO_REPLICAS = 10074
#: Its codes for resources that are used up: memory, storage, peers, streams or consumers of the account.
_EXHAUSTED = (10002, 10005, 10023, 10026, 10027, 10028, 10047)


def refusal(answer: bytes) -> Exception | None:
    """Return what JetStream's answer says against a message, or None."""
    if b'"error"' not in answer:
        return None
    error = json.loads(answer)["error"]
    return translated(js_errors.APIError(**{name: error.get(name) for name in ("code", "err_code", "description")}))


def translated(error: BaseException) -> Exception:
    """Return the error as kombu, Celery and the relay know it, in words that say what to do."""
    if isinstance(error, (CatgaError, ChannelError)):
        return error
    words = " ".join(str(error).split()) or type(error).__name__
    mistake = _mistake(error)
    found: Exception
    if isinstance(error, errors.MaxPayloadError) or ("maximum" in words and "size" in words):
        found = MessageRejected(
            "The message is larger than NATS takes: raise max_payload on the server, or max_msg_size."
        )
    elif "ermissions" in words:
        found = AccessRefused(f"NATS refuses access: {words}. Allow this user what docs/reference/nats.md lists.")
    elif isinstance(error, errors.AuthorizationError) or "uthorization" in words:
        found = AccessRefused(f"NATS refuses access: {words}. Check user, password, token, nkey or credentials.")
    elif mistake:
        found = ConfigurationError(mistake)
    elif isinstance(error, js_errors.APIError):
        passing = error.err_code in _EXHAUSTED or isinstance(error, js_errors.ServiceUnavailableError)
        kind: type[Exception] = Unreachable if passing else ChannelError
        found = kind(f"NATS: {error.description}")
    else:
        found = Unreachable(f"NATS can't be reached: {words}")
    return found


def _mistake(error: BaseException) -> str | None:
    """Say what is set up wrong, if that is the cause: trying again doesn't help."""
    if isinstance(error, NoTLS):
        return "The NATS server offers no TLS: switch it on there, or use nats:// without tls_* options."
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"The NATS server's certificate isn't accepted: {error.verify_message}. Set tls_ca_file to its authority's "
            "certificate; if only the name differs, tls_check_hostname=False accepts it."
        )
    absent = (js_errors.NoStreamResponseError, errors.NoRespondersError)
    if isinstance(error, absent) or getattr(error, "err_code", 0) in _NO_JETSTREAM:
        return "NATS has no JetStream here: start the server with -js, or allow it for this account."
    if getattr(error, "err_code", 0) == _NO_REPLICAS:
        return "broker_transport_options: replicas must be 1 on a single server; more need a cluster."
    if type(error).__module__.partition(".")[0] == "nkeys":
        return f"broker_transport_options: nkey or credentials can't be used: {error}."
    return None
