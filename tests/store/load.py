"""What every store must stand: rival drivers, readers beside the writer, kills, and many candidates."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from evomerge.errors import LostRunError, StoreError
from evomerge.store import Run, Store
from tests.contracts.store import WRITES, dump, sql
from tests.store.processes import GENERATION, advance, make_candidate, make_outcome, start


def other_host(store: Store, seconds_ago: float) -> None:
    """Make the run look driven from a host that we cannot look into."""
    owner = '{"host": "elsewhere", "pid": 1, "started": "tick 1"}'
    sql(store, "UPDATE runs SET owner = :owner, heartbeat = heartbeat - :ago", owner=owner, ago=seconds_ago)


class StoreUnderLoad:
    """A subclass provides the fixture `url`: the URL of an empty database for each test."""

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        with Store.open(url) as store:
            yield store

    @pytest.fixture
    def run(self, store: Store) -> Run:
        return store.create_run("r", {"budget": 1}, {"fingerprint": "a"})

    def test_a_living_driver_is_not_displaced_and_a_dead_one_is(
        self, store: Store, run: Run, url: str
    ) -> None:
        run.release("stopped")
        with start("hold", url, "r") as holder:
            assert holder.stdout.readline() == "epoch 2\n"
            before = dump(store)
            with pytest.raises(StoreError, match=f'"r" is driven by process {holder.pid} on .*stop it first'):
                store.take_run("r")
            assert dump(store) == before
            assert store.run("r").owner_alive
            holder.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 30
            # Not waited for: a zombie counts as dead.
            while store.run("r").owner_alive and time.monotonic() < deadline:
                time.sleep(0.01)
            assert store.run("r").status == "running"
            assert store.take_run("r").epoch == 3

    def test_a_reused_pid_is_not_the_driver(self, store: Store, run: Run) -> None:
        owner = run.owner
        assert owner is not None
        other = replace(owner, pid=os.getppid(), started="tick 1")
        sql(store, "UPDATE runs SET owner = :owner", owner=other.to_json())
        assert not store.run("r").owner_alive
        assert store.take_run("r").epoch == 2

    def test_a_driver_on_another_host_lives_while_it_writes(self, store: Store, run: Run) -> None:
        other_host(store, 50)
        assert store.run("r").owner_alive
        with pytest.raises(StoreError, match="driven by process 1 on elsewhere, which wrote 50 s ago"):
            store.take_run("r")
        other_host(store, 15)
        assert not store.run("r").owner_alive
        assert store.take_run("r").epoch == 2

    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_an_old_handle_writes_nothing(self, store: Store, run: Run, write: Callable[[Run], None]) -> None:
        run.add_candidate(make_candidate(0), 0)
        run.add_outcome(make_outcome(0), "f")
        store.take_run("r")
        store.take_run("r")
        before = dump(store)
        with pytest.raises(LostRunError, match="lost run r: epoch 1, now 3"):
            write(run)
        assert dump(store) == before

    def test_every_write_works_for_the_driver(self, store: Store, run: Run) -> None:
        run.add_candidate(make_candidate(0), 0)
        run.add_outcome(make_outcome(0), "f")
        for write in WRITES.values():
            before = dump(store)
            write(run)
            assert dump(store) != before

    def test_eight_processes_claim_one_run(self, store: Store, run: Run, url: str) -> None:
        run.release("stopped")
        claimers = [start("claim", url, "r") for _ in range(8)]
        try:
            for claimer in claimers:
                assert claimer.stdout.readline() == "ready\n"
            for claimer in claimers:
                claimer.stdin.write("go\n")
                claimer.stdin.flush()
            said = sorted(claimer.stdout.readline().split()[0] for claimer in claimers)
        finally:
            for claimer in claimers:
                claimer.communicate()
        assert said == ["lost"] * 7 + ["won"]
        assert store.run("r").epoch == 2

    def test_readers_and_a_writer_do_not_disturb_each_other(self, store: Store, run: Run, url: str) -> None:
        advance(run, [])
        outside = [start("read", url, "r") for _ in range(2)]
        for process in outside:
            assert process.stdout.readline() == "ready\n"
        done, failures, reads = threading.Event(), [], []

        def read() -> None:
            try:
                while not done.is_set():
                    log = store.run("r").log()
                    assert len(log.told) % GENERATION == 0
                    assert run.counts().candidates >= len(log.told)
                    reads.append(len(log.told))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            advance(run, [])
            run.heartbeat()
        done.set()
        for thread in threads:
            thread.join()
        for process in outside:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert int(out.split()[1]) > 0
        assert not failures
        assert len(reads) > 3

    def test_threads_may_share_a_handle(self, run: Run) -> None:
        def note(name: int) -> None:
            for place in range(20):
                run.add_event("note", {"by": name, "place": place})

        threads = [threading.Thread(target=note, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [event.id for event in run.events()] == list(range(1, 81))

    def test_a_killed_writer_loses_nothing_it_acknowledged(self, store: Store, run: Run, url: str) -> None:
        run.release("stopped")
        draw = random.Random(0)
        acknowledged: dict[str, int] = {"candidate": -1, "outcome": -1, "told": 0}
        for kill in range(10):
            with start("write", url, "r") as writer:
                acknowledged.update(_said(writer.stdout.readline()))
                time.sleep(draw.uniform(0, 0.15))
                writer.send_signal(signal.SIGKILL)
                for line in writer.stdout:
                    # The last line may be torn.
                    acknowledged.update(_said(line) if line.endswith("\n") else {})
            log = store.run("r").log()
            assert len(log.asked) > acknowledged["candidate"]
            assert len(log.told) + len(log.waiting) > acknowledged["outcome"]
            assert len(log.told) >= acknowledged["told"]
            assert len(log.told) % GENERATION == 0
            snapshot = store.run("r").latest_snapshot()
            assert (snapshot.told if snapshot else 0) == len(log.told)
            assert store.run("r").epoch == kill + 2
        again = store.take_run("r")
        advance(again, [])
        told = [outcome.candidate for outcome in again.log().told]
        assert len(told) > 10
        assert told == list(range(len(told)))
        assert repr(again.candidates()) == repr([make_candidate(number) for number in told])
        assert repr(again.outcomes()) == repr([make_outcome(number) for number in told])


def _said(line: str) -> dict[str, int]:
    kind, _, number = line.strip().partition(" ")
    return {kind: int(number)}
