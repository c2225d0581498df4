"""What every worker pool promises."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.config import read_config
from evomerge.plan import Plan
from evomerge.records import Outcome
from evomerge.workers.pool import Job, Pool
from tests.e2e.world import make_world


def plan_of(world: Path, *overrides: str) -> Plan:
    """Return the plan of a world's config."""
    return Plan(read_config(world / "config.yaml", overrides), world)


def jobs_of(plan: Plan, count: int, documents: str = "search") -> list[Job]:
    """Return jobs along the diagonal of the space."""
    size = len(plan.space.dimensions)
    genomes = [tuple(i / max(count - 1, 1) for _ in range(size)) for i in range(count)]
    return [Job(i, plan.space.decode(g).to_json(), documents, 120.0) for i, g in enumerate(genomes)]


def run_all(pool: Pool, jobs: list[Job], seconds: float = 240.0) -> list[Outcome]:
    """Run jobs to the end."""
    waiting, outcomes = list(jobs), []
    end = time.monotonic() + seconds
    while len(outcomes) < len(jobs):
        while waiting and pool.free() > 0:
            pool.submit(waiting.pop(0))
        outcomes += pool.wait(1.0)
        if time.monotonic() > end:
            raise TimeoutError(f"{len(outcomes)} of {len(jobs)} outcomes")
    return outcomes


def plain(outcome: Outcome) -> dict[str, object]:
    """Return an outcome without what it cost."""
    return {key: value for key, value in outcome.to_json().items() if key != "cost"}


class PoolContract:
    """Inherit, and give `overrides` that choose the pool."""

    overrides: tuple[str, ...] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_world(tmp_path_factory.mktemp("world"))

    @pytest.fixture(scope="class")
    @classmethod
    def pool(cls, world: Path) -> Iterator[Pool]:
        from evomerge.drive import make_pool

        with make_pool(plan_of(world, *cls.overrides)) as started:
            yield started

    def test_each_job_gives_exactly_one_outcome(self, world: Path, pool: Pool) -> None:
        jobs = jobs_of(plan_of(world), 7)
        outcomes = run_all(pool, jobs)
        assert sorted(o.candidate for o in outcomes) == list(range(7))
        assert all(o.status == "ok" and o.documents == "search" for o in outcomes)
        assert pool.wait(0.0) == []

    def test_outcomes_do_not_depend_on_the_pool_or_the_order(self, world: Path, pool: Pool) -> None:
        from evomerge.workers.worker import Worker

        plan = plan_of(world)
        worker = Worker(plan.worker_spec(1))
        jobs = jobs_of(plan, 4) + jobs_of(plan, 2, "select")
        expected = sorted((plain(worker.run(job)) for job in jobs), key=str)
        assert sorted((plain(o) for o in run_all(pool, jobs[::-1])), key=str) == expected

    def test_a_bad_candidate_costs_only_itself(self, world: Path, pool: Pool) -> None:
        good = jobs_of(plan_of(world), 2)
        recipe = dict(good[1].recipe)
        bad = Job(7, {**recipe, "method": "nonsense"}, "search", 60.0)
        outcomes = {o.candidate: o for o in run_all(pool, [good[0], bad, good[1]])}
        assert outcomes[7].status == "failed"
        assert "nonsense" in outcomes[7].reason
        assert outcomes[0].status == outcomes[1].status == "ok"

    def test_a_recipe_without_a_merged_model_is_invalid(self, world: Path, pool: Pool) -> None:
        recipe = dict(jobs_of(plan_of(world), 1)[0].recipe)
        sources = [
            {**source, "parameters": {"weight": w}}
            for source, w in zip(recipe["sources"], (1.0, -1.0), strict=True)
        ]
        job = Job(0, {**recipe, "sources": sources, "parameters": {"normalize": True}}, "search", 60.0)
        (outcome,) = run_all(pool, [job])
        assert outcome.status == "invalid"
        assert "sum to" in outcome.reason

    def test_jobs_that_have_not_started_can_be_withdrawn(self, world: Path, pool: Pool) -> None:
        jobs = jobs_of(plan_of(world), 5)
        for job in jobs:
            pool.submit(job)
        withdrawn = pool.withdraw()
        assert withdrawn >= 3
        outcomes: list[Outcome] = []
        while len(outcomes) < 5 - withdrawn:
            outcomes += pool.wait(1.0)
        assert pool.wait(0.0) == []
        assert len(run_all(pool, jobs)) == 5

    def test_it_says_how_many_workers_are_up(self, pool: Pool) -> None:
        assert pool.state().workers >= 1
        assert pool.state().running == 0
        assert pool.free() >= 1

    def test_it_says_what_each_worker_does(self, world: Path, pool: Pool) -> None:
        assert {worker.state for worker in pool.workers_now()} <= {"idle", "starting"}
        before = time.time()
        pool.submit(jobs_of(plan_of(world), 1)[0])
        (busy,) = [worker for worker in pool.workers_now() if worker.state == "busy"]
        assert (busy.candidate, busy.documents) == (0, "search")
        assert busy.since is not None
        assert before <= busy.since <= time.time()
        while not pool.wait(1.0):
            pass
        idle = next(worker for worker in pool.workers_now() if worker.worker == busy.worker)
        assert (idle.state, idle.candidate, idle.since) == ("idle", None, None)

    def test_it_can_be_closed_twice(self, world: Path) -> None:
        from evomerge.workers.inline import InlinePool

        plan = plan_of(world)
        pool = InlinePool(plan.worker_spec(1))
        pool.start()
        pool.close()
        pool.close(kill=True)
        assert pool.free() == 0
