"""Flower's Outbox tab over HTTP, on a real Flower: what it shows, what it changes, and whom it refuses."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, make_url, text

from catga_tasks import Catga, migrate
from catga_tasks.tables import MESSAGE_COLUMNS
from tests.flowers import oldest_flower, start_flower
from tests.processes import Processes
from tests.waiting import wait_until
from workers.servers import PostgresServer

USER = "alice:wonderland"
NOBODY = "memory://"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Shop:
    """A database with messages in every state, written by the application and by SQL."""

    def __init__(self, url):
        self.url = url
        self.engine = create_engine(url)
        migrate.upgrade(self.engine)
        self.app = Catga("shop", broker=NOBODY, outbox=self.engine, set_as_current=False)
        for name in ("shop.charge", "shop.receipt"):
            self.app.task(name=name, shared=False)(_nothing)

    def send(self, *args, task="shop.charge", **options):
        return self.app.tasks[task].apply_async(args, **options).id

    def execute(self, statement, **values):
        with self.engine.begin() as connection:
            found = connection.execute(text(statement), values)
            return found.all() if found.returns_rows else []

    def bury(self, task_id, error="the broker refused it"):
        """Move a message to the dead letters, as two failed attempts do; return its id."""
        history = json.dumps([
            {"attempt": 1, "at": "2026-11-24 10:00:00.5", "error": "redis://shop:s3cret@host: connection lost"},
            {"attempt": 2, "at": "2026-11-24 10:00:01.5", "error": error},
        ])  # fmt: skip
        names = ", ".join(("id", *MESSAGE_COLUMNS))
        kept = ", ".join(("id", *(name for name in MESSAGE_COLUMNS if name not in ("attempts", "history"))))
        values = f"{kept}, 2, :history"
        order = f"{kept}, attempts, history"
        assert set(names.split(", ")) == set(order.split(", "))
        self.execute(
            f"INSERT INTO catga_dead_letters ({order}, died_at, error) SELECT {values}, created_at, :error "
            "FROM catga_outbox WHERE task_id = :task_id",
            history=history, error=error, task_id=task_id,
        )  # fmt: skip
        ((number,),) = self.execute("SELECT id FROM catga_dead_letters WHERE task_id = :task_id", task_id=task_id)
        self.execute("DELETE FROM catga_outbox WHERE task_id = :task_id", task_id=task_id)
        return number

    def count(self, table):
        return self.execute(f"SELECT count(*) FROM {table}")[0][0]


def _nothing(*_args, **_options):
    return None


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Processes that this module's tests share."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.end()


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def shop(request, tmp_path_factory):
    """One database of each kind for all of these tests."""
    folder = tmp_path_factory.mktemp("shop")
    if request.param == "sqlite":
        yield Shop(f"sqlite:///{folder / 'shop.db'}")
        return
    server = request.getfixturevalue("postgres_server")
    name = f"catga_{uuid.uuid4().hex[:12]}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    shop = Shop(make_url(server).set(database=name).render_as_string(hide_password=False))
    yield shop
    shop.engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    admin.dispose()


@pytest.fixture(scope="module")
def tab(running, shop, tmp_path_factory):
    """Flower with a user and a prefix."""
    folder = tmp_path_factory.mktemp("flower")
    flower = start_flower(running, folder, NOBODY, shop.url, "--url_prefix=tools", user=USER)
    flower.url += "/tools"
    return flower


@pytest.fixture(autouse=True)
def _empty(request):
    yield
    if "shop" in request.fixturenames:
        shop = request.getfixturevalue("shop")
        for table in ("catga_outbox", "catga_dead_letters", "catga_audit", "catga_paused_queues", "catga_turns"):
            shop.execute(f"DELETE FROM {table}")


def ids(answer):
    assert answer.status == 200, answer.text
    return [message["id"] for message in answer.json["messages"]]


def settled(flower):
    """The summary, once its counts are fresh."""
    return wait_until(lambda: (found := flower.get("/outbox/api/summary").json)["pending"] is not None and found)


def test_states_and_filters(shop, tab):
    """Every state is counted and listed; filters by task, queue, age and text hold together; pages follow pages."""
    plain = [shop.send(order) for order in range(4)]
    shop.send(5, countdown=3600, task="shop.receipt")
    shop.send("50%_off", queue="mails")
    shop.execute("UPDATE catga_outbox SET attempts = 1 WHERE task_id = :id", id=plain[3])
    first, second = (shop.send(order, task="shop.receipt", key="account 7") for order in range(2))
    assert first != second
    dead = [shop.bury(plain[order], error) for order, error in enumerate(("no room", "too large"))]
    wait_until(lambda: settled(tab)["dead"] == 2, what="fresh counts")
    found = settled(tab)
    assert [found[state] for state in ("pending", "scheduled", "waiting", "retrying", "dead")] == [3, 1, 1, 1, 2]
    assert {queue["queue"]: queue["pending"] for queue in found["queues"]} == {"celery": 2, "mails": 1}
    assert found["oldest_age_seconds"] >= 0
    assert found["enqueued"] >= 6
    everything = ids(tab.get("/outbox/api/messages"))
    assert everything == sorted(everything, reverse=True)
    assert len(everything) == 8
    for state, number in (("pending", 3), ("scheduled", 1), ("waiting", 1), ("retrying", 1), ("dead", 2)):
        listed = tab.get(f"/outbox/api/messages?state={state}").json["messages"]
        assert {message["state"] for message in listed} == {state}
        assert len(listed) == number
    assert ids(tab.get("/outbox/api/messages?state=dead&text=TOO%20large")) == [dead[1]]
    assert len(ids(tab.get("/outbox/api/messages?text=50%25_off"))) == 1
    assert ids(tab.get("/outbox/api/messages?text=5%25off")) == []
    assert len(ids(tab.get("/outbox/api/messages?queue=mails&task=shop.charge"))) == 1
    assert ids(tab.get("/outbox/api/messages?queue=mails&task=shop.receipt")) == []
    assert ids(tab.get("/outbox/api/messages?older_than=1h")) == []
    shop.execute("UPDATE catga_outbox SET created_at = '2020-01-01 00:00:00' WHERE queue = 'mails'")
    assert len(ids(tab.get("/outbox/api/messages?older_than=1h"))) == 1
    newer = tab.get("/outbox/api/messages?limit=4")
    older = tab.get(f"/outbox/api/messages?limit=4&before={newer.json['next']}")
    assert ids(newer) + ids(older) == everything
    assert older.json["next"] is None
    assert tab.get("/outbox/api/messages?state=lost").status == 400
    assert tab.get("/outbox/api/messages?before=x").status == 400
    assert tab.get("/outbox/api/messages?older_than=long").status == 400
    page = tab.get("/outbox")
    assert page.status == 200
    assert '"dead": 2' in page.text
    assert 'href="/tools/outbox"' in tab.get("/workers").text


def test_a_message(shop, tab):
    """Its page has the decoded arguments, the attempts and the trace; secrets are hidden, in the list too."""
    sent = shop.app.tasks["shop.charge"].apply_async(
        (7, ["Grüße"]), {"password": "hunter2", "card": {"api_key": "k3y", "name": "<b>Ada</b>"}},
        headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "x_token": "t0ken"},
    ).id  # fmt: skip
    number = shop.bury(sent)
    found = tab.get(f"/outbox/api/messages/{number}").json
    assert json.loads(found["args"]) == [7, ["Grüße"]]
    assert json.loads(found["kwargs"]) == {"password": "***", "card": {"api_key": "***", "name": "<b>Ada</b>"}}
    assert found["trace_id"] == TRACE
    assert found["headers"]["x_token"] == "***"
    assert [entry["attempt"] for entry in found["history"]] == [1, 2]
    assert found["history"][0]["error"] == "redis://shop:***@host: connection lost"
    page = tab.get(f"/outbox/message/{number}")
    assert page.status == 200
    assert "&lt;b&gt;Ada&lt;/b&gt;" in page.text
    assert "the broker refused it" in page.text
    listed = tab.get("/outbox/api/messages").text
    for answer in (page.text, json.dumps(found), listed):
        assert not [secret for secret in ("hunter2", "k3y", "t0ken", "s3cret") if secret in answer]
    hidden = shop.app.tasks["shop.charge"].apply_async((1,), {"pin": "0815"}, kwargsrepr="<hidden>").id
    ((number,),) = shop.execute("SELECT id FROM catga_outbox WHERE task_id = :id", id=hidden)
    assert "0815" not in tab.get(f"/outbox/message/{number}").text
    assert tab.get(f"/outbox/api/messages/{number}").json["kwargs"] == "<hidden>"
    assert tab.get("/outbox/message/999999").status == 404


@pytest.mark.parametrize(
    "columns",
    [{"headers": "not json"}, {"headers": "[1]"}, {"body": b"\x80\x04."}, {"history": "{", "properties": "no"},
     {"content_type": "application/x-python-serialize"}, {"content_encoding": "no-such"}],
    ids="-".join,
)  # fmt: skip
def test_24_garbage_is_shown(shop, tab, columns):
    """Scenario 24, on the page: a dead letter that can't be decoded is listed and has a page all the same."""
    number = shop.bury(shop.send(7), "it can't be decoded")
    for name, value in columns.items():
        shop.execute(f"UPDATE catga_dead_letters SET {name} = :value WHERE id = :id", value=value, id=number)
    assert ids(tab.get("/outbox/api/messages?state=dead")) == [number]
    page = tab.get(f"/outbox/message/{number}")
    assert page.status == 200
    assert "shop.charge" in page.text


def test_replay_and_discard(shop, tab):
    """Marked ones, a filter and all, each with a count before, and a record after: who, what, how many, which."""
    numbers = [shop.bury(shop.send(order), "too large" if order < 3 else "no room") for order in range(6)]
    assert tab.post("/outbox/api/dead/replay", {"ids": numbers[:1]}).json["count"] == 1
    assert shop.count("catga_outbox") == 1
    preview = tab.get("/outbox/api/dead/count?text=too+large").json
    assert preview["count"] == 2
    late = shop.bury(shop.send(9), "too large")
    moment = "'2099-01-01 00:00:00'"
    shop.execute(f"UPDATE catga_dead_letters SET died_at = {moment} WHERE id = :id", id=late)
    chosen = {"filter": {"text": "too large"}, "dead_by": preview["dead_by"]}
    assert tab.post("/outbox/api/dead/discard", chosen).json["count"] == 2
    assert [row[0] for row in shop.execute("SELECT id FROM catga_dead_letters ORDER BY id")] == [*numbers[3:], late]
    assert tab.post("/outbox/api/dead/replay", {"all": True}).json["count"] == 4
    assert shop.count("catga_dead_letters") == 0
    record = [
        (each["who"], each["action"], each["rows"], each["selection"])
        for each in tab.get("/outbox/api/audit").json["changes"]
    ]
    assert record == [
        ("alice", "replay", 4, {}),
        ("alice", "discard", 2, {"text": "too large"}),
        ("alice", "replay", 1, {"ids": numbers[:1]}),
    ]
    for nonsense in ({}, {"ids": []}, {"ids": ["1"]}, {"filter": {}}, {"all": False}, {"filter": {"x": "y"}}, [1],
                     {"ids": [1], "all": True}):  # fmt: skip
        assert tab.post("/outbox/api/dead/discard", nonsense).status == 400, nonsense


def test_pause_and_resume(shop, tab):
    """A queue is paused and resumed, with a record; the summary says which ones wait."""
    assert tab.post("/outbox/api/queues/pause", {"queue": "mails"}).json == {"changed": True}
    assert tab.post("/outbox/api/queues/pause", {"queue": "mails"}).json == {"changed": False}
    (paused,) = tab.get("/outbox/api/summary").json["paused"]
    assert (paused["queue"], paused["broker"], paused["paused_by"]) == ("mails", "", "alice")
    assert tab.post("/outbox/api/queues/resume", {"queue": "mails"}).json == {"changed": True}
    assert tab.get("/outbox/api/summary").json["paused"] == []
    assert [each["action"] for each in tab.get("/outbox/api/audit").json["changes"]] == ["resume", "pause"]
    assert tab.post("/outbox/api/queues/pause", {"queue": ""}).status == 400


CHANGES = {
    "/outbox/api/dead/replay": {"all": True},
    "/outbox/api/dead/discard": {"all": True},
    "/outbox/api/queues/pause": {"queue": "celery"},
    "/outbox/api/queues/resume": {"queue": "celery"},
}
READS = ("/outbox", "/outbox/message/1", "/outbox/api/summary", "/outbox/api/messages", "/outbox/api/messages/1",
         "/outbox/api/audit", "/outbox/api/dead/count")  # fmt: skip
OTHER_SITES = (
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Content_Type": "text/plain"},
    {"Content_Type": "application/x-www-form-urlencoded"},
)


def refused(flower, shop, status, **headers):
    """Nothing changes, whichever change is asked for."""
    for path, body in CHANGES.items():
        answer = flower.post(path, body, **headers)
        assert answer.status == status, (path, answer.status, answer.text)
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert shop.count("catga_dead_letters") == 1
    assert shop.count("catga_audit") == shop.count("catga_paused_queues") == 0


def test_26_whom_a_flower_with_users_refuses(shop, tab):
    """Scenario 26: without the password nothing is read or changed, and with it nothing from another site."""
    shop.bury(shop.send(1))
    stranger = type(tab)(tab.process, tab.url)
    for path in READS:
        answer = stranger.get(path)
        assert answer.status == 401, path
        assert answer.headers["WWW-Authenticate"]
    refused(stranger, shop, 401)
    refused(type(tab)(tab.process, tab.url, "alice:guess"), shop, 401)
    for headers in OTHER_SITES:
        refused(tab, shop, 415 if "Content_Type" in headers else 403, **headers)
    assert tab.post("/outbox/api/dead/replay", {"all": True}, Sec_Fetch_Site="same-origin").json["count"] == 1


@pytest.fixture
def letter(sqlite_url):
    """A shop with one dead letter."""
    shop = Shop(sqlite_url)
    shop.bury(shop.send(order := 4711))
    assert order
    return shop


def test_26_without_authentication(letter, processes, tmp_path):
    """Scenario 26: Flower without users shows the tab and changes nothing, unless its API was opened on purpose."""
    flower = start_flower(processes, tmp_path, NOBODY, letter.url)
    for path in READS:
        answer = flower.get(path)
        assert answer.status == 200, (path, answer.text)
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert "--basic-auth" in flower.get("/outbox").text
    refused(flower, letter, 401)
    opened = start_flower(processes, tmp_path, NOBODY, letter.url, FLOWER_UNAUTHENTICATED_API="true")
    for headers in OTHER_SITES:
        refused(opened, letter, 415 if "Content_Type" in headers else 403, **headers)
    assert (
        opened.get("/outbox/api/summary", Origin="https://evil.example").headers["Access-Control-Allow-Origin"] is None
    )
    assert opened.post("/outbox/api/dead/replay", {"all": True}).json["count"] == 1
    assert opened.get("/outbox/api/audit").json["changes"][0]["who"] == "anonymous"


def test_26_read_only_and_masked_arguments(letter, processes, tmp_path):
    """Scenario 26: read-only changes nothing even for users; masked arguments can't be searched for either."""
    flower = start_flower(processes, tmp_path, NOBODY, letter.url, "--read_only=true", user=USER, MASK="1")
    refused(flower, letter, 403)
    assert "read-only" in flower.get("/outbox").text
    (message,) = flower.get("/outbox/api/messages").json["messages"]
    pages = [
        flower.get(path).text for path in (f"/outbox/message/{message['id']}", f"/outbox/api/messages/{message['id']}")
    ]
    assert not [page for page in [json.dumps(message), *pages] if "4711" in page]
    assert ids(flower.get("/outbox/api/messages?text=4711")) == []
    assert flower.get("/outbox/api/dead/count?text=4711").json["count"] == 0


@contextmanager
def _locked(shop):
    """Let the database take statements and never answer them."""
    tables = "catga_outbox, catga_dead_letters, catga_relays, catga_paused_queues"
    with shop.engine.connect() as connection:
        connection.execute(text(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE"))
        yield
        connection.rollback()


@contextmanager
def _killed(server):
    server.kill()
    yield
    server.start()


def test_25_a_database_that_is_down(processes, tmp_path):
    """Scenario 25: the tab says so with 503, Flower's other pages go on, and it comes back by itself."""
    with PostgresServer(durable=False) as server:
        url = server.create_database("shop")
        flower = start_flower(processes, tmp_path, NOBODY, url, user=USER)
        unmigrated = flower.get("/outbox")
        assert unmigrated.status == 503
        assert "outbox migrate" in unmigrated.text
        shop = Shop(url)
        shop.bury(shop.send(1))
        assert settled(flower)["dead"] == 1
        for outage in (_locked(shop), _killed(server)):
            with outage:
                # What was asked a moment ago may still be shown.
                wait_until(lambda: flower.get("/outbox/api/summary").status == 503, what="a database that is down")
                with ThreadPoolExecutor() as together:  # Each waits for the database as long as it may.
                    paths = ("/outbox", "/outbox/message/1", "/outbox/api/summary", "/outbox/api/messages")
                    for path, answer in zip(paths, together.map(flower.get, paths), strict=True):
                        assert answer.status == 503, (path, answer.text)
                        assert "Traceback" not in answer.text
                assert flower.post("/outbox/api/queues/pause", {"queue": "celery"}).status == 503
                assert flower.get("/workers").status == 200
            wait_until(lambda: flower.get("/outbox/api/messages").status == 200, what="the database's return")
        shop.engine.dispose()
    assert "Traceback" not in flower.process.log()


def test_the_oldest_flower(letter, processes, tmp_path, nats_server):
    """The same on Flower 2.1, which has no cross-site checks of its own: the tab, a change, a refusal, NATS' queues."""
    old = oldest_flower(tmp_path)
    flower = start_flower(processes, tmp_path, nats_server, letter.url, "--url_prefix=old", user=USER, **old)
    flower.url += "/old"
    assert "Outbox</a>" in flower.get("/outbox").text
    assert "4711" in flower.get(f"/outbox/message/{ids(flower.get('/outbox/api/messages'))[0]}").text
    for headers in OTHER_SITES:
        refused(flower, letter, 415 if "Content_Type" in headers else 403, **headers)
    refused(type(flower)(flower.process, flower.url), letter, 401)
    assert flower.post("/outbox/api/dead/replay", {"all": True}).json["count"] == 1
    assert flower.get("/broker").status == 200
    assert flower.get("/outbox/static/outbox.js").status == 200
