"""What do NATS' errors mean to kombu, Celery and the relay?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kombu.exceptions import ChannelError
from nats import errors
from nats.js import errors as js_errors

from catga_tasks.errors import CatgaError, ConfigurationError, MessageRejected

if TYPE_CHECKING:
    from nats.aio.msg import Msg


class Unreachable(CatgaError, ConnectionError):
    """The server doesn't answer. kombu and Celery recover from it by connecting again."""


class AccessRefused(ConfigurationError):
    """The server refuses these credentials, or what they may do. Trying again doesn't help."""


class StreamGone(CatgaError):
    """Nobody stores what is published to this subject."""


def refusal(msg: Msg) -> Exception | None:
    """Return what a confirmation says against the message, or None."""
    if msg.headers and msg.headers.get("Status") == "503":
        return StreamGone("There is no stream for this queue.")
    if b'"error"' not in msg.data:
        return None
    error = json.loads(msg.data)["error"]
    return translated(js_errors.APIError(**{name: error.get(name) for name in ("code", "err_code", "description")}))


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
