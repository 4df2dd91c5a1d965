"""A task's delivery sets how it is acknowledged; what contradicts it is refused."""

from __future__ import annotations

import pytest

from catga_tasks import Catga, ConfigurationError


@pytest.fixture
def app():
    return Catga("shop", broker="memory://", outbox="sqlite://", set_as_current=False)


def register(app, **options):
    def work():
        """Do nothing."""

    task = app.task(shared=False, name="work", **options)(work)
    app.finalize()
    return task


@pytest.mark.parametrize(
    ("options", "late"),
    [
        ({"delivery": "at_most_once"}, False),
        ({"delivery": "at_least_once"}, True),
        ({"delivery": "effectively_once"}, True),
        ({"deduplicate": True}, True),
        ({}, True),
    ],
)
def test_a_delivery_sets_the_acknowledgement(app, options, late):
    """Late, and requeued when the worker is lost, for everything but at most once."""
    task = register(app, **options)
    assert (task.acks_late, task.reject_on_worker_lost) == (late, late)
    assert task.delivery == options.get("delivery", "at_least_once")


def test_a_delivery_overrides_celerys_settings(app):
    """A task that names its delivery has it, whatever the application's acknowledgement is."""
    app.conf.update(task_acks_late=False, task_reject_on_worker_lost=False)
    assert register(app, delivery="effectively_once").acks_late


def test_celerys_own_options_stay_where_no_delivery_is_named(app):
    """Who only put Catga where Celery was keeps a task's early acknowledgement."""
    task = register(app, acks_late=False)
    assert (task.acks_late, task.delivery) == (False, "at_least_once")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delivery": "at_most_once", "acks_late": True}, "acks_late=True contradicts"),
        ({"delivery": "at_least_once", "acks_late": False}, "acks_late=False contradicts"),
        ({"delivery": "effectively_once", "acks_late": False}, "acks_late=False contradicts"),
        ({"delivery": "effectively_once", "reject_on_worker_lost": False}, "reject_on_worker_lost=False contradicts"),
        ({"deduplicate": True, "acks_late": False}, "acks_late=False contradicts"),
        ({"delivery": "effectively_once", "deduplicate": True}, "deduplicates by itself"),
        ({"delivery": "at_most_once", "deduplicate": True}, "deduplicate=True goes with"),
        ({"delivery": "exactly_once"}, "must be 'at_most_once' or 'at_least_once' or 'effectively_once'"),
    ],
)
def test_contradictions_are_refused(app, options, words):
    """One error that names the task and the option."""
    with pytest.raises(ConfigurationError, match=words) as refused:
        register(app, **options)
    assert "work" in str(refused.value)


def test_a_setting_contradicts_too(app):
    """`task_delivery` counts as named."""
    app.conf.task_delivery = "effectively_once"
    with pytest.raises(ConfigurationError, match="acks_late=False contradicts"):
        register(app, acks_late=False)


def test_async_functions_are_refused(app):
    """A coroutine can't run in a synchronous session's transaction; Celery would not run it at all."""
    with pytest.raises(ConfigurationError, match="async def"):

        @app.task(shared=False, name="work", delivery="effectively_once")
        async def work():
            """Do nothing."""

        app.finalize()
