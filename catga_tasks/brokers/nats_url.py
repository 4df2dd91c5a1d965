"""Which servers does a URL name, with which credentials, and what of it may be shown?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = ("nats", "tls")
#: A URL that kombu is to leave whole, see `Whole`.
_WHOLE = re.compile(r"(?:nats\+)?(nats|tls):/(?!/)(.*)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect."""

    #: nats://host:port each, without credentials.
    servers: tuple[str, ...]
    tls: bool
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def credentials(self) -> dict[str, str]:
        """What nats-py wants of the URL's credentials, for whichever server it turns to."""
        found = {"user": self.user, "password": self.password, "token": self.token}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def secret(self) -> str | None:
        """The password, or the token."""
        return self.token if self.user is None else self.password

    def url(self, mask: str | None = None) -> str:
        """Return it as a URL, its secret masked if there is a mask."""
        access = "" if self.user is None else f"{quote(self.user, safe='')}:"
        if self.secret is not None:
            access += f"{quote(self.secret, safe='') if mask is None else mask}@"
        hosts = ",".join(server.removeprefix("nats://") for server in self.servers)
        return f"{'tls' if self.tls else 'nats'}://{access}{hosts}"


def address(url: str) -> Address:
    """Take a URL apart; raise `ConfigurationError` for a port that is none, or several users."""
    scheme, _, rest = url.partition("://")
    servers, access = [], set()
    for part in rest.split(","):
        given, at, host = part.strip().rpartition("@")
        host = re.split("[/?#]", host)[0]
        access |= {given} if at else set()
        try:
            _ = urlsplit(f"nats://{host}").port
        except ValueError:
            place = host if at or "@" not in rest else "one of the servers"
            raise ConfigurationError(
                f"broker_url: the port of {place} must be a number from 0 to 65535. (Special characters in a password "
                "are written as %XX.)"
            ) from None
        servers += [f"nats://{host}"] if host else []
    if len(access) > 1:
        raise ConfigurationError("broker_url: the servers of a cluster take the same user; the URL names several.")
    user, colon, password = access.pop().partition(":") if access else ("", "", "")
    known = {"user": unquote(user), "password": unquote(password)} if colon else {"token": unquote(user) or None}
    return Address(tuple(servers) or ("nats://localhost",), scheme == "tls", **known)


def url_of(client: Any) -> str:
    """Return the URL that a kombu connection has at this moment."""
    hostname = client.hostname or "localhost"
    whole = _WHOLE.fullmatch(hostname)
    if whole:
        return f"{whole[1]}://{whole[2]}"
    scheme, separator, rest = hostname.rpartition("://")
    if not separator:
        scheme = "tls" if client.transport_cls == "tls" else "nats"
        rest += f":{client.port}" if client.port else ""
    if "@" in rest or not (client.userid or client.password):
        return f"{scheme}://{rest}"
    user = f"{quote(client.userid, safe='')}:" if client.userid else ""
    return f"{scheme}://{user}{quote(client.password or '', safe='')}@{rest}"


def keep_apart(client: Any, found: Address) -> None:
    """Leave no secret in what a kombu connection tells of itself: Celery sends its `info` to whoever inspects it."""
    client.hostname = replace(found, user=None, password=None, token=None).url()
    client.userid, client.password = found.user, found.secret


class Whole:
    """The URLs that a connection falls back on, in their turn.

    kombu takes them apart as if they were all of one host; it only leaves alone what doesn't look like a URL.
    """

    def __init__(self, cycle: Iterator[str]) -> None:
        self._cycle = cycle

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next one."""
        url = next(self._cycle)
        scheme, separator, rest = url.removeprefix("nats+").partition("://")
        return f"{scheme}:/{rest}" if separator and scheme in SCHEMES else url


def keep_whole(client: Any) -> None:
    """Have kombu hand over the URLs that this connection falls back on as they are."""
    ours = client._initial_params.get("transport") in SCHEMES
    if client.cycle is not None and ours and not isinstance(client.cycle, Whole):
        client.cycle = Whole(client.cycle)
