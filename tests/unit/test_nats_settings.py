"""What may be set of nats://, in its options and its URL: each mistake is one error that names it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from kombu import Connection
from kombu.utils.json import dumps

from catga_tasks import ConfigurationError
from catga_tasks.brokers import nats_settings
from catga_tasks.brokers.nats_settings import NatsSettings
from catga_tasks.brokers.nats_url import address

SECRET = "geheim"
SECONDS = ("ack_wait", "connect_timeout", "publish_timeout", "reconnect_wait", "reconnect_grace", "ping_interval")
COUNTS = ("max_msgs", "max_bytes", "max_msg_size", "max_deliver", "max_ack_pending", "reconnect_attempts")
TEXTS = ("client_name", "token", "nkey", "credentials", "tls_ca_file", "tls_cert_file")
WRONG = [
    ("ack_wiat", 3, "no option ack_wiat; did you mean ack_wait"),
    ("visibility_timeout", 3, "no option visibility_timeout; did you mean ack_wait?"),
    (3, 3, "no option 3"),
    ("stream_prefix", "a.b", "stream_prefix must be 1 to 64 letters"),
    ("stream_prefix", 3, "stream_prefix must be 1 to 64 letters"),
    ("storage", "tape", "storage must be 'file' or 'memory'"),
    ("storage", ["file"], "storage must be 'file' or 'memory'"),
    ("retention", "interest", "retention must be 'workqueue' or 'limits'"),
    ("retention", "limits", "retention='limits' needs max_age"),
    ("discard", None, "discard must be 'new' or 'old'"),
    *[("replicas", value, "replicas must be a whole number from 1 to 5") for value in (0, 6, 3.0, True, "3", None)],
    *[(name, 1, f"{name} must be True or False") for name in ("compression", "tls_check_hostname")],
    *[(name, value, f"{name} must be a number above 0") for name in SECONDS for value in (0, -1, "3", True, None)],
    *[("ack_wait", float(value), "ack_wait must be a number above 0") for value in ("nan", "inf", "1e30")],
    *[(name, value, f"{name} must be a number of seconds, at least 0.1") for name in ("max_age", "duplicate_window")
      for value in (0.05, "60", False)],
    *[(name, value, f"{name} must be a whole number") for name in COUNTS for value in (0, -2, 2.5, "10", True, 2**70)],
    *[("backoff", value, "backoff must be a list of numbers") for value in (3, "1", ["1"], [-1], [None], {1: 2}, None)],
    *[("priority_steps", value, "priority_steps must be whole numbers that ascend")
      for value in ((), (3, 0), (0, 0), (0.0, 3.0), "0369", 3, None)],
    *[(name, value, f"{name} must be a string that isn't empty, not a") for name in TEXTS for value in (3, "", b"x")],
    ("password", 1234567, "password must be a string that isn't empty, not a int"),
    ("user", "shop", "user and password come together"),
    ("password", SECRET, "user and password come together"),
    ("tls_key_file", "client.key", "tls_key_file is of no use without tls_cert_file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=[f"{name}={value!r}" for name, value, _ in WRONG])
def test_25_a_wrong_option(name, value, said):
    """It comes from kombu's connection before it connects, in one line without a secret."""
    with pytest.raises(ConfigurationError) as caught:
        Connection("nats://127.0.0.1:1", transport_options={name: value}).connect()
    words = str(caught.value)
    assert words.startswith("broker_transport_options: ")
    assert said in words
    assert "\n" not in words
    assert SECRET not in words
    assert "1234567" not in words


def test_every_option_is_checked():
    assert set(nats_settings._CHECKS) == {field.name for field in fields(NatsSettings)}


def test_right_options():
    """The defaults, and each at its edge; those of kombu itself are left alone."""
    NatsSettings.read({})
    found = NatsSettings.read({
        "replicas": 5, "max_age": 0.1, "max_deliver": 1, "max_ack_pending": -1, "backoff": [0, 1.5], "max_msg_size": 1,
        "priority_steps": [0, 5], "user": "shop", "password": SECRET, "tls_cert_file": "a", "tls_key_file": "b",
        "interval_max": 3, "confirm_publish": True, "ack_wait": 1,
    })  # fmt: skip
    assert (found.backoff, found.priority_steps) == ((0, 1.5), (0, 5))
    assert found.access == {"user": "shop", "password": SECRET}


@pytest.mark.parametrize(
    ("priority", "step"),
    [(0, 0), (2, 0), (3, 3), (5, 3), (9, 9), (255, 9), (-1, 0), (None, 0), ("6", 6), (6.5, 6), ("high", 0), ([], 0)],
)
def test_a_priority_has_a_place(priority, step):
    """Also one out of range, or that is none, as with kombu's own transports."""
    assert NatsSettings().step(priority) == step


@pytest.mark.parametrize(
    ("url", "servers", "credentials"),
    [
        ("nats://", ["nats://localhost"], {}),
        ("nats://one", ["nats://one"], {}),
        ("tls://one:1,two:2/", ["nats://one:1", "nats://two:2"], {}),
        ("nats://one:1/0?a=b,two", ["nats://one:1", "nats://two"], {}),
        ("nats://[::1]:4222", ["nats://[::1]:4222"], {}),
        ("nats://shop:geheim@one:1, two:2,", ["nats://one:1", "nats://two:2"], {"user": "shop", "password": "geheim"}),
        ("nats://t%2Ck@one,t%2Ck@two", ["nats://one", "nats://two"], {"token": "t,k"}),
        ("nats://sh%40p:p%3A%2F%25@one", ["nats://one"], {"user": "sh@p", "password": "p:/%"}),
        ("nats://shop:a/b?c#d@one", ["nats://one"], {"user": "shop", "password": "a/b?c#d"}),
    ],
)
def test_a_url(url, servers, credentials):
    """Its servers without credentials, which are decoded and are for all of them."""
    found = address(url)
    assert list(found.servers) == servers
    assert found.credentials == credentials
    assert found.tls == url.startswith("tls")
    assert "geheim" not in repr(found)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nats://127.0.0.1:port", "the port of 127.0.0.1:port must be"),
        ("nats://127.0.0.1:99999", "the port of 127.0.0.1:99999 must be"),
        ("nats://shop:geheim@127.0.0.1:port", "the port of 127.0.0.1:port must be"),
        ("nats://shop:geheim,1@127.0.0.1", "written as %XX"),
        ("nats://shop:geheim@one,shop:geheim2@two", "the same user"),
    ],
)
def test_25_a_wrong_url(url, said):
    with pytest.raises(ConfigurationError, match="broker_url") as caught:
        Connection(url).connect()
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_25_tls_of_other_brokers():
    """`broker_use_ssl` left over from Redis mustn't end in plain text."""
    with pytest.raises(ConfigurationError, match=r"broker_use_ssl .* tls://"):
        Connection("nats://127.0.0.1:1", ssl={"ssl_cert_reqs": "required"}).connect()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://host", "nats://host"),
        ("nats://shop:geheim@host:4222", "nats://shop:**@host:4222"),
        ("tls://shop:geheim@a:1,shop:geheim@b:2", "tls://shop:**@a:1,b:2"),
        ("nats://geheim@host", "nats://**@host"),
        ("nats+tls://geheim@a,b:1", "tls://**@a,b:1"),
        ("nats://[::1]:4222,geheim@b", "nats://**@[::1]:4222,b"),
    ],
)
def test_42_what_is_shown_of_a_url(url, shown):
    """Nor is the secret in what Celery sends to whoever inspects a worker."""
    connection = Connection(url, transport_options={"token": "geheim"})
    assert connection.as_uri() == shown
    assert "geheim" not in repr(connection)
    assert connection.as_uri(include_password=True) == shown.replace("**", "geheim")
    info = connection.info()
    assert info.pop("password") in ("geheim", None)
    assert "geheim" not in dumps(info)
    again = connection.clone()
    assert again.as_uri(include_password=True) == connection.as_uri(include_password=True)
    assert again.transport.settings.token == "geheim"


@pytest.mark.parametrize("first", ["nats://127.0.0.1:1", "tls://127.0.0.1:1"])
def test_a_url_to_fall_back_on_stays_whole(first):
    """kombu would lose the scheme, the port and all servers but one."""
    second = "tls://shop:g%40heim@a:1,b:2"
    connection = Connection([first, second])
    assert connection.as_uri() == first
    for url in (second, first, second):
        connection.maybe_switch_next()
        assert connection.as_uri(include_password=True) == url
        assert connection.clone().as_uri(include_password=True) == url
    assert connection.as_uri() == "tls://shop:**@a:1,b:2"
    assert list(connection.transport.nats._address.servers) == ["nats://a:1", "nats://b:2"]


def test_after_another_kind_of_broker():
    """kombu has taken the URL apart."""
    connection = Connection(["memory://", "tls://shop:g%40heim@b:2"])
    connection.maybe_switch_next()
    assert connection.as_uri(include_password=True) == "tls://shop:g%40heim@b:2"
    assert connection.as_uri() == "tls://shop:**@b:2"
    connection.maybe_switch_next()
    assert connection.as_uri().startswith("memory://")
