"""Settings are read once, and a wrong one is named."""

from __future__ import annotations

import pytest

from catga_tasks import Catga, ConfigurationError
from catga_tasks.config import Settings


def nothing():
    pass


def app(**conf):
    app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox="sqlite://", set_as_current=False)
    app.conf.update(conf)
    return app


def test_the_defaults_are_valid():
    assert app().catga_settings == Settings()


def test_settings_are_celerys():
    found = app(outbox_batch_size=7, outbox_retention=60, task_delivery="at_most_once").catga_settings
    assert (found.outbox_batch_size, found.outbox_retention, found.task_delivery) == (7, 60, "at_most_once")


def test_celerys_namespace_works():
    class Configuration:
        CELERY_OUTBOX_BATCH_SIZE = 7
        CELERY_OUTBOX_URL = "sqlite:///shop.db"

    app = Catga("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.config_from_object(Configuration, namespace="CELERY")
    assert app.catga_settings.outbox_batch_size == 7
    assert str(app.outbox.engine.url) == "sqlite:///shop.db"


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"outbox_bach_size": 1}, "outbox_bach_size: did you mean outbox_batch_size"),
        ({"inbox_retentoin": 1}, "Unknown setting inbox_retentoin"),
        ({"outbox_batch_size": 0}, "outbox_batch_size must be a whole number of at least 1, not 0"),
        ({"outbox_batch_size": True}, "outbox_batch_size must be a whole number"),
        ({"outbox_max_attempts": "3"}, "outbox_max_attempts must be a whole number"),
        ({"outbox_retry_backoff": -1}, "outbox_retry_backoff must be a number of seconds above 0"),
        ({"outbox_poll_interval_max": float("nan")}, "outbox_poll_interval_max must be a number"),
        ({"outbox_retention": "7d"}, "outbox_retention must be a number of seconds"),
        ({"outbox_retry_jitter": 1}, "outbox_retry_jitter must be True or False"),
        ({"outbox_url": 3}, "outbox_url must be a SQLAlchemy URL"),
        ({"task_delivery": "exactly_once"}, "task_delivery must be 'at_most_once' or 'at_least_once'"),
        ({"outbox_publish_timeout": 30}, r"outbox_lease_timeout \(30 s\) must be longer than outbox_publish_timeout"),
    ],
)
def test_25_a_wrong_setting_is_named(conf, said):
    with pytest.raises(ConfigurationError, match=said):
        _ = app(**conf).catga_settings


def test_25_no_outbox_is_named():
    app = Catga("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"No outbox: pass Catga\(outbox="):
        _ = app.outbox


def test_25_a_tasks_unknown_delivery_is_named():
    shop = app()
    shop.task(name="charge", delivery="sometimes", shared=False)(nothing)
    with pytest.raises(ConfigurationError, match="delivery of task charge must be"):
        shop.finalize()


def test_at_most_once_is_acknowledged_early():
    shop = app()
    early = shop.task(name="early", delivery="at_most_once", shared=False)(nothing)
    late = shop.task(name="late", shared=False)(nothing)
    assert (early.acks_late, early.reject_on_worker_lost) == (False, False)
    assert (late.acks_late, late.reject_on_worker_lost) == (True, True)


def test_at_most_once_contradicts_a_late_acknowledgement():
    shop = app()
    shop.task(name="charge", delivery="at_most_once", acks_late=True, shared=False)(nothing)
    with pytest.raises(ConfigurationError, match="Task charge: acks_late=True contradicts"):
        shop.finalize()
