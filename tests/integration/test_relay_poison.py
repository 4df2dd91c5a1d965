"""Messages that can't be sent, and tables that are full of others: one bad row costs the good ones nothing."""

from __future__ import annotations

import json
import re
import signal
import time

import psycopg
import pytest
from sqlalchemy import text

from catga_tasks.claims import KILLED
from catga_tasks.outbox import NEXT_QUEUE, claim_statement
from tests.integration.relay_children import Site, tell
from tests.waiting import wait_until

ATTEMPTS = 3
SETTINGS = {"outbox_max_attempts": ATTEMPTS, "outbox_retry_backoff": 0.005, "outbox_retry_backoff_max": 0.01}
MARKER = "poison"
#: Rows of the big table: so many pending and as many in the future.
MANY = 500_000
QUEUES = ("celery", "second", "third", "rare", "future")


@pytest.fixture
def own_site(nursery, postgres_url, own_redis, tmp_path):
    """A site whose Redis takes nothing above one megabyte."""
    broker = own_redis("--proto-max-bulk-len", "1mb")
    with Site(nursery, postgres_url, broker.url, tmp_path) as running:
        yield running


@pytest.fixture(params=["redis", "nats"])
def either_site(request, nursery, postgres_url, tmp_path):
    """A site over each broker."""
    url = (
        request.getfixturevalue("redis_url") if request.param == "redis" else request.getfixturevalue("own_nats")().url
    )
    with Site(nursery, postgres_url, url, tmp_path) as running:
        yield running


def check_dead(site, ids, words, *, attempts=ATTEMPTS):
    """The rows are dead letters, with an entry for each attempt and the error that was the real one."""
    dead = site.dead()
    assert sorted(dead) == sorted(ids)
    for row in dead.values():
        history = json.loads(row.history)
        assert row.attempts == attempts
        assert [entry["attempt"] for entry in history] == list(range(1, attempts + 1))
        assert all(words in entry["error"] and entry["at"] for entry in history), history
        assert words in row.error
        assert row.error == history[-1]["error"]


BROKEN = {
    "headers-garbage": ({"headers": "not json"}, "headers can't be decoded"),
    "headers-cut": ({"headers": '{"id": "x'}, "headers can't be decoded"),
    "headers-list": ({"headers": "[1]"}, "headers must be a JSON object"),
    "properties-garbage": ({"properties": "{{"}, "properties can't be decoded"),
    "properties-null": ({"properties": "null"}, "properties must be a JSON object"),
    "declarations-garbage": ({"declarations": "not json"}, ""),
    "declarations-strange": ({"declarations": '[{"kind": "Queue", "name": "q", "nonsense": {"a": 1}}]'}, None),
    "declarations-numbers": ({"declarations": "[1]"}, ""),
    "declarations-no-list": ({"declarations": '{"kind": "Queue"}'}, ""),
    "backend-calls-garbage": ({"backend_calls": "not json"}, ""),
    "backend-calls-unknown": ({"backend_calls": '[["no_such_call", 1]]'}, ""),
    "exchange-headers-garbage": ({"exchange": "named", "headers": "not json"}, "headers can't be decoded"),
    "exchange-properties-garbage": ({"exchange": "named", "properties": '{"expiration": "soon"}'}, ""),
    "headers-deep": ({"headers": '{"a":' * 100_000}, ""),
    "expiration-nan": ({"expiration": float("nan")}, ""),
    "expiration-infinite": ({"expiration": float("inf")}, ""),
    "priority-huge": ({"priority": 2_000_000_000}, None),
    "body-garbage": ({"body": b"\x00\xff\xfe", "content_encoding": "no-such\n"}, None),
}


@pytest.mark.parametrize("columns", BROKEN)
def test_06_broken_row(site, columns):
    """A row that can't be decoded dies after its attempts; its batch, and what follows, is delivered once."""
    values, words = BROKEN[columns]
    good = site.insert(5)
    bad = site.insert(1, **values)
    good += site.insert(5)
    relay = site.relay(settings=SETTINGS)
    wait_until(lambda: set(site.delivered()) >= set(good), deadline=5, what="the good rows")
    good += site.enqueue(5)
    site.drained(deadline=5)
    if words is None:
        # Nothing on the way looks at these: the worker will.
        assert sorted(site.delivered()) == sorted([*good, *_default_priority(site, bad)])
        return
    assert sorted(site.delivered()) == sorted(good)
    check_dead(site, bad, words)
    assert not relay.events("outage")


def _default_priority(site, ids):
    """Those ids that lie in the plain queue; the others are in the queue's key of their priority."""
    keys = [key for key in site.redis.scan_iter("celery*") if key != b"celery"]
    elsewhere = [json.loads(message)["headers"]["id"] for key in keys for message in site.redis.lrange(key, 0, -1)]
    return [task_id for task_id in ids if task_id not in elsewhere]


@pytest.mark.parametrize("history", ["not json", '{"a": 1}', "null", "[1]"])
def test_06_broken_history(site, history):
    """The record of earlier attempts is garbage: the next one counts all the same."""
    bad = site.insert(1, headers="not json", attempts=1, history=history)
    good = site.insert(5)
    relay = site.relay(settings=SETTINGS)
    site.drained(deadline=5)
    assert site.delivered() == good
    assert list(site.dead()) == bad
    assert not relay.exited()


def test_06_publish_raises(site):
    """A row whose publish raises what nobody expects: it is tried alone, dies, and holds nobody up."""
    good = site.insert(10)
    bad = site.insert(1, argument=MARKER)
    good += site.insert(10)

    def start():
        at = {"point": "before_publish", "marker": MARKER, "do": "raise", "once": False}
        return site.relay(settings=SETTINGS, at=at)

    relay, ends = start(), 0
    for _ in range(4 * ATTEMPTS):
        wait_until(lambda relay=relay: relay.exited() or site.pending() == 0, deadline=5, what="an end")
        if not relay.exited():
            break
        # A supervisor's part; a relay that goes on by itself needs none.
        relay, ends = start(), ends + 1
    tell("ends", ends)
    assert site.pending() == 0
    assert sorted(site.delivered()) == sorted(good)
    assert list(site.dead()) == bad
    assert site.dead()[bad[0]].attempts == ATTEMPTS


def test_06_broker_refuses_one_message(site):
    """Redis answers WRONGTYPE for one queue: its rows die with Redis' words, those of other queues don't wait."""
    site.redis.set("wrong", "not a list")
    good = site.insert(10)
    bad = site.insert(3, queue="wrong", routing_key="wrong")
    good += site.insert(10)
    relay = site.relay(settings=SETTINGS)
    site.drained()
    assert sorted(site.delivered()) == sorted(good)
    check_dead(site, bad, "WRONGTYPE")
    assert not relay.events("outage")


def test_06_message_over_the_brokers_limit(own_site):
    """Redis closes the connection on a message over its size limit: that row is found and dies, the others go out."""
    good = own_site.insert(5)
    bad = own_site.insert(1, argument="x" * 1_500_000)
    good += own_site.insert(5)
    relay = own_site.relay(settings=SETTINGS)
    own_site.drained()
    delivered = own_site.delivered()
    errors = {row.error for task_id, row in own_site.dead().items() if task_id in good}
    assert not errors, "good rows died"
    assert sorted(set(delivered)) == sorted(good)
    assert len(delivered) <= ATTEMPTS * len(good)
    check_dead(own_site, bad, "")
    assert all(row.error for row in own_site.dead().values())
    assert not relay.events("outage")


def keep_alive(site, *, most, **options):
    """Start relay after relay, as a supervisor does, until the outbox is empty; return how many died."""
    for deaths in range(most + 1):
        relay = site.relay(settings=SETTINGS, **options)
        wait_until(lambda relay=relay: relay.exited() or site.pending() == 0, deadline=15, what="an end")
        if not relay.exited():
            return deaths
        assert relay.code == -signal.SIGKILL
    raise AssertionError(f"{most} relays died and {site.pending()} rows are left")


@pytest.mark.parametrize("point", ["before_publish", "after_publish"])
def test_06_publish_kills_the_process(either_site, point):
    """A row kills each relay that has it: its attempts count all the same, and the rows around it are delivered."""
    site = either_site
    good = site.insert(10)
    bad = site.insert(1, argument=MARKER)
    good += site.insert(15)
    deaths = keep_alive(site, most=ATTEMPTS + 2, at={"point": point, "marker": MARKER, "do": "SIGKILL", "once": False})
    tell("deaths", deaths)
    # The first one blames the whole batch; each one after that is an attempt of the row alone.
    assert deaths == ATTEMPTS + 1
    delivered = [task_id for task_id in site.delivered() if task_id not in bad]
    assert sorted(set(delivered)) == sorted(good)
    # NATS takes a message of one id once.
    assert len(delivered) - len(good) <= (19 if point == "after_publish" and site.redis else 0)
    check_dead(site, bad, KILLED)
    assert site.execute("SELECT row_ids FROM catga_outbox_journal") == []


def test_06_two_killers_in_one_batch(site):
    """Two such rows: each gets its attempts, none is blamed for the other's deaths."""
    bad = site.insert(1, argument=MARKER)
    good = site.insert(5)
    bad += site.insert(1, argument=MARKER)
    good += site.insert(5)
    at = {"point": "before_publish", "marker": MARKER, "do": "SIGKILL", "once": False}
    deaths = keep_alive(site, most=2 * ATTEMPTS + 2, at=at)
    assert deaths == 2 * ATTEMPTS + 1
    assert sorted(site.delivered()) == sorted(good)
    check_dead(site, bad, KILLED)


def test_06_killer_beside_a_healthy_relay(site):
    """One relay dies of the row again and again while another works: the row dies, the rest goes out once."""
    at = {"point": "before_publish", "marker": MARKER, "do": "SIGKILL", "once": False}
    good = site.insert(30)
    bad = site.insert(1, argument=MARKER)
    good += site.insert(30)
    settings = {**SETTINGS, "outbox_batch_size": 5}
    relays = [site.relay(settings=settings, at=at) for _ in range(2)]
    deaths = 0

    def supervise():
        nonlocal deaths
        for place, relay in enumerate(relays):
            if relay.exited():
                deaths += 1
                relays[place] = site.relay(settings=settings, at=at)
        return site.pending() == 0

    wait_until(supervise, deadline=20, what="an empty outbox")
    assert deaths == ATTEMPTS + 1
    assert sorted(site.delivered()) == sorted(good)
    check_dead(site, bad, KILLED)


def test_06_dead_letters_fail(site):
    """The move to the dead letters fails: the row stays, with the reason, and moves when it can."""
    site.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no room'; END $$"
    )
    site.execute("CREATE TRIGGER refuse BEFORE INSERT ON catga_dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()")
    good = site.insert(5)
    bad = site.insert(2, headers="not json")
    good += site.insert(5)
    relay = site.relay(settings=SETTINGS)

    def attempts():
        return [row[0] for row in site.execute("SELECT attempts FROM catga_outbox")]

    wait_until(lambda: len(attempts()) == 2 and min(attempts()) > ATTEMPTS + 1, what="attempts beyond the last")
    good += site.enqueue(5)
    wait_until(lambda: len(site.delivered()) == len(good), what="the good rows")
    histories = [json.loads(row[0]) for row in site.execute("SELECT history FROM catga_outbox WHERE attempts > 0")]
    assert all("the move to the dead letters failed: RaiseException" in history[-1]["error"] for history in histories)
    assert not site.dead()
    site.execute("DROP TRIGGER refuse ON catga_dead_letters")
    site.drained()
    assert sorted(site.delivered()) == sorted(good)
    dead = site.dead()
    assert sorted(dead) == sorted(bad)
    assert all("headers can't be decoded" in row.error and row.attempts > ATTEMPTS for row in dead.values())
    assert not relay.exited()


def test_06_killer_whose_burial_fails(site):
    """A row that kills relays, and dead letters that take nothing: it is kept, and the good rows go out."""
    site.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no room'; END $$"
    )
    site.execute("CREATE TRIGGER refuse BEFORE INSERT ON catga_dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()")
    bad = site.insert(1, argument=MARKER)
    good = site.insert(10)
    at = {"point": "before_publish", "marker": MARKER, "do": "SIGKILL", "once": False}
    for _ in range(ATTEMPTS + 3):
        relay = site.relay(settings=SETTINGS, at=at)
        assert relay.wait() == -signal.SIGKILL
    assert [row[0] for row in site.execute("SELECT task_id FROM catga_outbox WHERE suspect")] == bad
    assert sorted(site.delivered()) == sorted(good)
    site.execute("DROP TRIGGER refuse ON catga_dead_letters")
    keep_alive(site, most=2, at=at)
    assert sorted(site.dead()) == sorted(bad)


def test_11_part_of_a_batch_fails(site):
    """The good rows of each batch are done at once; the bad ones come back one by one and may get well."""
    site.redis.set("wrong", "not a list")
    good = site.insert(8)
    cured = site.insert(4, queue="wrong", routing_key="wrong")
    good += site.insert(8)
    relay = site.relay(settings={"outbox_retry_backoff": 0.05, "outbox_retry_backoff_max": 0.1})

    def tried():
        return [row[0] for row in site.execute("SELECT attempts FROM catga_outbox")]

    wait_until(lambda: len(tried()) == 4 and min(tried()) >= 2, what="second attempts")
    assert site.delivered() == good
    site.redis.delete("wrong")
    site.drained()
    assert sorted(site.delivered("wrong")) == sorted(cured)
    assert site.delivered() == good
    assert not site.dead()
    assert not relay.events("outage")


def test_11_bad_rows_in_every_batch(site):
    """More bad rows than a batch holds, in front of good ones: the good ones aren't held up."""
    bad = site.insert(60, headers="not json")
    good = site.insert(20)
    site.relay(settings={**SETTINGS, "outbox_retry_backoff": 60.0, "outbox_retry_backoff_max": 60.0})
    wait_until(lambda: site.delivered() == good, deadline=5, what="the good rows")
    assert site.execute("SELECT count(*) FROM catga_outbox WHERE attempts >= 1")[0][0] == len(bad)


# The plans of scenario 10 ------------------------------------------------------------------------------------------

FILL = """
INSERT INTO catga_outbox (task_id, task, queue, exchange, routing_key, content_type, content_encoding, headers,
    properties, body, send_event, broker, available_at)
SELECT 'id-' || number, 'chaos.task', :queue, '', :queue, 'application/json', 'utf-8', '{}', '{}', 'x', false, :broker,
    clock_timestamp() + make_interval(secs => CASE WHEN :future THEN 3600 + number ELSE -number END / 100.0)
FROM generate_series(1, :count) AS number
"""


@pytest.fixture(scope="module")
def big(nursery, postgres_server, tmp_path_factory):
    """MANY pending rows in three queues, a few in another one, MANY for a broker that is out, and MANY for later."""
    from sqlalchemy import create_engine, make_url

    from catga_tasks import migrate

    admin = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS catga_big WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE catga_big"))
    url = make_url(postgres_server).set(database="catga_big").render_as_string(hide_password=False)
    engine = create_engine(url)
    migrate.upgrade(engine)
    started = time.monotonic()
    shares = {("celery", False): 8, ("second", False): 1, ("third", False): 1, ("celery", True): 5, ("future", True): 5}
    with engine.begin() as connection:
        for (queue, future), tenths in shares.items():
            count = MANY * tenths // 10
            connection.execute(text(FILL), {"queue": queue, "future": future, "count": count, "broker": ""})
        connection.execute(text(FILL), {"queue": "rare", "future": False, "count": 3, "broker": ""})
        connection.execute(text(FILL), {"queue": "celery", "future": False, "count": MANY, "broker": "out"})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("UPDATE catga_outbox SET suspect = true WHERE queue = 'third' AND id % 100 = 0"))
        connection.execute(text("ANALYZE catga_outbox"))
    tell(f"filled in {time.monotonic() - started:.1f} s")
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE catga_big WITH (FORCE)"))
    admin.dispose()


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def check_plan(plan, forms):
    kinds = {node["Node Type"] for node in nodes(plan)}
    assert kinds <= {"Limit", "LockRows", "Index Scan", "Incremental Sort", "Result"}, (forms, plan)
    assert "Index Scan" in kinds, (forms, plan)
    assert "Incremental Sort" not in kinds, (forms, plan)


VARIANTS = [
    {"queue": queue, "after": after, "suspects": suspects}
    for queue in (False, True)
    for after in (False, True)
    for suspects in (False, True)
]


@pytest.mark.parametrize(
    "forms", VARIANTS, ids=lambda forms: "-".join(name for name in forms if forms[name]) or "plain"
)
@pytest.mark.parametrize("limit", [1, 500])
def test_10_plan(big, forms, limit):
    """With a million rows each form of the claim walks along an index and stops at its limit."""
    with big.connect() as connection:
        statement = str(claim_statement(connection, **forms))
        middle = connection.execute(
            text("SELECT CAST(available_at AS text), id FROM catga_outbox WHERE queue = 'celery' LIMIT 1")
        ).one()
        for queue in QUEUES if forms["queue"] else ("",):
            values = {"limit": limit, "broker": "", "queue": queue, "after_at": middle[0], "after_id": middle[1]}
            values = {name: value for name, value in values.items() if f":{name}" in statement}
            explain = text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
            explain = explain.bindparams(**values)
            plan = connection.execute(explain).scalar_one()[0]
            connection.rollback()
            check_plan(plan["Plan"], (forms, queue))
            tell(forms, queue, plan["Execution Time"])
            assert plan["Execution Time"] < 250


@pytest.mark.parametrize(
    "forms", VARIANTS, ids=lambda forms: "-".join(name for name in forms if forms[name]) or "plain"
)
def test_10_generic_plan(big, forms):
    """The same for the plan that PostgreSQL keeps for a prepared statement, whatever its values."""
    with big.connect() as connection:
        statement = str(claim_statement(connection, **forms))
    kinds = {"limit": "bigint", "broker": "text", "queue": "text", "after_at": "timestamptz", "after_id": "bigint"}
    names = list(dict.fromkeys(name for name in re.findall(r"(?<!:):(\w+)", statement) if name in kinds))
    for place, name in enumerate(names, 1):
        statement = re.sub(rf"(?<!:):{name}\b", f"${place}", statement)
    values = {
        "limit": "500",
        "broker": "''",
        "queue": "'second'",
        "after_at": "now() - interval '1 h'",
        "after_id": "1",
    }
    url = big.url.render_as_string(hide_password=False).replace("+psycopg", "")
    with psycopg.connect(url, prepare_threshold=None) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE claim ({', '.join(kinds[name] for name in names)}) AS {statement}")
        execute = f"EXECUTE claim ({', '.join(values[name] for name in names)})"
        plan = connection.execute(f"EXPLAIN (FORMAT JSON) {execute}").fetchone()[0][0]
        connection.rollback()
    check_plan(plan["Plan"], forms)


@pytest.mark.parametrize("queues", [(), ("rare",), ("second", "rare"), QUEUES], ids="-".join)
def test_10_claims_are_quick(big, queues):
    """A relay's claims take milliseconds in such a table, with no queue, one queue or several named."""
    from catga_tasks.claims import Claims
    from catga_tasks.config import Settings

    claims = Claims(big, Settings(outbox_batch_size=100), relay="test", queues=queues)
    times, taken = [], set()
    for _ in range(12):
        started = time.monotonic()
        rows = claims.take()
        times.append(time.monotonic() - started)
        taken.update(row.envelope.queue for row in rows)
        claims.release()
        claims.forget_journal()
    tell(queues, f"{1000 * sorted(times)[6]:.1f} ms median, {1000 * max(times):.1f} ms at most", taken)
    assert taken <= set(queues or QUEUES)
    assert taken
    assert sorted(times)[6] < 0.1
    assert claims.next_due() == 0
    claims.release()


def test_10_claims_beside_a_paused_queue(big):
    """A paused queue with most of a million rows: claims find the others by index probes, and take none of its own."""
    from catga_tasks import pauses
    from catga_tasks.claims import Claims
    from catga_tasks.config import Settings

    with big.begin() as connection:
        pauses.pause(connection, "", "celery", "alice")
        explain = text(f"EXPLAIN (FORMAT JSON) {NEXT_QUEUE}").bindparams(broker="", last="celery")
        plan = connection.execute(explain).scalar_one()[0]["Plan"]
        assert {node["Node Type"] for node in nodes(plan)} == {"Result", "Limit", "Index Only Scan"}, plan
    claims, taken = Claims(big, Settings(outbox_batch_size=100), relay="test"), set()
    for _ in range(12):
        taken.update(row.envelope.queue for row in claims.take())
        claims.release()
        claims.forget_journal()
    assert {"second", "third", "rare"} <= taken <= set(QUEUES) - {"celery"}
    with big.begin() as connection:
        pauses.resume(connection, "", "celery")


@pytest.mark.parametrize("state", [None, "pending", "scheduled", "retrying"])
@pytest.mark.parametrize("filters", [{}, {"task": "no.such"}, {"text": "no such words", "queue": "rare"}], ids="-".join)
def test_10_pages(big, state, filters):
    """A page of the list walks back along an index and stops, whatever it is asked for."""
    from catga_tasks import browse
    from catga_tasks.selection import Selection

    with big.connect() as connection:
        statement, values = browse.page_statement(connection, "catga_outbox", Selection(**filters), state)
        values |= {"before": 2**62, "scan": browse.SCAN, "limit": 51}
        explain = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}").bindparams(**values)
        plan = connection.execute(explain).scalar_one()[0]["Plan"]
        kinds = {node["Node Type"] for node in nodes(plan)}
        assert kinds <= {"Limit", "Index Scan", "Subquery Scan", "Result"}, plan
        assert max(node["Actual Rows"] for node in nodes(plan)) <= browse.SCAN
        names = {node["Index Name"] for node in nodes(plan) if node["Node Type"] == "Index Scan"}
        assert names == {"catga_outbox_retrying" if state == "retrying" else "catga_outbox_pkey"}
