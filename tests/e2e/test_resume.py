"""A run survives being killed, stopped, and resumed elsewhere, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.world import (
    TASKS,
    evomerge,
    history,
    make_world,
    start,
    wait_for_outcomes,
    write_config,
)
from tests.postgres import PrivatePostgres

SLOW = {"FITNESS_SECONDS": "0.15"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> dict[str, object]:
    done = evomerge(world, "run", "config.yaml", "--store", "undisturbed.db")
    assert done.returncode == 0, done.stderr
    return history(world / "undisturbed.db", "small")


def killed_and_resumed(world: Path, store: str, moments: list[int], log: Path) -> int:
    """Run, kill whenever so many outcomes are recorded, resume to the end; return the number of kills."""
    env = {**SLOW, "FITNESS_LOG": str(log)}
    arguments = ("run", "config.yaml", "--store", store)
    kills = 0
    for moment in moments:
        process = start(world, *arguments, env=env)
        assert wait_for_outcomes(process, store, "small", moment), process.said()
        process.kill()
        kills += 1
        arguments = ("resume", "small", "--store", store)
    done = evomerge(world, *arguments, env={"FITNESS_LOG": str(log)})
    assert done.returncode == 0, done.stderr
    return kills


def test_a_run_killed_at_many_moments_ends_as_if_it_had_never_been_killed(
    world: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    total = len(undisturbed["outcomes"])  # type: ignore[arg-type]
    moments = [1, 6, 9, 12, total - 7, total - 2]
    store = str(tmp_path / "killed.db")
    log = tmp_path / "evaluations"
    kills = killed_and_resumed(world, store, moments, log)
    assert history(store, "small") == undisturbed
    evaluated = Counter(log.read_text().split("\n"))
    del evaluated[""]
    repeated = sum(count - 1 for count in evaluated.values())
    assert repeated <= kills, "more was evaluated again than was under way when the driver died"


@pytest.mark.postgres
def test_the_same_holds_on_postgresql(world: Path, undisturbed: dict[str, object], tmp_path: Path) -> None:
    with PrivatePostgres() as url:
        killed_and_resumed(world, url, [3, 11], tmp_path / "evaluations")
        assert history(url, "small") == undisturbed


def test_ctrl_c_finishes_what_runs_and_resume_goes_on_to_the_same_end(
    world: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    store = tmp_path / "stopped.db"
    process = start(world, "run", "config.yaml", "--store", str(store), env=SLOW)
    assert wait_for_outcomes(process, store, "small", 8)
    os.killpg(process.pid, signal.SIGINT)
    done = process.end()
    assert done.returncode == 130, done.stderr
    assert "stopped" in done.stdout
    assert "Traceback" not in done.stderr
    assert history(store, "small")["status"] == "stopped"
    done = evomerge(world, "resume", "small", "--store", str(store))
    assert done.returncode == 0, done.stderr
    assert history(store, "small") == undisturbed


def test_ctrl_c_twice_stops_at_once(world: Path, undisturbed: dict[str, object], tmp_path: Path) -> None:
    store = tmp_path / "stopped.db"
    process = start(world, "run", "config.yaml", "--store", str(store), env={"FITNESS_SECONDS": "5"})
    assert wait_for_outcomes(process, store, "small", 1)
    os.killpg(process.pid, signal.SIGINT)
    while "stopping after the candidates that are running" not in process.said():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.end()
    assert history(store, "small")["status"] == "stopped"
    done = evomerge(world, "resume", "small", "--store", str(store))
    assert done.returncode == 0, done.stderr
    assert history(store, "small") == undisturbed


def test_a_larger_budget_goes_on_from_a_finished_run(
    world: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    store = str(tmp_path / "longer.db")
    assert evomerge(world, "run", "config.yaml", "--store", store).returncode == 0
    done = evomerge(world, "resume", "small", "--evaluations", "20", "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["evaluations"] == 20
    assert shown["looks_at_test"] in (1, 2)
    longer = history(store, "small")
    searched = [c for c in longer["candidates"] if c[1] == "optimizer"]
    before = [c for c in undisturbed["candidates"] if c[1] == "optimizer"]  # type: ignore[attr-defined]
    assert [c[2:] for c in searched[: len(before)]] == [c[2:] for c in before]


def test_what_makes_the_run_cannot_change_on_resume(world: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "fixed.db")
    assert evomerge(world, "run", "config.yaml", "--store", store).returncode == 0
    done = evomerge(world, "resume", "small", "--store", store, "--set", "seed=5")
    assert done.returncode == 2
    assert "seed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_changed_source_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    store = "drift.db"
    assert evomerge(world, "run", "config.yaml", "--store", store).returncode == 0
    weights = world / "one" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    resumed = evomerge(world, "resume", "small", "--store", store, "--evaluations", "16")
    assert resumed.returncode == 2
    assert "source one" in resumed.stderr
    assert "--accept-drift" in resumed.stderr
    accepted = evomerge(world, "resume", "small", "--store", store, "--evaluations", "16", "--accept-drift")
    assert accepted.returncode == 0, accepted.stderr
    exported = evomerge(world, "export", "small", "out", "--candidate", "1", "--store", store)
    assert exported.returncode == 2
    assert "changed since the run" in exported.stderr


def test_a_second_driver_is_refused(world: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "shared.db")
    process = start(world, "run", "config.yaml", "--store", store, env=SLOW)
    try:
        assert wait_for_outcomes(process, store, "small", 2)
        second = evomerge(world, "resume", "small", "--store", store)
        assert second.returncode == 2
        assert "driven by" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        again = evomerge(world, "run", "config.yaml", "--store", store)
        assert again.returncode == 2
        assert "exists already" in again.stderr
    finally:
        ended = process.end()
    assert ended.returncode == 0


def test_a_steady_state_optimizer_resumes_from_its_history(world: Path, tmp_path: Path) -> None:
    write_config(world, "tpe.yaml", name="tpe", optimizer={"name": "optuna", "sampler": "tpe"})
    whole, killed = str(tmp_path / "whole.db"), str(tmp_path / "killed.db")
    assert evomerge(world, "run", "tpe.yaml", "--store", whole).returncode == 0
    process = start(world, "run", "tpe.yaml", "--store", killed, env=SLOW)
    assert wait_for_outcomes(process, killed, "tpe", 11)
    process.kill()
    done = evomerge(world, "resume", "tpe", "--store", killed)
    assert done.returncode == 0, done.stderr
    assert history(killed, "tpe") == history(whole, "tpe")


def test_fresh_documents_for_each_generation_are_drawn_again_alike_on_resume(
    world: Path, tmp_path: Path
) -> None:
    write_config(world, "draws.yaml", name="draws", fitness={**TASKS, "resample": 10})
    whole, killed = str(tmp_path / "whole.db"), str(tmp_path / "killed.db")
    assert evomerge(world, "run", "draws.yaml", "--store", whole).returncode == 0
    process = start(world, "run", "draws.yaml", "--store", killed)
    assert wait_for_outcomes(process, killed, "draws", 9)
    process.kill()
    done = evomerge(world, "resume", "draws", "--store", killed)
    assert done.returncode == 0, done.stderr
    assert history(killed, "draws") == history(whole, "draws")
    keys = {outcome["documents"] for outcome in history(whole, "draws")["outcomes"]}
    assert {"search@0", "search@1", "search@2"} <= keys


def test_races_are_set_again_alike_on_resume_and_who_lost_one_does_not_win(
    world: Path, tmp_path: Path
) -> None:
    tasks = [{"name": "choice", "metric": "gold_loglikelihood"}, "written"]
    fitness = {**TASKS, "tasks": tasks, "racing": {"rungs": [0.5], "error": 0.4}}
    fitness["documents"] = {"search": 40, "select": 20, "test": 20}
    write_config(world, "races.yaml", name="races", fitness=fitness)
    whole, killed = str(tmp_path / "whole.db"), str(tmp_path / "killed.db")
    assert evomerge(world, "run", "races.yaml", "--store", whole).returncode == 0
    process = start(world, "run", "races.yaml", "--store", killed)
    assert wait_for_outcomes(process, killed, "races", 11)
    process.kill()
    done = evomerge(world, "resume", "races", "--store", killed)
    assert done.returncode == 0, done.stderr
    assert history(killed, "races") == history(whole, "races")
    outcomes = history(whole, "races")["outcomes"]
    stopped = {outcome["candidate"] for outcome in outcomes if outcome["status"] == "stopped"}
    assert stopped
    later = [outcome for outcome in outcomes if outcome["documents"] != "search"]
    assert not stopped & {outcome["candidate"] for outcome in later}
    assert {outcome["status"] for outcome in later} == {"ok"}  # nobody is raced on held-out documents
    shown = json.loads(evomerge(world, "show", "races", "--json", "--store", whole).stdout)
    assert shown["evaluation"]["stopped"] == len(stopped)
    assert shown["evaluation"]["skipped_documents"] == 40 * len(stopped)
    assert shown["failures"] == 0
