"""What a service's queue must do on any database."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from evomerge.errors import ConflictError, LimitError, MissingError
from evomerge.report.overview import one_run, overview
from evomerge.store import Store
from evomerge.store.jobs import Job, JobQueue
from evomerge.store.pages import candidate_page, whole_candidate
from tests.contracts.store import make_candidate, make_outcome


class JobQueueContract:
    """A subclass provides the fixture `url`: the URL of an empty database for each test."""

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        with Store.open(url) as store:
            yield store

    @pytest.fixture
    def queue(self, store: Store) -> JobQueue:
        return JobQueue(store, "mine")

    def submit(self, queue: JobQueue, name: str, **options: object) -> Job:
        given = {"digest": f"d-{name}", **options}
        return queue.submit(name, {"name": name}, "/models", **given)[0]  # type: ignore[arg-type]

    def test_jobs_start_by_priority_then_in_the_order_of_submission(self, queue: JobQueue) -> None:
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
            self.submit(queue, name, priority=priority)
        assert [job.name for job in queue.jobs("queued")] == ["b", "d", "a", "c"]
        job = queue.job("b")
        assert job is not None
        assert (job.config, job.folder, job.state, job.attempts) == ({"name": "b"}, "/models", "queued", 0)

    def test_the_same_submission_is_one_job(self, queue: JobQueue) -> None:
        first, new = queue.submit("a", {}, "/m", digest="d", key="k")
        assert new
        assert queue.submit("a", {}, "/m", digest="d", key="k") == (first, False)
        assert queue.submit("a", {}, "/m", digest="d") == (first, False)
        with pytest.raises(ConflictError, match="exists with another config"):
            queue.submit("a", {}, "/m", digest="other")
        with pytest.raises(ConflictError, match="Idempotency-Key was used for another submission"):
            queue.submit("b", {}, "/m", digest="d", key="k")
        with pytest.raises(ConflictError, match="Idempotency-Key"):
            queue.submit("a", {}, "/m", digest="other", key="k")

    def test_eight_at_once_make_one_job(self, queue: JobQueue) -> None:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: queue.submit("a", {}, "/m", digest="d", key="k"), range(8)))
        assert [new for _, new in found].count(True) == 1
        assert len({job.id for job, _ in found}) == 1

    def test_the_name_of_a_run_is_taken(self, store: Store, queue: JobQueue) -> None:
        store.create_run("a", {}, {})
        with pytest.raises(ConflictError, match='run "a" exists in store'):
            self.submit(queue, "a")

    def test_so_many_wait_and_no_more(self, queue: JobQueue) -> None:
        self.submit(queue, "a", most=2)
        self.submit(queue, "b", most=2)
        with pytest.raises(LimitError, match="2 jobs wait already"):
            self.submit(queue, "c", most=2)
        assert self.submit(queue, "b", most=2).name == "b"

    def test_a_job_that_came_to_nothing_gives_way(self, queue: JobQueue) -> None:
        job = self.submit(queue, "a", key="k")
        queue.end(job, "failed", "no such folder")
        assert self.submit(queue, "a", key="k").id == job.id
        again, new = queue.submit("a", {"other": 1}, "/m", digest="other")
        assert new
        assert (again.state, again.error) == ("queued", "")

    def test_a_job_is_begun_once(self, queue: JobQueue) -> None:
        job = self.submit(queue, "a")
        begun = queue.begin(job, epoch=3, outcomes=7)
        assert begun is not None
        assert (begun.state, begun.epoch, begun.outcomes, begun.attempts) == ("running", 3, 7, 1)
        assert queue.begin(job, epoch=3, outcomes=7) is None
        queue.set_handle(begun, {"pid": 5})
        (running,) = queue.jobs("running")
        assert running.handle == {"pid": 5}
        queue.again(running, restarts=1)
        (waiting,) = queue.jobs("queued")
        assert (waiting.restarts, waiting.attempts) == (1, 1)

    def test_each_service_sees_to_its_own(self, store: Store, queue: JobQueue) -> None:
        self.submit(queue, "a")
        other = JobQueue(store, "other")
        assert other.jobs("queued") == []
        assert other.job("a") == queue.job("a")

    def test_cancel(self, store: Store, queue: JobQueue) -> None:
        self.submit(queue, "waits")
        queue.cancel("waits")
        queue.cancel("waits")  # the same again is no error
        job = queue.job("waits")
        assert job is not None
        assert (job.state, job.outcome, one_run(store, "waits")["status"]) == (
            "ended",
            "cancelled",
            "cancelled",
        )
        begun = queue.begin(self.submit(queue, "runs"), epoch=0, outcomes=0)
        assert begun is not None
        for immediately, noted in ((False, "stop"), (True, "now"), (False, "now")):
            queue.cancel("runs", immediately=immediately)
            assert [job.cancel for job in queue.jobs("running")] == [noted]
        driven = store.create_run("by-hand", {}, {})
        queue.cancel("by-hand")
        assert driven.requested() == "stop"
        driven.release("stopped")
        with pytest.raises(ConflictError, match="it is stopped"):
            queue.cancel("by-hand")
        with pytest.raises(MissingError, match='no run "nobody"'):
            queue.cancel("nobody")

    def test_resume(self, store: Store, queue: JobQueue) -> None:
        store.create_run("by-hand", {"x": 1}, {}).release("stopped")
        job = queue.resume("by-hand", {"x": 1}, "/m", ["--set", "budget.evaluations=9"], 4)
        assert (job.state, job.options, job.priority) == ("queued", ("--set", "budget.evaluations=9"), 4)
        with pytest.raises(ConflictError, match="is queued already"):
            queue.resume("by-hand", {}, "/m", [], None)
        queue.end(job, "interrupted", "died")
        again = queue.resume("by-hand", {}, "/m", [], None)
        assert (again.id, again.options, again.priority, again.error) == (job.id, (), 4, "")

    def test_exports(self, queue: JobQueue) -> None:
        first = queue.add_export("a", 3, "/x/a-3")
        assert queue.add_export("a", 3, "/x/a-3") == first
        assert queue.exports("b") == []
        queue.set_export(first.id, "failed", "no space")
        second = queue.add_export("a", 3, "/x/a-3")
        assert [(e.id, e.state, e.error) for e in queue.exports("a")] == [
            (first.id, "failed", "no space"),
            (second.id, "queued", ""),
        ]
        assert queue.exports(states=("queued",)) == [second]

    # Runs and candidates at a glance

    def test_runs_and_jobs_are_one_list(self, store: Store, queue: JobQueue) -> None:
        store.create_run("dead", {}, {})
        with store.writing() as connection:
            connection.execute(text("""UPDATE runs SET owner = '{"host": "h", "pid": 1, "started": "x"}'"""))
            connection.execute(text("UPDATE runs SET heartbeat = heartbeat - 100"))
        run = store.create_run("lives", {}, {})
        store.create_run("ended", {}, {}).release("finished")
        run.add_candidate(make_candidate(0), 0)
        run.add_outcome(make_outcome(0), "f")
        self.submit(queue, "waits")
        begun = queue.begin(self.submit(queue, "begins"), epoch=0, outcomes=0)
        assert begun is not None
        queue.end(self.submit(queue, "wrong"), "failed", "space: missing")
        rows = overview(store)["runs"]
        assert {row["name"]: row["status"] for row in rows} == {
            "dead": "interrupted",
            "lives": "running",
            "ended": "finished",
            "waits": "queued",
            "begins": "starting",
            "wrong": "failed",
        }
        by_name = {row["name"]: row for row in rows}
        assert (by_name["lives"]["candidates"], by_name["lives"]["best_search_score"]) == (1, 0.0)
        assert (by_name["ended"]["candidates"], by_name["ended"]["best_search_score"]) == (0, None)
        assert by_name["wrong"]["error"] == "space: missing"
        assert one_run(store, "lives") == by_name["lives"]
        with pytest.raises(MissingError, match='no run "live" in store .*did you mean "lives"'):
            one_run(store, "live")

    def test_the_list_comes_in_pages(self, store: Store) -> None:
        for number in range(5):
            store.create_run(f"r{number}", {}, {}).release("finished" if number % 2 else "stopped")
        seen, after = [], None
        for size in (2, 2, 1):
            page = overview(store, after=after, limit=2, newest_first=True)
            assert (len(page["runs"]), page["total"]) == (size, 5)
            seen += [row["name"] for row in page["runs"]]
            after = page["next"]
        assert (seen, after) == (["r4", "r3", "r2", "r1", "r0"], None)
        assert [row["name"] for row in overview(store, status="finished")["runs"]] == ["r1", "r3"]

    def test_candidates_come_sorted_and_filtered(self, store: Store) -> None:
        run = store.create_run("r", {}, {})
        for number in range(6):
            run.add_candidate(make_candidate(number), 0)
        for number in (0, 1, 3, 4):
            run.add_outcome(make_outcome(number), "f")
        run.add_outcome(make_outcome(3, "select"), "f")
        page = candidate_page(store, run, sort="score", descending=True)
        assert [row["number"] for row in page["candidates"]] == [4, 3, 1, 0, 2, 5]
        assert [row["status"] for row in page["candidates"]] == ["ok"] * 4 + ["pending"] * 2
        assert [o["documents"] for o in page["candidates"][1]["outcomes"]] == ["search", "select"]
        page = candidate_page(store, run, sort="score", offset=1, limit=2)
        assert [row["number"] for row in page["candidates"]] == [1, 3]
        assert page["total"] == 6
        page = candidate_page(store, run, status="pending")
        assert ([row["number"] for row in page["candidates"]], page["total"]) == ([2, 5], 2)
        page = candidate_page(store, run, status="failed")
        assert page == {"total": 0, "candidates": []}
        whole = whole_candidate(store, run, 3)
        assert whole["genome"] == list(make_candidate(3).genome or ())
        assert whole["recipe"] == dict(make_candidate(3).recipe)
        with pytest.raises(MissingError):
            whole_candidate(store, run, 6)

    # Stores of the version before
