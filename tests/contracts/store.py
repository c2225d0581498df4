"""What every store must do, whatever the database."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from evomerge.errors import ConflictError, StoreError
from evomerge.records import Candidate, Outcome, TaskScore
from evomerge.store import Run, Snapshot, Store
from evomerge.store.connect import ConnectionLost
from evomerge.store.tables import METADATA
from tests.store.processes import make_candidate, make_outcome

floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = floats | st.integers(-(2**53), 2**53)

WRITES: dict[str, Callable[[Run], None]] = {
    "add_candidate": lambda run: run.add_candidate(make_candidate(1), 0),
    "add_outcome": lambda run: run.add_outcome(make_outcome(0, "select"), "f"),
    "tell": lambda run: run.tell([0], "search", Snapshot(1, 1, {})),
    "add_document_set": lambda run: run.add_document_set("search", {"task": [1, 2]}),
    "set_status": lambda run: run.set_status("stopped"),
    "set_config": lambda run: run.set_config({"budget": 2}),
    "set_facts": lambda run: run.set_facts({"fingerprint": "b"}),
    "add_event": lambda run: run.add_event("note", {}),
    "set_activity": lambda run: run.set_activity({"done": 1}),
    "heartbeat": lambda run: run.heartbeat(),
    "release": lambda run: run.release("finished"),
}


def dump(store: Store) -> dict[str, list[tuple[object, ...]]]:
    """Return every row of every table."""
    with store.reading() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(table.select())), key=repr)
            for name, table in METADATA.tables.items()
        }


def sql(store: Store, statement: str, **values: object) -> None:
    with store.writing() as connection:
        connection.execute(text(statement), values)


class StoreContract:
    """A subclass provides the fixture `url`: the URL of an empty database for each test."""

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        with Store.open(url) as store:
            yield store

    @pytest.fixture
    def run(self, store: Store) -> Run:
        return store.create_run("r", {"budget": 1}, {"fingerprint": "a"})

    # Life cycle

    def test_life_of_a_run(self, store: Store, url: str) -> None:
        run = store.create_run("first-1.0", {"budget": 8, "x": 0.1}, {"versions": {"torch": "2"}})
        assert (run.name, run.status, run.epoch, run.error) == ("first-1.0", "running", 1, "")
        assert abs(run.created - time.time()) < 60
        assert run.owner_alive
        assert run.owner is not None
        assert run.owner.pid == os.getpid()
        run.set_config({"budget": 9})
        run.set_facts({"versions": {"torch": "3"}})
        run.set_status("stopped", "why\x00not\ud800")
        view = store.run("first-1.0")
        assert (view.status, view.error) == ("stopped", "why\x00not\ud800")
        assert (view.config, view.facts) == (run.config, run.facts) == ({"budget": 9}, run.facts)
        assert view.updated >= view.created == run.created
        run.release("finished")
        with Store.open(url, create=False) as other:
            view = other.run("first-1.0")
            assert (view.status, view.owner, view.owner_alive) == ("finished", None, False)
            again = other.take_run("first-1.0")
            assert (again.status, again.error, again.epoch) == ("running", "", 2)

    def test_runs_are_listed_oldest_first_and_kept_apart(self, store: Store) -> None:
        runs = [store.create_run(name, {}, {}) for name in ("b", "a")]
        assert [view.name for view in store.runs()] == ["b", "a"]
        for run in runs:
            run.add_candidate(make_candidate(0), 0)
            run.add_outcome(make_outcome(0), "f")
            run.add_event("note", {"run": run.name})
            run.tell([0], "search", Snapshot(1, 1, {"run": run.name}))
        for run in runs:
            assert len(run.candidates()) == len(run.outcomes()) == len(run.log().told) == 1
            said = {"candidate": 0, "documents": "search", "status": "ok", "score": make_outcome(0).score}
            assert [(event.kind, event.data) for event in run.events()] == [
                ("outcome", said),
                ("note", {"run": run.name}),
            ]
            assert [event.id for event in run.events(kind="note")] == [2]
            snapshot = run.latest_snapshot()
            assert snapshot is not None
            assert snapshot.state == {"run": run.name}

    @pytest.mark.parametrize("name", ["", "../x", ".x", "a b", "a/b", "-a", "a\n", "é", "x" * 101])
    def test_bad_run_name(self, store: Store, name: str) -> None:
        with pytest.raises(StoreError, match=r"run name .* is not allowed; expected 1 to 100 letters"):
            store.create_run(name, {}, {})
        assert store.runs() == []

    def test_name_clash(self, store: Store, run: Run) -> None:
        before = dump(store)
        with pytest.raises(StoreError, match=r'run "r" exists .*: evomerge resume r, or give another name'):
            store.create_run("r", {}, {})
        assert dump(store) == before

    def test_unknown_run(self, store: Store, run: Run) -> None:
        for fetch in (store.run, store.take_run):
            with pytest.raises(StoreError, match=r'there is no run "rr" in store .*did you mean "r"'):
                fetch("rr")

    def test_a_released_handle_only_reads(self, store: Store, run: Run) -> None:
        run.release("stopped")
        before = dump(store)
        for write in WRITES.values():
            with pytest.raises(StoreError, match='run "r": this driver released it'):
                write(run)
        assert dump(store) == before
        assert run.candidates() == []

    @pytest.mark.parametrize("name", WRITES)
    @pytest.mark.parametrize("committed", [True, False])
    def test_a_write_that_the_connection_broke_under_is_done_once(
        self, store: Store, run: Run, name: str, committed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twin = store.create_run("twin", {"budget": 1}, {"fingerprint": "a"})
        for one in (run, twin):
            one.add_candidate(make_candidate(0), 0)
            one.add_outcome(make_outcome(0), "f")
        WRITES[name](twin)
        whole, broken = store.writing, []

        @contextmanager
        def breaking() -> Iterator[Connection]:
            with whole() as connection:
                yield connection
                if not broken and not committed:
                    broken.append(1)
                    raise ConnectionLost("gone")
            if not broken:
                broken.append(1)
                raise ConnectionLost("gone")

        monkeypatch.setattr(store, "writing", breaking)
        WRITES[name](run)
        assert broken
        assert (run.candidates(), run.outcomes(), run.log()) == (
            twin.candidates(),
            twin.outcomes(),
            twin.log(),
        )
        assert [event.kind for event in run.events()] == [event.kind for event in twin.events()]
        assert run.latest_snapshot() == twin.latest_snapshot()

    # Candidates and outcomes

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(
        genome=st.none() | st.lists(floats, max_size=5).map(tuple),
        weights=st.lists(numbers, max_size=3),
        words=st.text(max_size=5),
        score=floats,
        values=st.lists(floats | st.tuples(floats, floats), max_size=5).map(tuple),
    )
    def test_everything_comes_back_bit_for_bit(
        self,
        store: Store,
        genome: tuple[float, ...] | None,
        weights: list[float],
        words: str,
        score: float,
        values: tuple[float | tuple[float, float], ...],
    ) -> None:
        run = store.create_run(f"r{len(store.runs())}", {"weights": weights}, {"words": words})
        candidate = Candidate(0, "optimizer", 2, 3, genome, {"weights": weights, words: None}, "digest")
        tasks = {words: TaskScore(score, None)}
        outcome = Outcome(0, "search@2", "ok", score, abs(score), tasks, {words: values}, words, {"s": score})
        run.add_candidate(candidate, 7)
        run.add_outcome(outcome, "f")
        # repr tells -0.0 from 0.0 and 1 from 1.0; == does not.
        assert repr(run.candidates()) == repr([candidate])
        assert repr(run.candidate(0)) == repr(candidate)
        assert repr(run.outcomes()) == repr([outcome])
        assert repr(run.log().waiting) == repr((outcome,))
        assert repr(run.outcomes(values=False)) == repr([replace(outcome, values={})])
        assert (store.run(run.name).config, store.run(run.name).facts) == (run.config, {"words": words})

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, object()])
    def test_what_is_no_finite_json_is_refused(self, store: Store, run: Run, bad: float) -> None:
        candidate, outcome = make_candidate(0), make_outcome(0)
        run.add_candidate(candidate, 0)
        before = dump(store)
        writes: list[Callable[[], object]] = [
            lambda: run.add_candidate(replace(candidate, number=1, genome=(bad,)), 0),
            lambda: run.add_candidate(replace(candidate, number=1, recipe={"x": bad}), 0),
            lambda: run.add_outcome(replace(outcome, stderr=bad), "f"),
            lambda: run.add_outcome(replace(outcome, tasks={"task": TaskScore(bad)}), "f"),
            lambda: run.add_outcome(replace(outcome, values={"task": [bad]}), "f"),
            lambda: run.add_outcome(replace(outcome, cost={"total": bad}), "f"),
            lambda: run.tell([], "search", Snapshot(0, 0, {"x": bad})),
            lambda: run.add_event("note", {"x": bad}),
            lambda: run.set_config({"x": bad}),
            lambda: run.set_facts({"x": bad}),
            lambda: store.create_run("s", {"x": bad}, {}),
        ]
        for write in writes:
            with pytest.raises(StoreError, match=r"cannot be stored: .*; expected JSON data with finite"):
                write()
        after = dump(store)
        assert after.pop("runs") is not None
        assert {name: rows for name, rows in before.items() if name != "runs"} == after
        assert run.config == store.run("r").config

    def test_candidates_are_numbered_without_gaps(self, store: Store, run: Run) -> None:
        run.add_candidates([(make_candidate(number), 0) for number in range(3)])
        run.add_candidates([])
        before = dump(store)
        for wrong in ([0], [2], [4], [3, 5], [3, 3], [-1]):
            with pytest.raises(StoreError, match="must be numbered on from 3 without gaps"):
                run.add_candidates([(make_candidate(number), 0) for number in wrong])
        assert dump(store) == before
        assert run.candidates() == [make_candidate(number) for number in range(3)]
        with pytest.raises(StoreError, match='run "r": there is no candidate 3'):
            run.candidate(3)

    def test_an_outcome_is_recorded_once(self, store: Store, run: Run) -> None:
        run.add_candidate(make_candidate(0), 0)
        first = make_outcome(0)
        run.add_outcome(first, "f")
        before = dump(store)
        with pytest.raises(StoreError, match='candidate 0 has an outcome on "search" already; it is kept'):
            run.add_outcome(Outcome(0, "search", "failed", reason="late"), "f")
        with pytest.raises(StoreError, match="candidate 1 is unknown"):
            run.add_outcome(make_outcome(1), "f")
        assert dump(store) == before
        run.add_outcome(make_outcome(0, "select"), "f")
        assert run.outcome(0, "search") == first
        assert run.outcome(0, "test") is None
        assert [outcome.documents for outcome in run.outcomes()] == ["search", "select"]
        assert run.outcomes("select") == [make_outcome(0, "select")]

    def test_a_repeat_is_found(self, run: Run) -> None:
        same = [replace(make_candidate(number), digest="same") for number in range(4)]
        run.add_candidates([(candidate, 0) for candidate in same])
        assert run.find_outcome("same", "f", "search") is None
        run.add_outcome(Outcome(0, "search", "failed", reason="crash"), "f")
        run.add_outcome(make_outcome(1), "other fitness")
        assert run.find_outcome("same", "f", "search") is None
        run.add_outcome(make_outcome(3), "f")
        run.add_outcome(make_outcome(2), "f")
        assert run.find_outcome("same", "f", "search") == make_outcome(2)
        assert run.find_outcome("same", "f", "select") is None
        assert run.find_outcome("other", "f", "search") is None

    def test_a_repeat_is_found_in_other_runs_that_score_alike(self, store: Store, run: Run) -> None:
        config, facts = {"workers": {"threads": 2}}, {"fitness": "f", "versions": {"torch": "2"}}
        runs = [
            store.create_run("alike", config, facts),
            store.create_run("threads", {"workers": {"threads": 1}}, facts),
            store.create_run("versions", config, {**facts, "versions": {"torch": "3"}}),
            store.create_run("fitness", config, {**facts, "fitness": "g"}),
        ]
        for number, other in enumerate(runs):
            other.add_candidates([(replace(make_candidate(k), digest=f"d{k}"), 0) for k in range(number + 1)])
            other.add_outcome(make_outcome(number), "f")
        damaged = store.create_run("damaged", config, facts)
        sql(store, "UPDATE runs SET facts = 'x' WHERE id = :id", id=damaged.id)
        last = store.create_run("last", {**config, "budget": 9}, facts)
        assert last.alike() == [runs[0].id]
        assert last.find_outcome("d0", "f", "search") is None
        assert last.find_outcome("d0", "f", "search", last.alike()) == make_outcome(0)
        assert last.find_outcome("d0", "other", "search", last.alike()) is None
        assert last.find_outcome("d1", "f", "search", last.alike()) is None
        last.add_candidates([(replace(make_candidate(k), digest="d0"), 0) for k in range(8)])
        last.add_outcome(make_outcome(7), "f")
        assert last.find_outcome("d0", "f", "search", last.alike()) == make_outcome(7)

    def test_counts(self, run: Run) -> None:
        assert run.counts().candidates == 0
        assert (run.counts().best_candidate, run.counts().outcomes) == (None, {})
        run.add_candidates([(make_candidate(number), 0) for number in range(6)])
        for number, score in enumerate([-3.0, -1.0, -1.0]):
            run.add_outcome(Outcome(number, f"search@{number}", "ok", score), "f")
        run.add_outcome(Outcome(3, "search", "invalid", reason="nan"), "f")
        run.add_outcome(Outcome(4, "search", "failed", reason="crash"), "f")
        run.add_outcome(Outcome(5, "select", "ok", 9.0), "f")
        counts = run.counts()
        assert counts.candidates == 6
        assert counts.outcomes == {"search": {"ok": 3, "invalid": 1, "failed": 1}, "select": {"ok": 1}}
        assert (counts.best_candidate, counts.best_score) == (1, -1.0)

    def test_document_sets(self, store: Store, run: Run) -> None:
        assert run.document_set("search") is None
        run.add_document_set("search", {"b": [3, 1], "a": (2,)})
        run.add_document_set("search", {"b": (3, 1), "a": [2]})
        assert run.document_set("search") == {"b": [3, 1], "a": [2]}
        before = dump(store)
        for other in ({"b": [1, 3], "a": [2]}, {"b": [3, 1]}):
            with pytest.raises(StoreError, match='documents of "search" changed since the run began'):
                run.add_document_set("search", other)
        assert dump(store)["document_sets"] == before["document_sets"]

    def test_events(self, run: Run) -> None:
        for place in range(3):
            run.add_event("note", {"place": place})
        events = run.events()
        assert [(event.id, event.kind, event.data["place"]) for event in events] == [
            (1, "note", 0),
            (2, "note", 1),
            (3, "note", 2),
        ]
        assert events[0].at <= events[2].at
        assert run.events(after=2) == events[2:]
        assert run.events(after=99) == []
        assert run.events(after=1, limit=1) == events[1:2]
        assert run.last_event() == 3

    def test_what_is_asked_of_a_driver_reaches_that_driver_only(self, store: Store, run: Run) -> None:
        assert run.requested() == ""
        store.run("r").request("stop")
        assert run.requested() == "stop"
        store.run("r").request("now")
        assert run.requested() == "now"
        later = store.take_run("r")
        assert later.requested() == ""
        later.release("stopped")
        with pytest.raises(ConflictError, match='"r" has no driver that could stop; it is stopped'):
            store.run("r").request("stop")

    def test_activity_is_replaced(self, store: Store, run: Run) -> None:
        assert run.activity() is None
        for done in (1, 2):
            run.set_activity({"done": done, "workers": []})
        at, data = store.run("r").activity()
        assert data == {"done": 2, "workers": []}
        assert abs(at - store.run("r").created) < 60

    # Log and snapshots

    def test_the_log_tells_what_to_replay(self, run: Run) -> None:
        run.add_candidate(Candidate(0, "source:a", 0, None, None, {}, "a"), 0)
        for number in range(1, 6):
            told_before = 0 if number < 4 else 2
            run.add_candidate(replace(make_candidate(number), index=number - 1), told_before)
        for number in (0, 3, 1, 2, 4):
            run.add_outcome(make_outcome(number), "f")
        run.add_outcome(make_outcome(5, "select"), "f")
        run.tell([3, 1], "search", Snapshot(3, 2, {"x": 1}))
        run.tell([2], "search")
        log = run.log()
        assert [(entry.candidate.index, entry.told_before) for entry in log.asked] == [
            (0, 0),
            (1, 0),
            (2, 0),
            (3, 2),
            (4, 2),
        ]
        assert [outcome.candidate for outcome in log.told] == [3, 1, 2]
        assert [outcome.candidate for outcome in log.waiting] == [4]
        rest = run.log(run.latest_snapshot())
        assert [entry.candidate.number for entry in rest.asked] == [4, 5]
        assert [outcome.candidate for outcome in rest.told] == [2]
        assert rest.waiting == log.waiting == (make_outcome(4),)

    def test_tell_is_all_or_nothing(self, store: Store, run: Run) -> None:
        run.add_candidates([(make_candidate(number), 0) for number in range(4)])
        for number in range(3):
            run.add_outcome(make_outcome(number), "f")
        run.tell([1], "search", Snapshot(1, 1, {}))
        before = dump(store)
        for wrong, documents in (([0, 1], "search"), ([0, 3], "search"), ([0, 0], "search"), ([0], "test")):
            with pytest.raises(StoreError, match="have an outcome that was not told yet"):
                run.tell(wrong, documents, Snapshot(2, 1 + len(wrong), {}))
        with pytest.raises(ValueError, match=r"snapshot.told is 2, expected 3"):
            run.tell([2, 0], "search", Snapshot(3, 2, {}))
        assert dump(store) == before

    def test_the_newest_three_snapshots_are_kept(self, store: Store, run: Run) -> None:
        assert run.latest_snapshot() is None
        for place in range(5):
            run.tell([], "search", Snapshot(place, 0, {"place": place, "x": 0.1 + 0.2}))
        assert run.latest_snapshot() == Snapshot(4, 0, {"place": 4, "x": 0.1 + 0.2})
        assert len(dump(store)["snapshots"]) == 3

    def test_a_damaged_snapshot_is_passed_over(self, store: Store, run: Run) -> None:
        for place in range(3):
            run.tell([], "search", Snapshot(place, 0, {"place": place}))
        with store.reading() as connection:
            good = bytes(
                connection.execute(text("SELECT state FROM snapshots WHERE sequence=3")).scalar_one()
            )
        change = "UPDATE snapshots SET state = :state WHERE sequence = 3"
        damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
        for state in (*damaged, good[:-1], b"", b"\xff\xfe"):
            sql(store, change, state=state)
            assert store.run("r").latest_snapshot() == Snapshot(1, 0, {"place": 1})
        assert run.events() == []
        assert run.latest_snapshot() == Snapshot(1, 0, {"place": 1})
        assert [(event.kind, event.data["sequence"]) for event in run.events()] == [("snapshot_damaged", 3)]
        sql(store, change, state=good)
        assert run.latest_snapshot() == Snapshot(2, 0, {"place": 2})
        sql(store, "UPDATE snapshots SET told = 7 WHERE sequence = 3")
        assert run.latest_snapshot() == Snapshot(1, 0, {"place": 1})
        sql(store, "UPDATE snapshots SET sha256 = ''")
        assert run.latest_snapshot() is None

    def test_a_damaged_record_is_named(self, store: Store, run: Run) -> None:
        run.add_candidate(make_candidate(0), 0)
        run.add_outcome(make_outcome(0), "f")
        sql(store, "UPDATE candidates SET recipe = '{'")
        sql(store, "UPDATE outcomes SET document_values = :blob", blob=b"x")
        with pytest.raises(StoreError, match='run "r": candidate 0 is damaged in the store'):
            run.candidates()
        with pytest.raises(StoreError, match='run "r": an outcome is damaged in the store'):
            run.outcomes()

    # Opening

    def test_a_store_of_another_version_is_refused(self, store: Store, url: str) -> None:
        sql(store, "UPDATE meta SET value = '99'")
        with pytest.raises(StoreError, match="its schema is version 99, this evomerge reads version 2"):
            Store.open(url)

    def test_tables_of_another_program_are_left_alone(self, store: Store, url: str) -> None:
        sql(store, "DROP TABLE meta")
        for create in (True, False):
            with pytest.raises(StoreError, match="it holds tables of another program"):
                Store.open(url, create=create)
        sql(store, "CREATE TABLE meta (a integer)")
        with pytest.raises(StoreError, match='its table "meta" is of another program'):
            Store.open(url)

    def test_nothing_is_made_unless_asked(self, url: str) -> None:
        with pytest.raises(StoreError, match=r"there is no such file|it is empty"):
            Store.open(url, create=False)
        Store.open(url).close()
        Store.open(url, create=False).close()

    def test_many_open_an_empty_store_at_once(self, url: str) -> None:
        stores: list[Store | Exception] = []

        def make() -> None:
            try:
                stores.append(Store.open(url))
            except Exception as error:
                stores.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [type(store) for store in stores] == [Store] * 8
        for store in stores:
            store.close()

    def test_a_forked_process_must_open_its_own(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StoreError, match="it was opened before a fork; open it in this process"):
            store.runs()
