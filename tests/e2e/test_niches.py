"""A search with niches over segments: killed, resumed, exported, and read as a population."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.config import parse_config
from evomerge.optimizers.niches import Niches
from evomerge.plan import Plan
from evomerge.records import Proposal
from evomerge.store import Store
from tests.checkpoints.tiny import make_llama
from tests.e2e.test_resume import SLOW
from tests.e2e.world import evomerge, history, make_world, start, wait_for_outcomes, write_config

SEGMENTS = {
    "name": "seg",
    "sources": {"models": ["./base", "./one", "./two"]},
    "space": {"kind": "segments", "cells": 64, "chromosomes": [["attention"]]},
    "optimizer": {"name": "niches", "size": 5},
    "fitness": {"function": "fitness.py:solved"},
    "budget": {"evaluations": 24, "finalists": 3},
    "baselines": None,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_config(folder, "seg.yaml", **SEGMENTS)
    done = evomerge(folder, "run", "seg.yaml", "--store", "whole.db")
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(world: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "killed.db")
    process = start(world, "run", "seg.yaml", "--store", store, env=SLOW)
    assert wait_for_outcomes(process, store, "seg", 17), process.said()
    process.kill()
    done = evomerge(world, "resume", "seg", "--store", store)
    assert done.returncode == 0, done.stderr
    assert history(store, "seg") == history(world / "whole.db", "seg")


def test_the_exported_model_is_the_table_over_the_sources(world: Path, tmp_path: Path) -> None:
    with Store.open(world / "whole.db", create=False) as opened:
        candidates = [c for c in opened.run("seg").candidates() if c.index is not None]
    child = max(candidates, key=lambda c: len(c.genome or ()))
    assert len(child.genome or ()) > 8, "it has segments"
    target = tmp_path / "out"
    number = str(child.number)
    done = evomerge(world, "export", "seg", str(target), "--candidate", number, "--store", "whole.db")
    assert done.returncode == 0, done.stderr
    assert not (target / "mergekit.yaml").exists()
    found = load_file(target / "model.safetensors")
    sources = [load_file(world / name / "model.safetensors") for name in ("base", "one", "two")]
    tables = child.recipe["segments"]
    filled = [0, 0]
    for name, place in layout_of(Checkpoint.open(world / "base")).places.items():
        table = 0 if place.role == "attention" else 1
        size = sources[0][name].numel()
        entries = torch.arange(filled[table], filled[table] + size)
        starts = torch.tensor(tables[table]["starts"])
        rows = torch.tensor(tables[table]["coefficients"], dtype=torch.float64)
        factors = rows[torch.searchsorted(starts, entries, right=True) - 1]
        want = sum(factors[:, i] * source[name].flatten().double() for i, source in enumerate(sources))
        torch.testing.assert_close(found[name].flatten().double(), want, rtol=1e-6, atol=1e-8)
        filled[table] += size


def replayed(world: Path, store: str, name: str) -> set[int]:
    """Return who lives by the optimizer itself, over the real sources; it compares every genome."""
    with Store.open(Path(store), create=False) as opened:
        view = opened.run(name)
        log = view.log()
        optimizer = Plan(parse_config(view.config, name), world).optimizer()
    assert isinstance(optimizer, Niches)
    number = {asked.candidate.index: asked.candidate.number for asked in log.asked}
    index = {n: i for i, n in number.items()}
    told = list(log.told)
    for asked in log.asked:
        while told and len(log.told) - len(told) < asked.told_before:
            outcome = told.pop(0)
            optimizer.tell(index[outcome.candidate] or 0, outcome.score, outcome.values)
        found = asked.candidate
        optimizer.adopt(Proposal(found.index or 0, found.generation, found.genome or ()))
    for outcome in told:
        optimizer.tell(index[outcome.candidate] or 0, outcome.score, outcome.values)
    assert optimizer.archive is not None
    return {number[i] for i in optimizer.archive.numbers}


def population(world: Path, run: str, store: str) -> dict[str, Any]:
    done = evomerge(world, "population", run, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_population_is_shown_with_what_each_brings(world: Path) -> None:
    found = population(world, "seg", "whole.db")
    table = evomerge(world, "population", "seg", "--store", "whole.db")
    assert table.returncode == 0
    with Store.open(world / "whole.db", create=False) as opened:
        view = opened.run("seg")
        proposed = {c.number: c for c in view.candidates() if c.index is not None}
        values = {n: view.outcome(n, "search").values["near"] for n in proposed}  # type: ignore[union-attr]
    living = {one["candidate"]: one for one in found["individuals"]}
    assert len(living) == 5
    assert [round(sum(v) / 40, 9) for v in (values[n] for n in living)] == [
        round(one["score"], 9) for one in living.values()
    ]
    solved = {n: {i for i, value in enumerate(values[n]) if value} for n in living}
    for number, one in living.items():
        others = set().union(*(solved[n] for n in living if n != number))
        assert one["documents_alone"] == len(solved[number] - others)
        assert all(parent in proposed and parent < number for parent in one["parents"])
        assert str(number) in table.stdout
    assert found["coverage"] == len(set().union(*solved.values())) / 40
    assert sum(one["fitness_share"] for one in living.values()) == pytest.approx(1.0)
    assert [row["told"] for row in found["curve"]] == list(range(1, 25))
    assert found["curve"][-1]["coverage"] == found["coverage"]


def test_another_run_begins_from_a_population_with_a_new_source(world: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "population.json", str(tmp_path / "warm.db")
    models = tmp_path / "models"
    done = evomerge(
        world,
        *("population", "export", "seg", str(file), "--store", "whole.db"),
        *("--models", str(models), "--count", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert len(list(models.glob("model-*/model.safetensors"))) == 2
    again = evomerge(world, "population", "export", "seg", str(file), "--store", "whole.db")
    assert again.returncode == 2
    assert "it exists" in again.stderr
    make_llama(world / "three", seed=9, layers=3, vocab=96)
    changes = {
        **SEGMENTS,
        "name": "warm",
        "sources": {"models": ["./two", "./three", "./base", "./one"]},
        "optimizer": {"name": "niches", "size": 8, "warm_up": 9, "founders": str(file)},
        "budget": {"evaluations": 16, "finalists": 2},
    }
    write_config(world, "warm.yaml", **changes)
    done = evomerge(world, "run", "warm.yaml", "--store", store)
    assert done.returncode == 0, done.stderr
    before = {one["candidate"]: one for one in population(world, "seg", "whole.db")["individuals"]}
    with Store.open(world / "whole.db", create=False) as opened:
        outcomes = {n: opened.run("seg").outcome(n, "search") for n in before}
    with Store.open(Path(store), create=False) as opened:
        view = opened.run("warm")
        founders = [c for c in view.candidates() if c.index is not None and 4 <= c.index < 9]
        for old, new in zip(before, founders, strict=True):
            assert view.outcome(new.number, "search").values == outcomes[old].values  # type: ignore[union-attr]
    assert len(population(world, "warm", store)["individuals"]) == 8
    write_config(world, "foreign.yaml", **{**changes, "sources": {"models": ["./two", "./three", "./base"]}})
    refused = evomerge(world, "validate", "foreign.yaml")
    assert refused.returncode == 2
    assert "its source one (fingerprint " in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    mapped = tmp_path / "mapped.json"
    arguments = ("population", "import", str(file), "foreign.yaml", str(mapped))
    assert evomerge(world, *arguments).returncode == 2
    done = evomerge(world, *arguments, "--map", "one=three")
    assert done.returncode == 0, done.stderr
    assert "three is new: in the place of another" in done.stdout
    checked = evomerge(world, "validate", "foreign.yaml", "--set", f"optimizer.founders={mapped}")
    assert checked.returncode == 0, checked.stderr


REFUSED = {
    "another optimizer": (
        {"optimizer": {"name": "cma_es"}},
        "a space of kind segments needs the optimizer niches",
    ),
    "fresh documents": ({"fitness": {"function": "f.py:x", "resample": 5}}, "fitness.resample"),
    "no such role": ({"space": {"kind": "segments", "chromosomes": [["expert"]]}}, "space.chromosomes"),
    "a role twice": ({"space": {"kind": "segments", "chromosomes": [["mlp"], ["mlp"]]}}, "none twice"),
    "one source": ({"sources": {"models": ["./one"]}}, "segments need two or more sources, got 1"),
    "mutation": ({"optimizer": {"name": "niches", "mutation": 0.1}}, "optimizer.mutation"),
    "unknown split": ({"space": {"kind": "segments", "splits": "word"}}, "space.splits"),
    "a method": ({"space": {"kind": "segments", "method": "ties"}}, 'unknown key "method"'),
    "no population": (
        {"optimizer": {"name": "niches", "founders": "none.json"}},
        "none.json: cannot be read (No such file",
    ),
    "a population that is none": (
        {"optimizer": {"name": "niches", "founders": "seg.yaml"}},
        "seg.yaml: not valid JSON",
    ),
    "no niches": ({"optimizer": {"name": "nichs"}}, 'did you mean "niches"?'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case: str, world: Path) -> None:
    changes, message = REFUSED[case]
    write_config(world, "bad.yaml", **{**SEGMENTS, **changes})
    done = evomerge(world, "validate", "bad.yaml")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_scores_that_cannot_be_shared_end_the_run_in_one_line(world: Path, tmp_path: Path) -> None:
    write_config(
        world, "bad.yaml", **{**SEGMENTS, "name": "bad", "fitness": {"function": "fitness.py:score"}}
    )
    done = evomerge(world, "run", "bad.yaml", "--store", str(tmp_path / "bad.db"))
    assert done.returncode == 2
    assert "optimizer niches needs scores from 0 to 1: task near has -" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_runs_have_no_population(world: Path, tmp_path: Path) -> None:
    write_config(world, "plain.yaml", name="plain", budget={"evaluations": 4, "finalists": 1})
    store = str(tmp_path / "plain.db")
    assert evomerge(world, "run", "plain.yaml", "--store", store).returncode == 0
    done = evomerge(world, "population", "plain", "--store", store)
    assert done.returncode == 2
    assert "only runs of the optimizer niches have a population" in done.stderr


def test_the_report_draws_the_population_and_the_merge_map(world: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = evomerge(world, "report", "seg", "--store", "whole.db", "--out", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for words in (
        "entropy: bits of a document",
        "Lines lead to parents",
        "mean coefficient",
        "coefficient, attention",
    ):
        assert words in text
