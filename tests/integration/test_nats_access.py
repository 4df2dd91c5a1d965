"""Who may connect to NATS, and over which wire? TLS, certificates, passwords, tokens, nkeys, credentials files."""

from __future__ import annotations

import ssl
import time

import nkeys
import pytest
import trustme
from kombu import Connection, Queue

from catga_tasks import Catga
from catga_tasks.brokers.nats_errors import AccessRefused
from catga_tasks.errors import BrokerUnavailable, ConfigurationError
from tests.waiting import wait_until
from workers.servers import NatsServer

SECRET = "s3cr3t-pass"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """The authority's certificate, and a server's for 127.0.0.1, another host's, and a client's, as PEM files."""
    folder = tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, host in {"server": "127.0.0.1", "elsewhere": "nats.example.com", "client": "client@example.com"}.items():
        issued = authority.issue_cert(host)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


@pytest.fixture
def server():
    """Start a server with this configuration."""
    started = []

    def start(settings):
        started.append(NatsServer(settings))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


def tls(files, certificate="server", verify=""):
    pair = f'cert_file: "{files}/{certificate}.pem", key_file: "{files}/{certificate}.key"'
    return f'tls {{ {pair}, ca_file: "{files}/ca.pem", {verify} timeout: 2 }}'


def works(url, **options):
    """Publish and take a message."""
    with Connection(url, transport_options={"connect_timeout": 3.0, **options}) as connection:
        producer = connection.Producer()
        Queue("q")(connection.default_channel).declare()
        producer.publish("hello", routing_key="q")
        message = connection.default_channel.basic_get("q")
        message.ack()
        return message.payload == "hello"


def refused(url, kind, **options):
    """Return the one error's words; it comes within the connect time-out, and names no secret."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        works(url, **options)
    assert time.monotonic() - started < 10
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["tls", "nats+tls", "nats"])
def test_15_tls(server, files, scheme):
    running = server(tls(files))
    url = running.url.replace("nats://", f"{scheme}://")
    assert works(url, tls_ca_file=f"{files}/ca.pem")


def test_15_a_certificate_of_nobody_we_trust(server, files):
    url = server(tls(files)).url
    for scheme in ("tls://", "nats://"):
        assert "tls_ca_file" in refused(url.replace("nats://", scheme), ConfigurationError)


def test_15_a_certificate_of_another_host(server, files):
    url = server(tls(files, "elsewhere")).url.replace("nats://", "tls://")
    words = refused(url, ConfigurationError, tls_ca_file=f"{files}/ca.pem")
    assert "127.0.0.1" in words
    assert "tls_check_hostname" in words
    assert works(url, tls_ca_file=f"{files}/ca.pem", tls_check_hostname=False)
    # The authority is asked for all the same.
    assert "tls_ca_file" in refused(url, ConfigurationError, tls_check_hostname=False)


def test_15_a_client_certificate(server, files):
    url = server(tls(files, verify="verify: true,")).url.replace("nats://", "tls://")
    pair = {"tls_cert_file": f"{files}/client.pem", "tls_key_file": f"{files}/client.key"}
    assert works(url, tls_ca_file=f"{files}/ca.pem", **pair)
    assert "tls_cert_file" in refused(url, ConfigurationError, tls_ca_file=f"{files}/ca.pem")


def test_15_tls_to_a_server_without(server):
    url = server("").url.replace("nats://", "tls://")
    assert "nats://" in refused(url, ConfigurationError)


def test_25_wrong_files(server, files, tmp_path):
    url = server(tls(files)).url
    assert "tls_ca_file" in refused(url, ConfigurationError, tls_ca_file=str(tmp_path / "none.pem"))
    (tmp_path / "garbage.pem").write_text("garbage")
    assert "tls_ca_file" in refused(url, ConfigurationError, tls_ca_file=str(tmp_path / "garbage.pem"))
    assert "tls_check_hostname" in refused(url, ConfigurationError, tls_check_hostname="no")


@pytest.mark.parametrize(
    ("authorization", "right", "wrong"),
    [
        ("user: shop, password: s3cr3t-pass", {"user": "shop", "password": SECRET}, {"user": "shop", "password": "no"}),
        ("token: s3cr3t-pass", {"token": SECRET}, {"token": "no"}),
    ],
    ids=["password", "token"],
)
def test_03_passwords_and_tokens(server, authorization, right, wrong):
    running = server(f"authorization {{ {authorization} }}")
    assert works(running.url, **right)
    access = f"shop:{SECRET}" if "user" in right else SECRET
    assert works(running.url.replace("://", f"://{access}@"))
    for options in ({}, wrong):
        assert "user, password, token" in refused(running.url, AccessRefused, **options)
    refused(running.url.replace("://", f"://shop:{SECRET}x@"), AccessRefused)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_03_the_url_to_fall_back_on_is_as_good_as_the_first(server, files, engine):
    """With its port, its TLS, its password, and all its servers: for kombu, and for the relay."""
    running = server(tls(files) + "\nauthorization { user: shop, password: 's3cr3t/p@ss' }")
    good = f"tls://shop:s3cr3t%2Fp%40ss@127.0.0.1:{running.port},127.0.0.1:1"
    options = {"connect_timeout": 3.0, "tls_ca_file": f"{files}/ca.pem"}
    with Connection(["nats://127.0.0.1:1", good], transport_options=options) as connection:
        connection.ensure_connection(max_retries=3, interval_start=0.1)
        assert connection.as_uri() == f"tls://shop:**@127.0.0.1:{running.port},127.0.0.1:1"
        assert connection.default_channel._size("celery") == 0
    app = Catga("shop", broker=["nats://127.0.0.1:1", good], outbox=engine, set_as_current=False)
    app.conf.broker_transport_options = options
    app.task(name="charge", shared=False)(charge)
    app.tasks["charge"].delay(1)
    relay = app.relay()
    with pytest.raises(BrokerUnavailable):
        relay.run_once()
    wait_until(lambda: relay.run_once() == 1)
    assert works(good, **options, stream_prefix="other")


def test_03_nkeys(server, tmp_path):
    seed = nkeys.encode_seed(b"0123456789abcdef0123456789abcdef", nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    running = server(f"authorization {{ users = [ {{ nkey: {public} }} ] }}")
    right, other = tmp_path / "right.nk", tmp_path / "other.nk"
    right.write_bytes(seed)
    other.write_bytes(nkeys.encode_seed(b"abcdef0123456789abcdef0123456789", nkeys.PREFIX_BYTE_USER))
    assert works(running.url, nkey=str(right))
    refused(running.url, AccessRefused, nkey=str(other))
    assert "nkey" in refused(running.url, ConfigurationError, nkey=str(tmp_path / "none.nk"))
    (tmp_path / "garbage.nk").write_text("garbage")
    assert "nkey" in refused(running.url, ConfigurationError, nkey=str(tmp_path / "garbage.nk"))


def test_03_a_worker_ends_with_one_line(server, processes, tmp_path):
    """Trying again doesn't help: no retry loop, no traceback, and no secret (scenario 26)."""
    running = server(f"authorization {{ token: {SECRET} }}")
    (tmp_path / "shop.py").write_text(
        f'from catga_tasks import Catga\napp = Catga("shop", broker="nats://{SECRET}x@{running.url[7:]}", outbox="sqlite://")\n'
    )
    worker = processes.celery("shop", "worker", "-P", "solo", cwd=tmp_path)
    assert worker.wait_exit(30) != 0
    assert "NATS refuses access" in worker.log()
    assert SECRET not in worker.log()
    assert "Traceback" not in worker.log()


def test_tls_context_is_as_strict_as_python_makes_it(files):
    from catga_tasks.brokers.nats_settings import NatsSettings

    strict = NatsSettings(tls_ca_file=f"{files}/ca.pem").tls()
    assert (strict.check_hostname, strict.verify_mode) == (True, ssl.CERT_REQUIRED)


def charge(order):
    return order
