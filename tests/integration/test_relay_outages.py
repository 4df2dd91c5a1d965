"""The broker or the database goes away, slows down or lies about the time: the relay waits and catches up."""

from __future__ import annotations

import random
import time
from collections import Counter

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from catga_tasks.errors import CatgaError
from tests.integration.relay_children import OUTAGE, Nursery, Site, background, insert, tell
from tests.waiting import wait_until

WORK = "state = 'idle in transaction'"
SIDE = "query LIKE '%INSERT INTO catga_outbox_journal%' AND state = 'idle'"
LISTENER = "query LIKE 'LISTEN%' AND state = 'idle'"


@pytest.fixture
def broker(own_redis):
    return own_redis()


@pytest.fixture
def broker_site(nursery, postgres_url, broker, tmp_path):
    """A site with a broker of its own, to be stopped."""
    with Site(nursery, postgres_url, broker.url, tmp_path) as running:
        yield running


@pytest.fixture
def database(own_postgres):
    return own_postgres()


@pytest.fixture
def database_site(nursery, database, redis_url, tmp_path):
    """A site with a database server of its own, to be stopped."""
    with Site(nursery, database.create_database("chaos"), redis_url, tmp_path) as running:
        yield running


def shuffled(site, count):
    """Rows whose order of availability isn't that of their ids; returns the ids in the former."""
    ids = site.insert(count)
    order = random.Random(3).sample(ids, count)
    for place, task_id in enumerate(order):
        site.execute(
            "UPDATE catga_outbox SET available_at = now() - make_interval(secs => :ago) WHERE task_id = :id",
            ago=1000 - place, id=task_id,
        )  # fmt: skip
    return order


def untouched(site, count):
    """Whether no attempt was used up and no row put off, marked or buried."""
    found = site.execute("SELECT attempts, history, suspect FROM catga_outbox")
    assert found == [(0, None, False)] * count
    assert not site.dead()


def grew(relay, *, first, longest):
    """Whether the pauses grew to the cap, and no further."""
    pauses = relay.events("outage")
    assert [pause["ceiling"] for pause in pauses[:2]] == [first, 2 * first]
    assert pauses[-1]["ceiling"] == longest
    assert all(pause["seconds"] <= pause["ceiling"] for pause in pauses)
    assert [pause["failures"] for pause in pauses] == list(range(1, len(pauses) + 1))


@pytest.mark.parametrize("end", ["kill", "stop_again"])
def test_02_broker_down(broker_site, broker, end):
    """No attempts are burned, the back-off grows to its cap, and the rows drain in the order of availability."""
    broker.kill()
    order = shuffled(broker_site, 100)
    relay = broker_site.relay()
    wait_until(lambda: len(relay.events("outage")) >= 6, what="six failures")
    untouched(broker_site, 100)
    grew(relay, first=OUTAGE[0], longest=OUTAGE[1])
    broker.start()
    broker_site.drained()
    assert broker_site.delivered() == order
    if end == "stop_again":
        broker.restart()
        more = broker_site.enqueue(20)
        broker_site.drained()
        assert broker_site.delivered() == [*order, *more]


def test_02_broker_killed_under_load(broker_site, broker):
    """SIGKILL and restart of the broker, with enqueues going on: nothing is lost or blamed."""
    committed = []
    relay = broker_site.relay(settings={"outbox_batch_size": 5})

    def produce(stopping):
        while not stopping.is_set():
            committed.extend(broker_site.enqueue(5))
            stopping.wait(0.01)

    with background(produce):
        for _ in range(3):
            before = len(relay.events("settled"))
            wait_until(lambda seen=before: len(relay.events("settled")) > seen + 5, what="batches")
            broker.kill()
            outages = len(relay.events("outage"))
            wait_until(lambda seen=outages: len(relay.events("outage")) > seen, what="the outage to be seen")
            broker.start()
    broker_site.drained()
    times = Counter(broker_site.delivered())
    tell("committed", len(committed), "doubled", sum(times.values()) - len(times))
    assert set(times) == set(committed)
    assert sum(times.values()) - len(times) <= 3 * 5
    assert not broker_site.dead()
    assert "failed:" not in relay.log()


def test_02_broker_that_never_confirms(broker_site, broker):
    """A broker that takes connections and never answers: each try ends at the time-out, and nobody is blamed."""
    order = shuffled(broker_site, 40)
    broker.pause()
    relay = broker_site.relay(settings={"outbox_publish_timeout": 0.3})
    wait_until(lambda: len(relay.events("outage")) >= 5, what="five failures")
    untouched(broker_site, 40)
    grew(relay, first=OUTAGE[0], longest=OUTAGE[1])
    assert all(event["outage"] and event["took"] < 1.5 for event in relay.events("published"))
    broker.resume()
    broker_site.drained()
    assert list(dict.fromkeys(broker_site.delivered())) == order
    assert not broker_site.dead()


def test_02_broker_pauses_in_mid_run(broker_site, broker):
    """A connection that worked before stalls: the same time-out, the same result."""
    relay = broker_site.relay(settings={"outbox_publish_timeout": 0.3})
    first = broker_site.enqueue(30)
    broker_site.drained()
    broker.pause()
    second = broker_site.enqueue(30)
    wait_until(lambda: len(relay.events("outage")) >= 2, what="two failures")
    untouched(broker_site, 30)
    assert all(event["took"] < 1.5 for event in relay.events("published"))
    broker.resume()
    broker_site.drained()
    times = Counter(broker_site.delivered())
    assert set(times) == {*first, *second}
    # Redis reads what lay in its socket's buffer when it goes on: the batch under way may be doubled.
    assert max(times.values()) <= 1 + len(relay.events("published"))


def test_02_broker_that_refuses_everything(broker_site, broker):
    """A full Redis refuses each write: an outage, not the messages' fault."""
    broker_site.redis.config_set("maxmemory", "1")
    ids = broker_site.enqueue(30)
    relay = broker_site.relay()
    wait_until(lambda: len(relay.events("outage")) >= 4, what="four failures")
    untouched(broker_site, 30)
    broker_site.redis.config_set("maxmemory", "0")
    broker_site.drained()
    assert broker_site.delivered() == ids


def test_02_outage_skips_no_rows(broker_site, broker):
    """Tries in quick succession start with the same rows, and none is taken for a recovery."""
    broker.kill()
    order = shuffled(broker_site, 50)
    relay = broker_site.relay(outage=(0.0005, 0.0005))
    wait_until(lambda: len(relay.events("outage")) >= 40, what="forty failures")
    failures = [pause["failures"] for pause in relay.events("outage")]
    assert failures == list(range(1, len(failures) + 1))
    broker.start()
    broker_site.drained()
    assert broker_site.delivered() == order


@pytest.mark.parametrize("end", ["kill", "pause"])
def test_02_broker_goes_before_the_event(broker_site, broker, end):
    """The broker goes after it confirmed and before Celery's task-sent event: the event is lost, not the relay."""
    gate = broker_site.gate()
    relay = broker_site.relay(
        gate={"point": "after_publish", "file": str(gate)}, settings={"outbox_publish_timeout": 0.5}
    )
    ids = broker_site.insert(5, send_event=True)
    wait_until(lambda: relay.events("gated"), what="a confirmed batch")
    getattr(broker, end)()
    gate.unlink()
    wait_until(lambda: broker_site.pending() == 0, what="the batch to be settled")
    more = broker_site.insert(5)
    wait_until(lambda: relay.exited() or relay.events("outage"), deadline=10, what="the outage to be seen in time")
    assert not relay.exited(), relay.log()[-2000:]
    if end == "kill":
        broker.start()
    else:
        broker.resume()
    broker_site.drained()
    # A Redis that was paused reads the tries that timed out when it goes on.
    assert set(broker_site.delivered()) == {*ids, *more}


def terminate(site, which):
    """End the backends of this database that match; return how many did."""
    found = site.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = current_database() AND pid <> pg_backend_pid() AND {which}"
    )
    return len(found)


@pytest.mark.parametrize(
    ("which", "point", "doubled"),
    [
        (WORK, "before_publish", 20),
        (WORK, "after_publish", 20),
        (SIDE, "before_publish", 0),
        (SIDE, "after_publish", 0),
    ],
    ids=["claim-before", "claim-after", "journal-before", "journal-after"],
)
def test_04_connection_ended_in_mid_batch(site, which, point, doubled):
    """The claim's or the journal's connection is ended in mid-batch: only the claim's loss doubles its batch."""
    gate = site.gate()
    relay = site.relay(gate={"point": point, "file": str(gate)})
    wait_until(lambda: site.execute(f"SELECT 1 FROM pg_stat_activity WHERE {LISTENER}"), what="the LISTEN")
    ids = site.insert(50)
    wait_until(lambda: relay.events("gated"), what="a batch in hand")
    assert terminate(site, which) == 1
    gate.unlink()
    site.drained()
    times = Counter(site.delivered())
    assert set(times) == set(ids)
    assert sum(times.values()) - len(times) == doubled
    assert not site.dead()
    assert site.execute("SELECT id FROM catga_outbox_journal") == []


def test_04_listener_ended(site):
    """The listener's connection is ended: the next commit wakes the relay all the same, long before its poll."""
    site.relay(settings={"outbox_poll_interval_max": 30.0})
    site.enqueue(1)
    site.drained()

    def listening():
        return site.execute(f"SELECT pid FROM pg_stat_activity WHERE {LISTENER}")

    before = wait_until(listening, what="the LISTEN")
    assert terminate(site, LISTENER) == 1
    wait_until(lambda: listening() not in ([], before), deadline=15, what="a new LISTEN")
    ids = site.enqueue(10)
    started = time.monotonic()
    site.drained()
    assert time.monotonic() - started < 3
    assert set(site.delivered()) > set(ids)


def test_04_every_connection_ended_again_and_again(site):
    """All of the relay's connections are ended at random while enqueues are committed."""
    committed, unknown = [], []
    relay = site.relay(settings={"outbox_batch_size": 5})
    draw = random.Random(4)
    with background(lambda stopping: produce(site, stopping, committed, unknown)):
        for _ in range(25):
            seen = len(committed)
            wait_until(lambda seen=seen: len(committed) > seen, what="commits")
            time.sleep(draw.uniform(0, 0.05))
            terminate(site, "true")
    site.drained()
    audit(site, committed, unknown, most=25 * 5)
    assert not relay.exited()


def produce(site, stopping, committed, unknown):
    """Enqueue all the time. A commit that fails may have happened: its ids are unknown."""
    number = 0
    while not stopping.is_set():
        number += 1
        try:
            committed.extend(site.enqueue(3, f"n{number}"))
        except (SQLAlchemyError, CatgaError, psycopg.Error):
            unknown.append(f"n{number}")
        stopping.wait(0.01)


def audit(site, committed, unknown, *, most):
    """Everything that was committed is there, and what else is there comes from a commit of unknown outcome."""
    times = Counter(site.delivered())
    tell("committed", len(committed), "unknown", len(unknown), "doubled", sum(times.values()) - len(times))
    assert set(committed) <= set(times)
    assert len(set(times) - set(committed)) <= 3 * len(unknown)
    assert sum(times.values()) - len(times) <= most
    assert not site.dead()


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_04_database_restarts(database_site, database, end):
    """The server is restarted or killed in mid-run: the relay waits for it and goes on by itself."""
    committed, unknown = [], []
    relay = database_site.relay(settings={"outbox_batch_size": 5})
    with background(lambda stopping: produce(database_site, stopping, committed, unknown)):
        for _ in range(2):
            seen = len(committed)
            wait_until(lambda seen=seen: len(committed) > seen + 30, what="commits")
            failures = len(relay.events("outage"))
            if end == "restart":
                database.restart()
            else:
                database.kill()
                wait_until(lambda seen=failures: len(relay.events("outage")) > seen + 2, what="failures")
                database.start()
            wait_until(lambda seen=failures: len(relay.events("outage")) > seen, what="a failure")
        seen = len(committed)
        wait_until(lambda: len(committed) > seen + 30, what="commits after the restart")
    database_site.drained()
    assert not relay.exited()
    audit(database_site, committed, unknown, most=2 * 5)


def test_04_read_only_database(site):
    """A database that takes no writes for a while, as after a fail-over: the relay waits for the end of it."""
    relay = site.relay()
    first = site.enqueue(10)
    site.drained()
    name = site.execute("SELECT current_database()")[0][0]
    second = site.insert(30)
    site.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    # The setting is for new sessions: end the old ones.
    terminate(site, "true")
    wait_until(lambda: "ReadOnlySqlTransaction" in relay.log(), what="a refused write")
    failures = len(relay.events("outage"))
    wait_until(lambda: len(relay.events("outage")) > failures + 2, what="more refused writes")
    with psycopg.connect(site.outbox_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    more = site.insert(5)
    site.drained(deadline=15)
    assert set(site.delivered()) == {*first, *second, *more}
    assert not site.dead()


@pytest.fixture(params=[3600.0, -3600.0], ids=["ahead", "behind"])
def wrong(request):
    """Starts relays whose clock is wrong."""
    with Nursery(clock=request.param) as running:
        yield running


def test_05_wrong_clock(wrong, site):
    """The relay's clock is an hour off: what is due, what is put off and who lives is the database's to say."""
    site.redis.set("wrong", "not a list")
    now, later, far = site.insert(10), site.insert(5), site.insert(5)
    bad = site.insert(1, queue="wrong", routing_key="wrong")
    put_off = (
        "UPDATE catga_outbox SET available_at = clock_timestamp() + make_interval(secs => :s) WHERE task_id = ANY(:i)"
    )
    site.execute(put_off, s=3000, i=far)
    site.execute(put_off, s=1.5, i=later)
    due = site.execute("SELECT max(available_at) FROM catga_outbox WHERE task_id = ANY(:ids)", ids=later)[0][0]
    relay = site.relay(nursery=wrong, settings={"outbox_max_attempts": 3})

    def all_there():
        seen = set(site.delivered())
        overdue = site.execute("SELECT extract(epoch FROM clock_timestamp() - :due)", due=due)[0][0]
        assert overdue >= 0 or seen.isdisjoint(later), "sent before its time"
        assert overdue < 5, "sent long after its time"
        return seen == {*now, *later}

    wait_until(all_there, what="what is due")
    wait_until(lambda: list(site.dead()) == bad, what="the dead letter")
    moments = "SELECT died_at FROM catga_dead_letters UNION ALL SELECT heartbeat_at FROM catga_relays"
    ages = site.execute(f"SELECT abs(extract(epoch FROM clock_timestamp() - died_at)) FROM ({moments}) AS moments")
    assert len(ages) >= 2
    assert all(age < 60 for (age,) in ages)
    assert site.pending() == len(far)
    assert not relay.log().startswith(time.strftime("%Y-%m-%d %H")), "the relay's clock wasn't shifted"


def test_08_ids_are_not_commits(site):
    """A takes the first ids and sleeps, B commits later ones, many times over: both are delivered."""
    site.relay()
    with site.engine.connect() as sleeper:
        slow = insert(sleeper, 5)
        fast = []
        for _ in range(20):
            fast += site.enqueue(10)
            site.drained()
        assert site.delivered() == fast
        lowest = sleeper.execute(text("SELECT min(id) FROM catga_outbox")).scalar()
        assert lowest == 1
        sleeper.commit()
    site.drained(deadline=5)
    assert site.delivered() == [*fast, *slow]


def test_08_late_commits_under_load(site):
    """The same while the relay always finds newer rows: the late ones aren't starved."""
    site.relay(settings={"outbox_batch_size": 5})
    committed = []

    def work(stopping):
        while not stopping.is_set():
            committed.extend(site.enqueue(5))

    late = []
    with background(work):
        for _ in range(5):
            with site.engine.connect() as sleeper:
                ids = insert(sleeper, 2)
                seen = len(committed)
                wait_until(lambda seen=seen: len(committed) > seen + 50, what="commits")
                sleeper.commit()
            wait_until(lambda ids=ids: set(site.delivered()) >= set(ids), deadline=10, what="the late commit")
            late += ids
    site.drained()
    assert sorted(site.delivered()) == sorted([*committed, *late])


def test_09_held_snapshot(site):
    """A transaction holds its snapshot, so no dead row can be removed, while 20,000 rows are drained."""
    with site.engine.connect().execution_options(isolation_level="REPEATABLE READ") as holder:
        assert holder.execute(text("SELECT count(*) FROM catga_outbox")).scalar() == 0
        ids = site.insert(20_000)
        started = time.monotonic()
        relay = site.relay(settings={"outbox_batch_size": 500})
        site.drained(deadline=60)
        took = time.monotonic() - started
        assert holder.execute(text("SELECT count(*) FROM catga_outbox")).scalar() == 0
    times = [event["at"] for event in relay.events("settled")]
    quarter = len(times) // 4
    first, last = times[quarter] - times[0], times[-1] - times[-1 - quarter]
    tell(f"20,000 rows in {took:.1f} s; the first quarter took {first:.2f} s, the last {last:.2f} s")
    assert sorted(site.delivered()) == sorted(ids)
    assert len(ids) / took > 500
    assert last < 5 * first + 1


def test_13_lost_wake_up(site):
    """Rows that nobody announces are found by polling."""
    relay = site.relay(settings={"outbox_poll_interval_max": 0.5})
    wait_until(lambda: site.execute(f"SELECT 1 FROM pg_stat_activity WHERE {LISTENER}"), what="the LISTEN")
    delivered = []
    for _ in range(3):
        delivered += site.insert(5)
        started = time.monotonic()
        site.drained(deadline=5)
        assert time.monotonic() - started < 2
    assert site.delivered() == delivered
    assert not relay.exited()


def test_13_no_listener_at_all(site):
    """The listener's connection is ended whenever it shows up, as a pooler might: polling is enough."""
    relay = site.relay(settings={"outbox_poll_interval_max": 0.3})

    def work(stopping):
        while not stopping.wait(0.01):
            terminate(site, LISTENER)

    with background(work):
        ids = []
        for _ in range(10):
            ids += site.enqueue(5)
            site.drained(deadline=10)
    assert site.delivered() == ids
    assert not relay.exited()
