"""Trackers beside a run: they follow it, outlive its death, and never stop it."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from evomerge.store import Store
from tests.e2e.world import evomerge, make_world, start, wait_for_outcomes, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def scores_of(trials: list[optuna.trial.FrozenTrial]) -> dict[int, float | None]:
    return {trial.number: trial.value for trial in trials if trial.value is not None}


def test_a_run_is_followed_through_death_and_resume(world: Path) -> None:
    write_config(world, "live.yaml", name="live", trackers=["optuna:live.optuna"])
    killed = start(world, "run", "live.yaml", "--store", "live.db", env={"FITNESS_SECONDS": "0.3"})
    assert wait_for_outcomes(killed, world / "live.db", "live", 10)
    killed.kill()
    done = evomerge(world, "resume", "live", "--store", "live.db")
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="live", storage=f"sqlite:///{world}/live.optuna")
    with Store.open(world / "live.db") as store:
        run = store.run("live")
        assert len(study.trials) == len(run.candidates())
        assert scores_of(study.trials) == {o.candidate: o.score for o in run.outcomes("search")}
        assert run.events(kind="tracker_failed") == []
    assert study.user_attrs["status"] == "finished"
    again = evomerge(world, "track", "live", "--store", "live.db", "--to", "optuna:live.optuna")
    assert again.stdout.startswith("optuna:live.optuna: ")
    assert again.stdout.endswith(" outcomes, 0 of them new\n")


def test_a_tracker_that_fails_is_left_out_and_said_once(world: Path) -> None:
    trackers = ["optuna:no/such/folder/x.db", "optuna:works.optuna"]
    write_config(world, "failing.yaml", name="failing", trackers=trackers)
    done = evomerge(world, "run", "failing.yaml", "--store", "failing.db")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: tracker optuna:no/such/folder/x.db: ") == 1
    with Store.open(world / "failing.db") as store:
        run = store.run("failing")
        (event,) = run.events(kind="tracker_failed")
        assert event.data["tracker"] == "optuna:no/such/folder/x.db"
        assert run.status == "finished"
    assert len(optuna.load_study(study_name="failing", storage=f"sqlite:///{world}/works.optuna").trials) > 12


def test_a_target_that_cannot_be_is_refused_before_the_run(world: Path) -> None:
    for target in ("tensorbord:tb", "optuna"):
        done = evomerge(world, "run", "config.yaml", "--set", f"trackers=[{target}]", "--store", "refused.db")
        assert (done.returncode, "trackers.0" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    done = evomerge(world, "track", "nothing", "--to", "optuna:x.db", "--store", "live.db")
    assert done.returncode == 2
    assert 'there is no run "nothing"' in done.stderr
