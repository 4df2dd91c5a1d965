"""The Outbox tab in a browser, on a real relay, worker and Flower: find a dead letter, replay it, see the task run.

With CATGA_SCREENSHOTS the pages are written to that folder, once there were enough minutes for the chart.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from redis import Redis
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from sqlalchemy import create_engine, text

from catga_tasks import Catga, migrate
from tests.flowers import start_flower
from tests.waiting import wait_until

PICTURES = os.environ.get("CATGA_SCREENSHOTS")
PHONE = 390
#: Seconds of traffic before the pictures.
TRAFFIC = 60


class Tab:
    """What somebody sees and clicks."""

    def __init__(self, browser, url):
        self.browser = browser
        self.url = url

    def open(self, path="/outbox", *, width=1280, height=900, dark=False):
        self.size(width, height)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        self.browser.get(self.url + path)

    def size(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        try:
            return self.find(selector).text
        except (NoSuchElementException, StaleElementReferenceException):
            return ""

    def sees(self, words, selector="main", deadline=30):
        wait_until(lambda: words in self.text(selector), deadline=deadline, what=f"{words!r} in {selector}", every=0.1)

    def click(self, selector):
        wait_until(lambda: (found := self.find(selector)).is_displayed() and found.is_enabled(), what=selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def rows(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#messages tr')].map(r => r.innerText)"
        )

    def queues(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#queues td:first-child')].map(c => c.innerText)"
        )

    def fits(self):
        """Nothing is wider than the window."""
        return self.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    def picture(self, name, *, height=None):
        if not PICTURES:
            return
        width = self.browser.execute_script("return window.innerWidth")
        whole = self.browser.execute_script("return document.querySelector('main').getBoundingClientRect().bottom")
        self.size(width, int(min(whole + 8, height or whole + 8)))
        time.sleep(1)  # a dialog's or a toast's fading
        self.browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


@pytest.fixture
def shop(processes, redis_url, sqlite_url, tmp_path):
    """An application with a relay, a dead letter whose fault is mended, a paused queue, and then a worker."""
    engine = create_engine(sqlite_url)
    migrate.upgrade(engine)
    app = Catga("shop", broker=redis_url, outbox=engine, set_as_current=False)
    for name in ("shop.charge", "shop.receipt"):
        app.task(name=name, shared=False)(_nothing)
    env = {"BROKER": redis_url, "OUTBOX": sqlite_url}
    flower = start_flower(processes, tmp_path, redis_url, sqlite_url, FLOWER_UNAUTHENTICATED_API="true")
    processes.celery("shop", "outbox", "relay", env=env, cwd=tmp_path)
    with Redis.from_url(redis_url) as redis:
        redis.set("payments", "not a list")
        for order in (7, 8, 9):
            details = {"currency": "EUR", "card_token": "tok_4242", "lines": [{"sku": "pen", "count": 2}]}
            trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
            app.tasks["shop.charge"].apply_async((order,), details, queue="payments", headers=trace)
        wait_until(lambda: _count(engine, "catga_dead_letters") == 3, what="the dead letters")
        redis.delete("payments")
    worker = processes.celery(
        "shop", "worker", "-P", "solo", "-E", "-l", "INFO", "-Q", "celery,payments", env=env, cwd=tmp_path
    )
    wait_until(lambda: " ready." in worker.log(), deadline=60, what="the worker")
    for order in range(4):
        app.tasks["shop.receipt"].apply_async((order,), countdown=3600)
    yield app, worker, flower, engine
    engine.dispose()


def _nothing(*_args, **_options):
    return None


def _count(engine, table):
    with engine.connect() as connection:
        return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


def _traffic(app):
    """Send messages at a rate that changes, for the chart of the pictures."""
    end = time.monotonic() + TRAFFIC
    while time.monotonic() < end:
        app.tasks["shop.receipt"].delay_many([(order,) for order in range(random.randint(1, 12))])
        time.sleep(1)


@pytest.mark.timeout(120 + (2 * TRAFFIC if PICTURES else 0))
def test_find_a_dead_letter_and_replay_it(browser, shop):
    """Open the tab, pause a queue, filter, open a message, replay it after a confirmation, and the task runs."""
    app, worker, flower, engine = shop
    tab = Tab(browser, flower.url)
    _pause(tab, app)
    if PICTURES:
        _traffic(app)
    _look(tab)
    _open_the_letter_of_order_8(tab)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM catga_paused_queues"))
    tab.click("[data-verb=replay]")
    tab.sees("Replay 1 dead letter?", "#outbox-dialog-title")
    tab.click("#outbox-dialog-yes")
    wait_until(lambda: "charged order 8" in worker.log(), deadline=60, what="the task")
    wait_until(lambda: browser.current_url == f"{flower.url}/outbox", what="the list again")
    _discard_the_others(tab, engine)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def _pause(tab, app):
    tab.open("/workers")
    tab.click("a[href='/outbox']")
    wait_until(lambda: tab.text("#tile-dead") == "3", what="three dead letters")
    assert tab.text("#tile-scheduled") == "4"
    tab.sees("celery", "#queues")
    tab.click(f"#queues tr:nth-child({1 + tab.queues().index('payments')}) button")
    tab.sees("paused", "#queues")

    def waits():
        """A relay takes a moment to hear of it."""
        app.tasks["shop.charge"].apply_async((10,), queue="payments")
        return int(tab.text("#tile-pending")) > 1

    wait_until(waits, what="messages that wait", every=1)
    tab.sees("pause", "#audit")


def _look(tab):
    tab.open()
    tab.sees("Live", "#outbox-status")
    tab.picture("outbox", height=1180)
    tab.open(dark=True)
    tab.sees("Live", "#outbox-status")
    tab.picture("outbox-dark", height=900)


def _open_the_letter_of_order_8(tab):
    tab.click("[data-state=dead]")
    wait_until(lambda: len(tab.rows()) == 3, what="the dead ones alone")
    tab.find("input[name=text]").send_keys("{'currency'")
    tab.find("input[name=task]").send_keys("shop.charge")
    wait_until(lambda: "text=" in tab.browser.current_url and len(tab.rows()) == 3, what="the filters")
    tab.find("input[name=text]").clear()
    tab.find("input[name=text]").send_keys("(8,)")
    wait_until(lambda: len(tab.rows()) == 1, what="the one order")
    tab.click("#messages .outbox-id a")
    tab.sees("WRONGTYPE", ".outbox-timeline")
    tab.sees("Dead after 2 attempts", ".outbox-timeline")
    assert '"sku": "pen"' in tab.text("#message-kwargs")
    assert "tok_4242" not in tab.browser.page_source
    assert tab.text("#message-trace") == "4bf92f3577b34da6a3ce929d0e0e4736"
    tab.open(tab.browser.current_url.removeprefix(tab.url))
    tab.picture("outbox-message", height=1230)
    tab.size(1280, 900)


def _discard_the_others(tab, engine):
    tab.open("/outbox?state=dead")
    wait_until(lambda: len(tab.rows()) == 2, what="the two others")
    tab.click("#mark-all")
    tab.click("[data-verb=discard][data-scope=ids]")
    tab.sees("Discard 2 dead letters?", "#outbox-dialog-title")
    wait_until(lambda: tab.find("#outbox-dialog-yes").is_enabled(), what="the whole dialog")
    tab.picture("outbox-confirm", height=1180)
    tab.click("#outbox-dialog .btn-close")
    wait_until(lambda: not tab.find("#outbox-dialog").is_displayed(), what="the closed dialog")
    assert _count(engine, "catga_dead_letters") == 2
    tab.click("[data-verb=discard][data-scope=filter]")
    tab.click("#outbox-dialog-yes")
    wait_until(lambda: _count(engine, "catga_dead_letters") == 0, what="no dead letters")
    tab.sees("discard", "#audit")


def test_on_a_phone(browser, shop):
    """At a phone's width nothing is wider than the screen: not the tab, with a long name in it, nor a message."""
    app, _, flower, _ = shop
    app.tasks["shop.charge"].apply_async(
        ("x" * 300,), queue="a-queue-with-a-name-that-is-longer-than-most", countdown=60
    )
    tab = Tab(browser, flower.url)
    for path in ("/outbox?state=dead", "/outbox", "/outbox/message/2"):
        tab.open(path, width=PHONE, height=844)
        tab.sees("WRONGTYPE")
        assert tab.fits(), path
    tab.open("/outbox?state=dead", width=PHONE, height=844)
    tab.sees("WRONGTYPE")
    tab.picture("outbox-phone", height=1900)
