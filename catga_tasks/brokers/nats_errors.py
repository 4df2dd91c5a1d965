"""What do NATS' errors mean to kombu, Celery and the relay?"""

from __future__ import annotations

from kombu.exceptions import ChannelError
from nats import errors
from nats.js import errors as js_errors

from catga_tasks.errors import CatgaError, ConfigurationError, MessageRejected


class Unreachable(CatgaError, ConnectionError):
    """The server doesn't answer. kombu and Celery recover from it by connecting again."""


class AccessRefused(ConfigurationError):
    """The server refuses these credentials, or what they may do. Trying again doesn't help."""


def translated(error: BaseException) -> Exception:
    """Return the error as kombu, Celery and the relay know it, in words that say what to do."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (CatgaError, ChannelError)):
        return error
    if isinstance(error, errors.MaxPayloadError) or ("maximum" in words and "size" in words):
        return MessageRejected(
            "The message is larger than NATS takes: raise max_payload on the server, or max_msg_size."
        )
    if isinstance(error, errors.AuthorizationError) or "uthorization" in words or "ermissions" in words:
        return AccessRefused(f"NATS refuses access: {words}. Check user, password, token, nkey or credentials.")
    if isinstance(
        error, (js_errors.ServiceUnavailableError, js_errors.NoStreamResponseError, errors.NoRespondersError)
    ):
        return ConfigurationError(
            "NATS has no JetStream here: start the server with -js, or allow it for this account."
        )
    if isinstance(error, js_errors.APIError):
        rejected: Exception = ChannelError(f"NATS: {error.description}")
        return rejected
    return Unreachable(f"NATS can't be reached: {words}")
